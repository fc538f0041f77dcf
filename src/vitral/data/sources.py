"""Where images come from: tables of records with random access, from folders and known sets.

A folder is `train/` and `val/` (or `validation/`, `test/`), or class folders alone, of which a part
is held out. A known set is asked for by name; a folder of the same name as `./name`.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vitral.config import DataConfig, UserError
from vitral.data.sampling import Integers, uniforms

KNOWN_SETS = ("digits", "synthetic", "cifar10", "cifar100", "imagenette")
SUFFIXES = frozenset(b"jpg jpeg png webp bmp gif tif tiff avif".split())
_SYNTHETIC_TRAIN, _SYNTHETIC_VAL = 2560, 512


@dataclass(frozen=True, eq=False)
class Files:
    """Encoded images, one a file."""

    root: Path
    paths: NDArray[np.bytes_]
    """Relative to root, as `os.fsencode` gives them. Shape (N,)."""
    sizes: Integers
    """Bytes of each file. Shape (N,)."""
    labels: Integers
    """Shape (N,)."""

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`. Raises OSError."""
        return (self.root / os.fsdecode(self.paths[i])).read_bytes()

    def where(self, i: int) -> str:
        """The path of image `i`, for messages."""
        return os.fsencode(self.root / os.fsdecode(self.paths[i])).decode(errors="replace")

    def take(self, chosen: NDArray[np.bool_]) -> Files:
        """The images where `chosen`, shape (N,), is true."""
        return Files(self.root, self.paths[chosen], self.sizes[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded images of one size, in memory."""

    images: torch.Tensor
    """Shape (N, 3, H, W), uint8."""
    labels: Integers
    """Shape (N,)."""

    def __len__(self) -> int:
        return len(self.labels)


Records = Files | Pixels


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits with the same classes; a label is a position in `classes`."""

    name: str
    classes: tuple[str, ...]
    train: Records | None
    val: Records | None
    notes: tuple[str, ...] = ()
    """What the user should be told."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over classes, labels, and paths with sizes or pixels; not over the location."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for split, records in (("train", self.train), ("val", self.val)):
            if records is not None:
                digest.update(f"\0\0{split} {len(records)}\0".encode())
                digest.update(np.ascontiguousarray(records.labels, "<i8").data)
            if isinstance(records, Files):
                digest.update(b"\0".join(records.paths.tolist()))
                digest.update(np.ascontiguousarray(records.sizes, "<i8").data)
            elif isinstance(records, Pixels):
                digest.update(str(tuple(records.images.shape)).encode())
                digest.update(records.images.contiguous().numpy().data)
        return digest.hexdigest()


def open_dataset(config: DataConfig, image_size: int, seed: int, *, train: bool = True) -> Dataset:
    """Open the image folder or known set that `config.path` names.

    Args:
        image_size: side of the images of the synthetic set, in pixels.
        seed: chooses the held-out images where there is no validation split.
        train: False where only the validation split is needed; a folder that holds class folders
            itself is then all of it.

    Raises:
        UserError: the folder cannot be used; says why and how to mend it.
    """
    match config.path:
        case "digits":
            return _digits()
        case "synthetic":
            return _synthetic(image_size)
        case "cifar10" | "cifar100":
            return _cifar(config.path)
        case "imagenette":
            return _imagenette()
    try:
        return _open_folder(Path(config.path).expanduser(), config, seed, train)
    except OSError as error:
        place = os.fsdecode(error.filename or config.path)
        raise UserError(f"{place}: cannot be read: {error.strerror}") from error


# ---- Image folders.

SPLITS = (("val", "validation", "test"), ("train",))


def _open_folder(root: Path, config: DataConfig, seed: int, train: bool) -> Dataset:
    _require_folder(root, config.path)
    folders = {entry.name.lower(): entry.name for entry in _entries(root) if entry.is_dir()}
    val = next((folders[name] for name in SPLITS[0] if name in folders), None)
    training = folders.get("train")
    if val is None and training is None:
        return _one_split(root, "", config, seed, train)
    if val is None:
        assert training is not None
        return _one_split(root, training, config, seed, train)
    classes, held_out = _scan(root, val)
    if training is None:
        if train:
            raise UserError(
                f"data: {root}: expected train/ beside {val}/, got none; put the training images "
                "there, a folder for each class"
            )
        return Dataset(root.name, classes, None, held_out)
    known, records = _scan(root, training)
    if known != classes:
        raise UserError(_differing_classes(root, training, known, val, classes))
    return Dataset(root.name, classes, records, held_out)


def _one_split(root: Path, folder: str, config: DataConfig, seed: int, train: bool) -> Dataset:
    """A folder without a validation split: part of each class is held out, drawn by the seed."""
    classes, records = _scan(root, folder)
    if not train and not folder:
        return Dataset(root.name, classes, None, records)
    held = _held_out(records, config.val_fraction, seed)
    if not held.any():
        raise UserError(
            f"data: {root}: expected validation images, got none: no val/ beside the training "
            "images and no class has two of them; add val/, a folder for each class"
        )
    note = (
        f"{root} has no validation split: {held.sum():,} of its {len(held):,} images "
        f"({config.val_fraction:.0%} of each class) are held out, drawn by seed {seed}"
    )
    return Dataset(root.name, classes, records.take(~held), records.take(held), (note,))


def _held_out(records: Files, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which images to hold out: the rounded share of each class, never all of it. Shape (N,)."""
    N = len(records)
    drawn = uniforms(seed, 0, np.arange(N), 1, purpose="held out")[:, 0]
    order = np.lexsort((drawn, records.labels))
    counts = np.bincount(records.labels)
    rank = np.arange(N) - np.repeat(np.cumsum(counts) - counts, counts)
    least = np.where(counts > 1, 1, 0)
    quota = np.minimum(np.maximum(np.rint(fraction * counts), least), np.maximum(counts - 1, 0))
    held = np.zeros(N, bool)
    held[order] = rank < np.repeat(quota, counts)
    return held


def _require_folder(root: Path, asked: str) -> None:
    if root.is_dir():
        return
    near = difflib.get_close_matches(asked, KNOWN_SETS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known sets are {', '.join(KNOWN_SETS)}"
    got = "it is a file" if root.exists() else "there is none"
    raise UserError(f"data: {root}: expected an image folder, got nothing: {got}; {hint}")


def _scan(root: Path, split: str) -> tuple[tuple[str, ...], Files]:
    """Class names and records of the class folders in one split, both in order of name."""
    base = root / split
    entries = sorted(_entries(base), key=lambda entry: os.fsencode(entry.name))
    classes = [entry.name for entry in entries if entry.is_dir()]
    loose = sum(_is_image(entry.name) for entry in entries if entry.is_file())
    if loose and not classes:
        raise UserError(
            f"data: {base}: expected a folder for each class, got {loose} images without any; "
            f"move each image to {base}/<its class>/, with the class names of the other split"
        )
    if not classes:
        raise UserError(f"data: {base}: expected images, a folder for each class; got none")
    paths: list[bytes] = []
    sizes: list[int] = []
    counts = []
    for name in classes:
        found = sorted(_walk(base / name, os.fsencode(f"{split}/{name}" if split else name)))
        if not found:
            raise UserError(
                f"data: {base / name}: expected images of this class, got none; "
                "add some or remove the folder"
            )
        paths += [path for path, _ in found]
        sizes += [size for _, size in found]
        counts.append(len(found))
    if len(classes) < 2:
        raise UserError(f"data: {base}: expected two classes or more, got {classes[0]!r} alone")
    labels = np.repeat(np.arange(len(classes)), counts)
    return tuple(classes), Files(root, np.array(paths), np.array(sizes), labels)


def _walk(folder: Path, prefix: bytes) -> Iterator[tuple[bytes, int]]:
    """Path below the root, and size, of each image in a class folder and the folders in it."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _hidden(entry.name):
                continue
            path = prefix + b"/" + os.fsencode(entry.name)
            if entry.is_dir():
                yield from _walk(folder / entry.name, path)
            elif _is_image(entry.name):
                yield path, entry.stat().st_size


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not _hidden(entry.name)]


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(name: str) -> bool:
    return os.fsencode(name).lower().rpartition(b".")[2] in SUFFIXES


def _differing_classes(
    root: Path, train: str, ours: Sequence[str], val: str, theirs: Sequence[str]
) -> str:
    def some(names: set[str]) -> str:
        shown = ", ".join(sorted(names)[:3])
        return f"{shown}, ... ({len(names)})" if len(names) > 3 else shown or "none"

    missing, extra = set(ours) - set(theirs), set(theirs) - set(ours)
    return (
        f"data: {root}: expected the same classes in {train}/ and {val}/; only in {train}/: "
        f"{some(missing)}; only in {val}/: {some(extra)}; rename or remove folders"
    )


# ---- Known sets.


def _digits() -> Dataset:
    """scikit-learn's handwritten digits (Alpaydin and Kaynak 1998); the last 360 are held out.

    Those are other writers' than the first 1,437, which is harder than a random split.
    """
    from sklearn.datasets import load_digits

    raw, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(np.rint(raw * 255 / 16).astype(np.uint8)).view(-1, 1, 8, 8)
    images, labels = grey.expand(-1, 3, -1, -1).contiguous(), labels.astype(np.int64)
    cut = len(labels) - 360
    train, val = Pixels(images[:cut], labels[:cut]), Pixels(images[cut:], labels[cut:])
    return Dataset("digits", tuple("0123456789"), train, val)


def _synthetic(side: int) -> Dataset:
    """Ten coarse colour patterns under noise: to try things out and to measure, without files."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 3, 4, 4, generator=generator)
    patterns = torch.nn.functional.interpolate(patterns, (side, side), mode="bilinear")

    def split(count: int) -> Pixels:
        images = torch.empty(count, 3, side, side, dtype=torch.uint8)
        images.random_(0, 128, generator=generator)
        labels = torch.arange(count) % 10
        base = (patterns * 127).to(torch.uint8)
        for label in range(10):
            images[label::10] += base[label]
        return Pixels(images, labels.numpy())

    classes = tuple(f"pattern {i}" for i in range(10))
    return Dataset("synthetic", classes, split(_SYNTHETIC_TRAIN), split(_SYNTHETIC_VAL))


def _download_folder() -> Path:
    return Path(os.environ.get("VITRAL_DATA", "~/.cache/vitral/data")).expanduser()


def _unavailable(name: str, archive: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"data: {name} is not in {_download_folder()} and cannot be downloaded ({reason}); "
        f"put {archive} there, or point --data at an image folder"
    )


def _cifar(name: str) -> Dataset:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if name == "cifar10" else CIFAR100
    try:
        splits = [
            kind(str(_download_folder()), train=part, download=True) for part in (True, False)
        ]
    except (OSError, RuntimeError) as error:
        raise _unavailable(name, kind.filename, error) from None
    train, val = (_pixels(split.data, split.targets) for split in splits)
    return Dataset(name, tuple(splits[0].classes), train, val)


def _pixels(images: NDArray[np.uint8], labels: Sequence[int]) -> Pixels:
    """Images (N, H, W, 3), as CIFAR keeps them."""
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Pixels(channels_first, np.asarray(labels, np.int64))


def _imagenette() -> Dataset:
    from torchvision.datasets import Imagenette

    try:
        Imagenette(str(_download_folder()), size="160px", download=True)
    except (OSError, RuntimeError) as error:
        raise _unavailable("imagenette", "imagenette2-160.tgz", error) from None
    folder = _download_folder() / "imagenette2-160"
    return _open_folder(folder, DataConfig(path=str(folder)), seed=0, train=True)
