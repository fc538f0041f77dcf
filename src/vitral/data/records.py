"""Random-access tables of images.

A table is encoded (files, byte ranges of archives, or rows of Parquet), packed (squares in a
memory-mapped file), or pixels in memory. In each of them, record i is image i of a split.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from vitral.data.sampling import Integers, Labels
from vitral.errors import printable
from vitral.files import MAX_IMAGE, descriptor_of, read_regular, require_regular
from vitral.machine import max_open_files

Names = NDArray[np.bytes_]
CHUNK = 1 << 16  # names that are converted at a time, which takes several times their memory


def max_archives() -> int:
    """Returns how many archives a process keeps open; fewer if the limit on open files is low."""
    return max(1, min(64, max_open_files() // 8))


Stamp = tuple[int, int]
"""Size of a file in bytes, and its modification time in nanoseconds."""


def stamp(path: Path, status: os.stat_result | None = None) -> Stamp:
    """Returns the stamp of a file. Raises OSError, including for files that are not regular."""
    status = require_regular(path.stat() if status is None else status, path)
    return status.st_size, status.st_mtime_ns


class Encoded(Protocol):
    """Encoded images, which are decoded one at a time."""

    @property
    def labels(self) -> Labels:
        """Indices into the dataset's classes, shape (N,), or 0 and 1, shape (N, classes)."""
        ...

    @property
    def names(self) -> Names:
        """Names of the images, as bytes of paths. Shape (N,).

        Images in files and archives are ordered by label and name, or by name if they can have
        several labels.
        """
        ...

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """Returns the encoded bytes of image `i`. Raises OSError."""
        ...

    def where(self, i: int) -> str:
        """Returns the location of image `i`, for messages."""
        ...

    def take(self, chosen: NDArray[np.bool_]) -> Self:
        """Returns the images where `chosen`, shape (N,), is true."""
        ...

    def identity(self) -> Iterator[bytes]:
        """Yields data that identifies these images, without labels and location."""
        ...


@dataclass(frozen=True, eq=False)
class Files:
    """Encoded images, one per file."""

    root: Path
    names: Names
    """Paths relative to `root`, as returned by `os.fsencode`. Shape (N,)."""
    sizes: Integers
    """Size of each file in bytes. Shape (N,)."""
    labels: Labels
    """Shape (N,) or (N, classes)."""
    groups: Integers | None = None
    """Hash of the name of each image's group, if splits must not divide groups. Shape (N,)."""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """Returns the encoded bytes of image `i`. Raises OSError."""
        return read_regular(self.root / os.fsdecode(self.names[i]))

    def where(self, i: int) -> str:
        """Returns the path of image `i`, for messages."""
        return printable(self.root / os.fsdecode(self.names[i]))

    def take(self, chosen: NDArray[np.bool_]) -> Files:
        """Returns the images where `chosen`, shape (N,), is true."""
        groups = None if self.groups is None else self.groups[chosen]
        required = self.names[chosen], self.sizes[chosen], self.labels[chosen]
        return Files(self.root, *required, groups)

    def identity(self) -> Iterator[bytes]:
        """Yields the names and sizes."""
        return _names_and_sizes(self.names, self.sizes)


@dataclass(frozen=True, eq=False)
class Spans:
    """Encoded images, each a range of bytes in an archive."""

    archives: tuple[Path, ...]
    stamps: tuple[Stamp, ...]
    """Stamp of each archive when it was indexed."""
    archive: Integers
    """Index into `archives` for each image. Shape (N,)."""
    offsets: Integers
    """First byte of each image. Shape (N,)."""
    sizes: Integers
    """Size of each image in bytes. Shape (N,)."""
    names: Names
    """Names inside the archives. Shape (N,)."""
    labels: Labels
    """Shape (N,) or (N, classes)."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _open(self) -> OrderedDict[int, int]:
        """Descriptors of archives, most recently used last; `pread` does not move a position."""
        return OrderedDict()

    def read(self, i: int) -> bytes:
        """Returns the bytes of image `i`. Raises OSError, including if the archive has changed."""
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
        """Returns the archive and name of image `i`, for messages."""
        archive = printable(self.archives[int(self.archive[i])])
        return f"{archive}: {printable(self.names[i])}"

    def take(self, chosen: NDArray[np.bool_]) -> Spans:
        """Returns the images where `chosen`, shape (N,), is true."""
        columns = ("archive", "offsets", "sizes", "names", "labels")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})

    def identity(self) -> Iterator[bytes]:
        """Yields the names and sizes."""
        return _names_and_sizes(self.names, self.sizes)


def _names_and_sizes(names: Names, sizes: Integers) -> Iterator[bytes]:
    for first in range(0, len(names), CHUNK):
        yield (b"\0" if first else b"") + b"\0".join(names[first : first + CHUNK].tolist())
    yield np.ascontiguousarray(sizes, "<i8").tobytes()


@dataclass(frozen=True, eq=False)
class Packed:
    """Images squashed to squares of one size, in a memory-mapped file."""

    images: NDArray[np.uint8]
    """Shape (all, 3, P, P)."""
    sides: Integers
    """Height and width of each image before it was squashed. Shape (N, 2)."""
    names: Names
    """Names of the images in the source of the pack. Shape (N,)."""
    labels: Labels
    """Shape (N,) or (N, classes)."""
    digest: str
    """SHA-256 over the SHA-256 of all chunks in the pack's index."""
    rows: Integers
    """Index into `images` for each image. Shape (N,)."""

    def __len__(self) -> int:
        return len(self.labels)

    def squares(self, indices: Integers) -> NDArray[np.uint8]:
        """Returns copies of some of the squares, shape (n, 3, P, P)."""
        return self.images[self.rows[indices]]

    def take(self, chosen: NDArray[np.bool_]) -> Packed:
        """Returns the images where `chosen`, shape (N,), is true."""
        columns = ("sides", "names", "labels", "rows")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})

    def identity(self) -> Iterator[bytes]:
        """Yields the digest of all pixels, the rows of a subset, and the original sizes."""
        yield self.digest.encode()
        if len(self) < len(self.images):
            yield np.ascontiguousarray(self.rows, "<i8").tobytes()
        yield np.ascontiguousarray(self.sides, "<i8").tobytes()


@dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded images of one size, in memory."""

    images: torch.Tensor
    """Shape (N, 3, H, W), uint8."""
    labels: Labels
    """Shape (N,) or (N, classes)."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: NDArray[np.bool_]) -> Pixels:
        """Returns the images where `chosen`, shape (N,), is true."""
        return Pixels(self.images[torch.from_numpy(chosen)], self.labels[chosen])

    def identity(self) -> Iterator[bytes]:
        """Yields the shape and values of the pixels."""
        yield str(tuple(self.images.shape)).encode()
        yield self.images.contiguous().numpy().tobytes()


Records = Encoded | Packed | Pixels


def image_path(records: Records, i: int) -> str:
    """Returns the path of image `i` for tables: absolute for a file, so that it can be opened."""
    if isinstance(records, Files):
        return os.fsdecode(os.path.join(os.fsencode(records.root.absolute()), records.names[i]))  # noqa: PTH118
    if isinstance(records, Pixels):
        return f"image {i}"
    return os.fsdecode(records.names[i]) if isinstance(records, Packed) else records.where(i)


def label_of(records: Records, classes: Sequence[str], i: int) -> str:
    """Returns the class of image `i`; for several or none, their names separated by commas."""
    label = records.labels[i]
    return ", ".join(classes[int(c)] for c in (np.flatnonzero(label) if label.ndim else [label]))


def groups_of(records: Records) -> Integers | None:
    """Returns the hash of each image's group, shape (N,); None if there are no groups."""
    return records.groups if isinstance(records, Files) else None
