"""Tables of images with random access, and the data set that two of them make.

A table is encoded (files, byte ranges of archives, rows of Parquet), packed (squares in a file that
is mapped into memory) or pixels in memory. Record i is image i of a split, whatever holds it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, Self
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from vitral.config import DataConfig
from vitral.data.sampling import Integers, held_out
from vitral.data.skipped import kinds, note
from vitral.errors import counted, data_error, first_few, printable
from vitral.files import MAX_IMAGE, descriptor_of, read_regular, require_regular
from vitral.machine import max_open_files

Names = NDArray[np.bytes_]
VALIDATION = ("val", "validation", "valid", "dev", "test")  # the first that is there is taken


def max_archives() -> int:
    """How many archives a process keeps open: few where the limit on open files is low."""
    return max(1, min(64, max_open_files() // 8))


Stamp = tuple[int, int]
"""Size of a file in bytes, and its time of change in nanoseconds."""


def stamp(path: Path, status: os.stat_result | None = None) -> Stamp:
    """The stamp of a regular file. Raises OSError, for another file too."""
    status = require_regular(path.stat() if status is None else status, path)
    return status.st_size, status.st_mtime_ns


class Encoded(Protocol):
    """Encoded images, to be decoded one at a time."""

    @property
    def labels(self) -> Integers:
        """Positions in the data set's classes. Shape (N,)."""
        ...

    @property
    def names(self) -> Names:
        """What each image is called, as bytes of a path; labels and names fix the order. (N,)."""
        ...

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`. Raises OSError."""
        ...

    def where(self, i: int) -> str:
        """The place of image `i`, for messages."""
        ...

    def take(self, chosen: NDArray[np.bool_]) -> Self:
        """The images where `chosen`, shape (N,), is true."""
        ...

    def identity(self) -> Iterator[bytes]:
        """What tells these images from others, but for labels; not where they lie."""
        ...


@dataclass(frozen=True, eq=False)
class Files:
    """Encoded images, one a file."""

    root: Path
    names: Names
    """Paths relative to root, as `os.fsencode` gives them. Shape (N,)."""
    sizes: Integers
    """Bytes of each file. Shape (N,)."""
    labels: Integers
    """Shape (N,)."""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`. Raises OSError."""
        return read_regular(self.root / os.fsdecode(self.names[i]))

    def where(self, i: int) -> str:
        """The path of image `i`, for messages."""
        return printable(self.root / os.fsdecode(self.names[i]))

    def take(self, chosen: NDArray[np.bool_]) -> Files:
        """The images where `chosen`, shape (N,), is true."""
        return Files(self.root, self.names[chosen], self.sizes[chosen], self.labels[chosen])

    def identity(self) -> Iterator[bytes]:
        """Names and sizes."""
        return _names_and_sizes(self.names, self.sizes)


@dataclass(frozen=True, eq=False)
class Spans:
    """Encoded images, each a range of bytes in one of a few archives."""

    archives: tuple[Path, ...]
    stamps: tuple[Stamp, ...]
    """Of each archive when it was indexed."""
    archive: Integers
    """Position in `archives` of each image. Shape (N,)."""
    offsets: Integers
    """First byte of each image. Shape (N,)."""
    sizes: Integers
    """Bytes of each image. Shape (N,)."""
    names: Names
    """Names inside the archives. Shape (N,)."""
    labels: Integers
    """Shape (N,)."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _open(self) -> OrderedDict[int, int]:
        """Descriptors of archives, the last used last; `pread` shares no position."""
        return OrderedDict()

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`. Raises OSError, if its archive has changed too."""
        which = int(self.archive[i])
        if which not in self._open:
            path = self.archives[which]
            if len(self._open) >= max_archives():
                os.close(self._open.popitem(last=False)[1])
            descriptor = descriptor_of(path)
            if stamp(path, os.fstat(descriptor)) != self.stamps[which]:
                os.close(descriptor)
                raise FileNotFoundError(f"{path} has changed since it was opened")
            self._open[which] = descriptor
        self._open.move_to_end(which)
        if self.sizes[i] > MAX_IMAGE:
            raise OSError(errno.EFBIG, f"more than {MAX_IMAGE:,} bytes", self.where(i))
        return os.pread(self._open[which], int(self.sizes[i]), int(self.offsets[i]))

    def where(self, i: int) -> str:
        """Archive and name of image `i`, for messages."""
        archive = printable(self.archives[int(self.archive[i])])
        return f"{archive}: {printable(self.names[i])}"

    def take(self, chosen: NDArray[np.bool_]) -> Spans:
        """The images where `chosen`, shape (N,), is true."""
        columns = ("archive", "offsets", "sizes", "names", "labels")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})

    def identity(self) -> Iterator[bytes]:
        """Names and sizes."""
        return _names_and_sizes(self.names, self.sizes)


def _names_and_sizes(names: Names, sizes: Integers) -> Iterator[bytes]:
    yield b"\0".join(names.tolist())
    yield np.ascontiguousarray(sizes, "<i8").tobytes()


@dataclass(frozen=True, eq=False)
class Packed:
    """Images squashed to squares of one size, in a file that is mapped into memory."""

    images: NDArray[np.uint8]
    """Shape (all, 3, P, P)."""
    sides: Integers
    """Height and width of each image before it was squashed. Shape (N, 2)."""
    names: Names
    """What each image was called where it came from. Shape (N,)."""
    labels: Integers
    """Shape (N,)."""
    digest: str
    """SHA-256 of the pixels, as the pack's manifest has it."""
    rows: Integers
    """Which of `images` each one is. Shape (N,)."""

    def __len__(self) -> int:
        return len(self.labels)

    def squares(self, indices: Integers) -> NDArray[np.uint8]:
        """Copies of some of the squares, shape (n, 3, P, P)."""
        return self.images[self.rows[indices]]

    def take(self, chosen: NDArray[np.bool_]) -> Packed:
        """The images where `chosen`, shape (N,), is true."""
        columns = ("sides", "names", "labels", "rows")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})

    def identity(self) -> Iterator[bytes]:
        """The digest of all pixels, which of them these are if not all, and the original sizes."""
        yield self.digest.encode()
        if len(self) < len(self.images):
            yield np.ascontiguousarray(self.rows, "<i8").tobytes()
        yield np.ascontiguousarray(self.sides, "<i8").tobytes()


@dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded images of one size, in memory."""

    images: torch.Tensor
    """Shape (N, 3, H, W), uint8."""
    labels: Integers
    """Shape (N,)."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: NDArray[np.bool_]) -> Pixels:
        """The images where `chosen`, shape (N,), is true."""
        return Pixels(self.images[torch.from_numpy(chosen)], self.labels[chosen])

    def identity(self) -> Iterator[bytes]:
        """The pixels."""
        yield str(tuple(self.images.shape)).encode()
        yield self.images.contiguous().numpy().tobytes()


Records = Encoded | Packed | Pixels
Split = tuple[tuple[str, ...], Encoded]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits with the same classes; a label is a position in `classes`."""

    name: str
    classes: tuple[str, ...]
    train: Records | None
    val: Records | None
    held_out: bool = False
    """Whether `val` is a part of the training images."""
    choices: tuple[str, ...] = ()
    """How the splits were chosen where the user may have meant others."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Number of files that are not used, by kind."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should be told."""
        return (*self.choices, *note(self.name, self.skipped))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over classes, labels, and what identifies the images; not over the location."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for split, records in (("train", self.train), ("val", self.val)):
            if records is not None:
                digest.update(f"\0\0{split} {len(records)}\0".encode())
                digest.update(np.ascontiguousarray(records.labels, "<i8").data)
                for part in records.identity():
                    digest.update(part)
        return digest.hexdigest()


def merge_splits(
    root: Path,
    training: Split | None,
    val: Split | None,
    config: DataConfig,
    seed: int,
    skipped: Mapping[str, int] | None = None,
) -> Dataset:
    """The data set of the splits found in `root`; without `val` a part of `training` is held out.

    `training` is None where only the validation split is needed. Class names become those of
    `class_name`.

    Raises:
        UserError: the classes differ, two become one name, or nothing can be held out.
    """
    name, skipped = printable(root.resolve().name), skipped or {}
    training, val = (_with_class_names(root, split) for split in (training, val))
    if val is None:
        assert training is not None
        why = f"{name} has no validation split"
        dataset = Dataset(name, *training, None, skipped=skipped)
        return hold_out(dataset, root, config.val_fraction, seed, why)
    classes, held_out = val
    if training is None:
        return Dataset(name, classes, None, held_out, skipped=skipped)
    known, records = training
    if known != classes:
        missing, extra = sorted({*known} - {*classes}), sorted({*classes} - {*known})
        got = (
            f"only in the training split: {first_few(missing)}, "
            f"only in validation: {first_few(extra)}"
        )
        expected = "the same classes in both splits"
        raise data_error(root, expected, got, "rename or remove them")
    return Dataset(name, classes, records, held_out, skipped=skipped)


def class_name(name: str) -> str:
    """The name of a class as it is compared, stored and printed.

    As Unicode composes it, because file systems disagree on how to spell an accented letter, and
    without control characters, which terminals act on.
    """
    return printable(unicodedata.normalize("NFC", name))


def _with_class_names(root: Path, split: Split | None) -> Split | None:
    """A split with the names of `class_name`. Raises UserError if two become one."""
    if split is None:
        return None
    spellings: dict[str, list[str]] = {}
    for name in split[0]:
        spellings.setdefault(class_name(name), []).append(name)
    for several in spellings.values():
        if len(several) > 1:
            got = f"{' and '.join(map(ascii, several))}, which are the same to Unicode"
            raise data_error(root, "each class once", got, "rename or merge them")
    return tuple(spellings), split[1]


def hold_out(
    dataset: Dataset, place: os.PathLike[str] | str, fraction: float, seed: int, why: str
) -> Dataset:
    """The data set, validated on a part of its training images.

    Args:
        place: where it lies, for messages.
        fraction: of each class.
        why: the reason, for the user.

    Raises:
        UserError: no class has two images.
    """
    records = dataset.train
    assert records is not None
    held = _draw_held_out(records, fraction, seed)
    if not held.any():
        got = f"none: {why}, and no class has two images to hold one out"
        got += f"; skipped: {kinds(dataset.skipped)}" if dataset.skipped else ""
        raise data_error(place, "validation images", got, "add images")
    choice = (
        f"{why}: {held.sum():,} of {counted(len(held), 'training image')} ({fraction:.0%} of each "
        f"class) {'is' if held.sum() == 1 else 'are'} held out, drawn by seed {seed}"
    )
    train, val = records.take(~held), records.take(held)
    return replace(dataset, train=train, val=val, held_out=True, choices=(choice,))


def _draw_held_out(records: Records, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which images to hold out. (N,)."""
    if isinstance(records, Pixels):
        keys = np.arange(len(records))
    else:  # by base names, which an archive has in common with the folder that it was made of
        keys = np.array([crc32(path.rpartition(b"/")[2]) for path in records.names.tolist()])
    return held_out(keys, records.labels, fraction, seed, "held out")
