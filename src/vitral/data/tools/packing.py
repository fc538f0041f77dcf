"""Writes packs: decodes images, resizes them, writes them in chunks, and reads them back.

progress.jsonl contains the settings, and a line for each chunk whose bytes have reached the disk.
If the process is killed, only the chunks in progress are lost.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from vitral import storage
from vitral.config import DataConfig
from vitral.data.crops import crop_resize
from vitral.data.decode import DecodeError, decode
from vitral.data.formats import open_dataset, packed
from vitral.data.formats.packed import INDEX, PROGRESS, VERSION, Chunk, images_path
from vitral.data.records import Encoded, Packed, Pixels
from vitral.data.splits import label_bytes
from vitral.data.workers import in_workers
from vitral.errors import counted, data_error, how_to_fix, printable
from vitral.files import check_room

CHUNK = 128  # images; 25 MB for squares of 256 pixels. Each worker keeps two or three chunks.
NUM_SAMPLED = 64  # images that are encoded to estimate the total size
QUALITY = 90
# Random crops of 224 pixels from bicubic squares of 256 differ by 2.8 gray levels from those of the
# originals and keep 47% of their energy above half of the highest frequency. For bilinear squares,
# these figures are 3.3 and 36% (142 photos of ImageNet).
INTERPOLATION = "bicubic"
SETTINGS = ("version", "size", "jpeg")
OTHER_FOLDER_HINT = "specify another folder, or remove that one"


def pack(config: DataConfig, seed: int, dst: Path, size: int, jpeg: bool, workers: int) -> str:
    """Packs the dataset that `config.path` names, or resumes its pack.

    Args:
        seed: selects the held-out images if there is no validation split.
        dst: folder of the pack, which is created if it does not exist.
        size: side length of the squares or, for JPEGs, maximum shorter side, in pixels.
        jpeg: whether to store JPEGs that keep their aspect ratio, instead of squares of pixels.
        workers: number of decoding processes; 0 decodes in the current process.

    Returns:
        A summary, as text.

    Raises:
        UserError: if the source cannot be packed, or differs from that of an unfinished pack; if
            there is something else at `dst`; or if the disk has too little space. In these cases,
            nothing is written. If images are broken, it is raised after the others are written.
        OSError: if the disk is full nevertheless; repeating the call resumes once there is space.
    """
    dataset = open_dataset(config, size, seed)
    splits: dict[str, _ChunkEncoder] = {}
    for split, records in (("train", dataset.train), ("val", dataset.val)):
        assert records is not None
        if isinstance(records, Packed | Pixels):
            raise data_error(
                config.path, "encoded images", "decoded ones", "train from it as it is"
            )
        splits[split] = _ChunkEncoder(records, size, jpeg)
    header = {"version": VERSION, "size": size, "jpeg": jpeg, "classes": list(dataset.classes)}
    header["images"] = {split: len(encoder.records) for split, encoder in splits.items()}
    index = {**header, "source": dataset.fingerprint}
    summary = f"{printable(dst)}: {counted(sum(header['images'].values()), 'image')}"
    if packed.finished(dst):
        _require_same(dst, index, packed.read_index(dst))
        (dst / PROGRESS).unlink(missing_ok=True)  # it remains if the process was killed
        return f"{summary}, already packed"
    if not packed.matches(dst):
        print(*dataset.notes, sep="\n", end="\n" * bool(dataset.notes))
        _begin(dst, splits)
    with (dst / PROGRESS).open("a+b") as progress:
        unfinished = _PackWriter(dst, splits, progress)
        unfinished.resume(header)
        broken = unfinished.write(workers)
        if broken:
            got = f"{len(broken):,} broken: {'; '.join(broken[:10])}"
            fix = "fix or replace them and repeat the command, which packs the missing images"
            raise data_error(config.path, "images that can be decoded", got, fix)
        unfinished.read_back()
        unfinished.finish(index)
    (dst / PROGRESS).unlink()
    return f"{summary}, packed and read back"


def _require_same(dst: Path, new: Mapping[str, Any], existing: Mapping[str, Any]) -> None:
    different = [name for name in new if existing.get(name) != new[name]]
    for name in SETTINGS:
        if name in different:
            expected, got = f"{name} {new[name]}", f"{name} {existing.get(name)}"
            raise data_error(dst, f"a pack with {expected}", got, OTHER_FOLDER_HINT)
    if different:
        raise _changed_error(dst)


def _changed_error(dst: Path) -> Exception:
    got = "a pack of different images, or the source has changed"
    return data_error(dst, "a pack of these images", got, OTHER_FOLDER_HINT)


def _begin(dst: Path, splits: Mapping[str, _ChunkEncoder]) -> None:
    """Prints the estimated size of a pack, and creates its folder if there is enough space."""
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        fix = "specify another folder"
        raise data_error(dst, "an empty folder, or none", "something else", fix)
    check_room(dst)
    images = sum(len(encoder.records) for encoder in splits.values())
    need = sum(len(encoder.records) * encoder.mean_bytes() for encoder in splits.values())
    place = next(path for path in (dst.absolute(), *dst.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    amount, space = (f"{n / 1e9:,.3f} GB" for n in (need, free))
    print(f"{printable(dst)}: {images:,} images take about {amount}; the disk has {space} free")
    if need > free:
        fix = "free some space, or try --jpeg or a smaller --size"
        raise data_error(dst, f"{amount} of free disk space", space, fix)
    try:
        dst.mkdir(parents=True, exist_ok=True)
        (dst / PROGRESS).touch()
    except OSError as error:
        fix = how_to_fix(error, "specify another folder")
        raise data_error(dst, "a writable folder", str(error.strerror), fix) from None


@dataclass(frozen=True)
class _EncodedChunk:
    """A chunk of images as it is written to the disk."""

    chunk: Chunk
    data: Tensor
    """All images, one after another. Shape (bytes,), uint8."""
    broken: list[str]
    """Location and reason for each image that cannot be decoded."""


class _ChunkEncoder(Dataset[_EncodedChunk]):
    """Encodes the images of a chunk; runs in worker processes."""

    def __init__(self, records: Encoded, size: int, jpeg: bool) -> None:
        self.records = records
        self.size = size
        self.jpeg = jpeg

    def __getitem__(self, images: range) -> _EncodedChunk:
        encoded, sides, broken = [], [], []
        for i in images:
            try:
                image = decode(self.records.read(i))
            except (DecodeError, OSError) as error:
                broken.append(f"{self.records.where(i)}: {error}")
                continue
            sides.append(tuple(image.shape[1:]))
            encoded.append(_jpeg(image, self.size) if self.jpeg else _square(image, self.size))
        data = np.concatenate([np.empty(0, np.uint8), *encoded])
        chunk = {
            "first": images.start,
            "each": [len(each) for each in encoded] if self.jpeg else sides,
            "bytes": len(data),
            "sha256": hashlib.sha256(data.data).hexdigest(),
            "source": self.source(images),
        }
        return _EncodedChunk(chunk, torch.from_numpy(data), broken)

    def source(self, images: range) -> str:
        """Returns the SHA-256 of labels and identity of some of the records."""
        chosen = np.zeros(len(self.records), bool)
        chosen[images.start : images.stop] = True
        chunk = self.records.take(chosen)
        digest = hashlib.sha256(label_bytes(chunk.labels))
        for piece in chunk.identity():
            digest.update(piece)
        return digest.hexdigest()

    def mean_bytes(self) -> float:
        """Returns the mean number of bytes per image in the pack; an estimate for JPEGs."""
        if not self.jpeg:
            return 3 * self.size**2
        N = len(self.records)
        return float(np.mean(self[range(0, N, max(1, N // NUM_SAMPLED))].chunk["each"] or [0]))


def _square(image: Tensor, size: int) -> NDArray[np.uint8]:
    box = np.array([0, 0, *image.shape[1:]])
    return crop_resize(image, box, size, INTERPOLATION).numpy().ravel()


def _jpeg(image: Tensor, size: int) -> NDArray[np.uint8]:
    short = min(image.shape[1:])
    if short > size:
        sides = [round(side * size / short) for side in image.shape[1:]]
        image = F.interpolate(image[None], sides, mode=INTERPOLATION, antialias=True)[0]
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=QUALITY)
    return np.frombuffer(buffer.getvalue(), np.uint8)


class _PackWriter:
    """An unfinished pack, locked by one process at a time."""

    def __init__(self, dst: Path, splits: Mapping[str, _ChunkEncoder], progress: IO[bytes]) -> None:
        self.dst = dst
        self.splits = splits
        self.progress = progress
        self.chunks: dict[str, dict[int, Chunk]] = {split: {} for split in splits}
        """Written chunks, by split and first image."""

    def resume(self, header: Mapping[str, Any]) -> None:
        """Reads progress.jsonl, or starts it if it is empty.

        Raises:
            UserError: if it is for different settings or images, or another process is packing.
        """
        try:
            # flock would outlive a SIGKILL in forked workers; this lock dies with its process.
            fcntl.lockf(self.progress, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            got, fix = "another process that is packing there", "wait for it"
            raise data_error(self.dst, "no other process", got, fix) from None
        lines = self._complete_lines()
        if not lines:
            self._append(header)
            return
        _require_same(self.dst, header, lines[0])
        for line in lines[1:]:
            self._record_chunk(**line)
        for split, chunks in self.chunks.items():
            for first, chunk in chunks.items():
                images = range(first, first + len(chunk["each"]))
                if chunk["source"] != self.splits[split].source(images):
                    raise _changed_error(self.dst)

    def _complete_lines(self) -> list[Any]:
        """Returns the complete lines of progress.jsonl; removes one that a killed process left."""
        self.progress.seek(0)
        lines = [line for line in self.progress if line.endswith(b"\n")]
        self.progress.truncate(sum(map(len, lines)))
        return [json.loads(line) for line in lines]

    def _append(self, line: Mapping[str, Any]) -> None:
        with storage.naming(self.dst / PROGRESS):
            self.progress.write(json.dumps(line).encode() + b"\n")
            self.progress.flush()
            os.fsync(self.progress.fileno())

    def _record_chunk(self, split: str, first: int, **chunk: Any) -> None:
        if chunk:
            chunk["each"] = np.array(chunk["each"])  # a list takes eight times the memory
            self.chunks[split][first] = {"first": first, **chunk}
        else:
            del self.chunks[split][first]

    def write(self, workers: int) -> list[str]:
        """Writes the missing chunks.

        Returns:
            Location and reason for each image that cannot be decoded; its chunk remains missing.
        """
        broken: list[str] = []
        total = sum(len(encoder.records) for encoder in self.splits.values())
        written = (chunk for chunks in self.chunks.values() for chunk in chunks.values())
        done = sum(len(chunk["each"]) for chunk in written)
        with tqdm(total=total, initial=done, unit=" images", disable=None) as bar:
            for split, encoder in self.splits.items():
                path, N = images_path(self.dst, split, encoder.jpeg), len(encoder.records)
                ranges = (range(first, min(first + CHUNK, N)) for first in range(0, N, CHUNK))
                missing = [
                    interval for interval in ranges if interval.start not in self.chunks[split]
                ]
                path.touch()
                with storage.naming(path), path.open("r+b") as file:
                    self._allocate(file, split)
                    for encoded in in_workers(encoder, missing, workers):
                        broken += encoded.broken
                        if not encoded.broken:
                            self._write_chunk(file, split, encoded)
                        bar.update(len(encoded.chunk["each"]))
        return broken

    def _allocate(self, file: IO[bytes], split: str) -> None:
        """Allocates space for squares; for JPEGs, removes unrecorded data of a killed process."""
        encoder, written = self.splits[split], self.chunks[split].values()
        squares = len(encoder.records) * 3 * encoder.size**2
        if encoder.jpeg:
            file.truncate(max((chunk["offset"] + chunk["bytes"] for chunk in written), default=0))
        elif hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, squares)
        else:
            file.truncate(squares)

    def _write_chunk(self, file: IO[bytes], split: str, encoded: _EncodedChunk) -> None:
        encoder = self.splits[split]
        if encoder.jpeg:
            file.seek(0, os.SEEK_END)
        else:
            file.seek(encoded.chunk["first"] * 3 * encoder.size**2)
        line = {"split": split, **encoded.chunk, "offset": file.tell()}
        file.write(encoded.data.numpy().data)
        file.flush()
        os.fsync(file.fileno())
        self._append(line)
        self._record_chunk(**line)

    def read_back(self) -> None:
        """Verifies that the files contain what was written; raises UserError otherwise."""
        count = 0
        for split, encoder in self.splits.items():
            path, chunks = images_path(self.dst, split, encoder.jpeg), self._in_order(split)
            for k in packed.damaged(path, chunks):
                self._append({"split": split, "first": chunks[k]["first"]})
                count += 1
        if count:
            got = f"different data in {counted(count, 'chunk')} of images"
            fix = "check the disk and repeat the command, which packs them again"
            raise data_error(self.dst, "what was written", got, fix)

    def finish(self, index: Mapping[str, Any]) -> None:
        """Writes the index, which completes the pack."""
        columns, files, chunks = {}, {}, {}
        for split, encoder in self.splits.items():
            written = self._in_order(split)
            columns[split] = _columns(encoder, written)
            files[split] = images_path(self.dst, split, encoder.jpeg).stat().st_size
            names = ("first", "offset", "bytes", "sha256")
            chunks[split] = [{name: chunk[name] for name in names} for chunk in written]
        storage.write(
            self.dst / INDEX, columns, {"pack": {**index, "bytes": files, "chunks": chunks}}
        )

    def _in_order(self, split: str) -> list[Chunk]:
        return [self.chunks[split][first] for first in sorted(self.chunks[split])]


def _columns(encoder: _ChunkEncoder, chunks: Sequence[Chunk]) -> dict[str, Tensor]:
    """Returns the index columns for the images in a split."""
    records = encoder.records
    names = np.ascontiguousarray(records.names).view(np.uint8).reshape(len(records), -1)
    labels = records.labels.astype(np.int64) if records.labels.ndim == 1 else records.labels
    columns = {"names": names, "labels": labels}
    each = np.concatenate([chunk["each"] for chunk in chunks])
    if encoder.jpeg:
        starts = [chunk["offset"] + np.cumsum(chunk["each"]) - chunk["each"] for chunk in chunks]
        columns |= {"sizes": each, "offsets": np.concatenate(starts)}
    else:
        columns |= {"sides": each}
    return {name: torch.from_numpy(column) for name, column in columns.items()}
