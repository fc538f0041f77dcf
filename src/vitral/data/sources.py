"""Where images come from: tables of records with random access, from folders and known sets.

A folder is `train/` and `val/` (or `validation/`, `test/`), or class folders alone, of which a part
is held out. A known set is asked for by name; a folder of the same name as `./name`.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from vitral.config import DataConfig, UserError
from vitral.data.sampling import Integers, hashed

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

    @property
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
            return _imagenette(config, seed, train)
    try:
        return _open_folder(Path(config.path).expanduser(), config, seed, train)
    except OSError as error:
        place = os.fsdecode(error.filename or config.path)
        raise UserError(f"{place}: cannot be read: {error.strerror}") from error
