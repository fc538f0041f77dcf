"""Packs: the images of a dataset in one file per split, as squares of one size or as small JPEGs.

A pack is a folder with SPLIT.pixels, uint8 squares of shape (N, 3, P, P), or SPLIT.jpegs, JPEGs one
after another. Its index/, which `packing` writes last, contains labels, names, original sizes, and
the SHA-256 of each chunk of images. A folder with progress.jsonl instead is an unfinished pack.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vitral import storage
from vitral.config import DataConfig
from vitral.data.records import Packed, Spans, stamp
from vitral.data.splits import Dataset, class_name
from vitral.errors import data_error, printable
from vitral.files import require_regular

VERSION = 1
INDEX = "index"
PROGRESS = "progress.jsonl"
Chunk = dict[str, Any]
"""Images starting at `first`: `bytes` bytes of the split's file, starting at `offset`, and their
`sha256`."""


def finished(root: Path) -> bool:
    """Returns whether `root` is a complete pack."""
    return (root / INDEX / "pack.json").is_file()


def matches(root: Path) -> bool:
    """Returns whether `root` is a pack, complete or not."""
    return finished(root) or (root / PROGRESS).is_file()


def open(root: Path, _: DataConfig, __: int, train: bool) -> Dataset:
    """Opens the dataset in a pack; the training split only if `train` is True.

    Raises:
        UserError: if the pack is unfinished, incomplete, altered, or of a different version.
        OSError: if a file is missing.
    """
    index = read_index(root)
    val = _open_split(root, index, "val")
    training = _open_split(root, index, "train") if train else None
    return Dataset(
        printable(root.resolve().name), tuple(map(class_name, index["classes"])), training, val
    )


def verify(root: Path) -> list[str]:
    """Reads all images of a pack; returns a line for each chunk that has changed since packing.

    Raises:
        UserError, OSError: as for `open`.
    """
    index, lines = read_index(root), []
    for split, chunks in index["chunks"].items():
        path = images_path(root, split, index["jpeg"])
        ends = [*(chunk["first"] for chunk in chunks[1:]), index["images"][split]]
        for k in damaged(path, chunks):
            images = f"images {chunks[k]['first']:,} to {ends[k] - 1:,}"
            lines.append(f"{printable(path)}: {images} differ from what was written")
    return lines


def images_path(root: Path, split: str, jpeg: bool) -> Path:
    """Returns the path of the file with the images of a split."""
    return root / f"{split}.{'jpegs' if jpeg else 'pixels'}"


def damaged(path: Path, chunks: Sequence[Chunk]) -> list[int]:
    """Returns the indices of the chunks that differ from what was written to the file."""
    wrong = []
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # otherwise recent data is read from the page cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for k, chunk in enumerate(tqdm(chunks, f"verifying {path.name}", disable=None)):
            try:
                data = os.pread(file.fileno(), chunk["bytes"], chunk["offset"])
            except OSError:  # a bad sector
                data = b""
            if hashlib.sha256(data).hexdigest() != chunk["sha256"]:
                wrong.append(k)
    return wrong


def read_index(root: Path) -> dict[str, Any]:
    """Returns the settings, classes and chunks of a finished pack.

    Raises:
        UserError: if the pack is unfinished, altered, or of a different version.
    """
    if not finished(root):
        fix = "to finish it, repeat the `vitral data pack` command that started it"
        raise data_error(root, "a finished pack", "an unfinished one", fix)
    try:
        index = storage.read_json(root / INDEX, "pack.json")
        version = index.get("version")
        if version != VERSION:
            fix = "use the version of vitral that packed it, or pack it again"
            raise data_error(root, f"a pack of version {VERSION}", f"version {version}", fix)
        storage.verify(root / INDEX)
    except storage.CorruptError as error:
        raise data_error(root, "the pack as it was written", str(error), "copy it again") from None
    return index


def _open_split(root: Path, index: dict[str, Any], split: str) -> Packed | Spans:
    path = images_path(root, split, index["jpeg"])
    status, chunks = require_regular(path.stat(), path), index["chunks"][split]
    expected = index["bytes"][split]
    if status.st_size != expected:
        got = f"{status.st_size:,}"
        raise data_error(path, f"{expected:,} bytes", got, "copy the pack again, or pack it again")
    table = {key: t.numpy() for key, t in storage.read_tensors(root / INDEX, split).items()}
    names, labels = table["names"].view(f"S{table['names'].shape[1]}")[:, 0], table["labels"]
    if index["jpeg"]:
        columns = (np.zeros(len(labels), np.int64), table["offsets"], table["sizes"], names, labels)
        return Spans((path,), (stamp(path, status),), *columns)
    shape = (len(labels), 3, index["size"], index["size"])
    digest = hashlib.sha256("".join(chunk["sha256"] for chunk in chunks).encode()).hexdigest()
    return Packed(
        np.memmap(path, np.uint8, "r", shape=shape),
        table["sides"],
        names,
        labels,
        digest,
        np.arange(len(labels)),
    )
