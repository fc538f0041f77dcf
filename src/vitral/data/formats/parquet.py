"""Parquet as the Hugging Face Hub lays it out: rows of `image: {bytes, path}` and `label`.

Files lie in the folder, in its `data/`, or in a folder for each split, and tell by their names or
their folder's which split they belong to: `data/train-00000-of-00294.parquet`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitral.config import DataConfig
from vitral.data.decode import DecodeError
from vitral.data.imagenet import human_name, wnids
from vitral.data.records import VALIDATION, Dataset, Names, Split, Stamp, combine, stamp
from vitral.data.sampling import Integers
from vitral.errors import data_error, printable

SPLITS = ("train", *VALIDATION)
RECENT = 256 << 20  # bytes of row groups that a process keeps; small sets fit in whole


@dataclass(frozen=True, eq=False)
class Rows:
    """Encoded images, one a row of a few Parquet files.

    A row is read by reading its row group: quick in the order of the files, slow in another. No
    file stays open, so that a process may be forked at any time.
    """

    files: tuple[Path, ...]
    stamps: tuple[Stamp, ...]
    """Of each file when it was opened."""
    footers: tuple[Any, ...]
    """pyarrow's FileMetaData of each file."""
    places: Integers
    """Position in `files`, row group, and row in that of each image. Shape (N, 3)."""
    names: Names
    """Base names of the images' paths, or else their places. Shape (N,)."""
    labels: Integers
    """Shape (N,)."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _recent(self) -> OrderedDict[tuple[int, int], Any]:
        """Columns of row groups by file and number, the last used last."""
        return OrderedDict()

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`. Raises OSError, if its file has changed too.

        Raises:
            DecodeError: the row group is damaged, or the row holds no bytes.
        """
        file, group, row = self.places[i].tolist()
        recent = self._recent
        if (file, group) not in recent:
            recent[file, group] = self._load(file, group)
            while len(recent) > 1 and sum(column.nbytes for column in recent.values()) > RECENT:
                recent.popitem(last=False)
        recent.move_to_end((file, group))
        content = recent[file, group][row].as_py()
        if content is None:
            raise DecodeError("the row holds no bytes of an image")
        return content

    def _load(self, file: int, group: int) -> Any:
        """The encoded images of a row group."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.files[file]
        if stamp(path.stat()) != self.stamps[file]:
            raise FileNotFoundError(f"{path} has changed since it was opened")
        try:
            with pq.ParquetFile(path, metadata=self.footers[file], pre_buffer=False) as opened:
                table = opened.read_row_group(group, ["image.bytes"], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DecodeError(f"row group {group} is damaged: {_line(error)}") from error
        return table.flatten().column(0)

    def where(self, i: int) -> str:
        """File, row group and row of image `i`, for messages."""
        file, group, row = self.places[i].tolist()
        return f"{printable(self.files[file])}: row group {group}, row {row}"

    def take(self, chosen: NDArray[np.bool_]) -> Rows:
        """The images where `chosen`, shape (N,), is true."""
        columns = {name: getattr(self, name)[chosen] for name in ("places", "names", "labels")}
        return dataclasses.replace(self, **columns)

    def identity(self) -> Iterator[bytes]:
        """Names, places, and sizes of the files: those of the images are not known."""
        yield b"\0".join(self.names.tolist())
        yield np.ascontiguousarray(self.places, "<i8").tobytes()
        yield np.array([size for size, _ in self.stamps], "<i8").tobytes()


def matches(root: Path) -> bool:
    """Whether there are Parquet files in `root`, or in one of its split folders."""
    return bool(_find(root))


def open(root: Path, config: DataConfig, seed: int, train: bool) -> Dataset:
    """The data set in the Parquet files of `root`.

    Raises:
        UserError: pyarrow is missing, or the files cannot be used.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        fix = "pip install 'vitral[parquet]'"
        raise data_error(root, "pyarrow, to read Parquet", "none", fix) from None
    splits: dict[str, list[Path]] = {}
    for path in _find(root):
        splits.setdefault(_split_of(path.relative_to(root)), []).append(path)
    if "" in splits and len(splits) > 1:
        expected = f"{', '.join(SPLITS)} in the name of each file"
        raise data_error(splits[""][0], expected, "none of them", "rename or remove it")
    val = next((name for name in VALIDATION if name in splits), None)
    if val is None:
        found = _scan(splits.get("train") or splits[""])
        if not train and "" in splits:
            return combine(root, None, found, config, seed)
        return combine(root, found, None, config, seed)
    held_out = _scan(splits[val])
    if train and "train" not in splits:
        got = f"{splits[val][0].name} alone"
        raise data_error(root, "train-*.parquet", got, "put the training images there")
    known = _scan(splits["train"]) if train else None
    dataset = combine(root, known, held_out, config, seed)
    if val != "test":
        return dataset
    note = f"{dataset.name} has no validation-*.parquet: test is validated on"
    return dataclasses.replace(dataset, notes=(note,))


def _find(root: Path) -> list[Path]:
    """The Parquet files of the data set in a folder."""
    folders = [root, *(root / name for name in ("data", *SPLITS))]
    return [path for folder in folders for path in sorted(folder.glob("[!.]*.parquet"))]


def _split_of(path: Path) -> str:
    """The first word in a path that names a split, or nothing."""
    return next((word for word in re.findall("[a-z]+", str(path).lower()) if word in SPLITS), "")


def _scan(files: Sequence[Path]) -> Split:
    """Classes and rows of one split; only labels and paths are read."""
    stamps = tuple(stamp(path.stat()) for path in files)
    shards = [_read(path) for path in files]
    first = shards[0]
    for path, shard in zip(files, shards, strict=True):
        if (shard.labels.dtype, shard.classes) != (first.labels.dtype, first.classes):
            expected = f"labels and class names as in {files[0].name}"
            raise data_error(path, expected, "others", "remove one or the other")
    values = np.concatenate([shard.labels for shard in shards])
    if not len(values):
        raise data_error(files[0], "images", "no rows", "download it again")
    classes, labels = first.classes, values
    if classes is None:
        found, labels = np.unique(values, return_inverse=True)
        classes = tuple(map(str, found.tolist()))
    elif _are_imagenets(classes):
        classes = wnids()
    places = [np.insert(shard.places, 0, k, axis=1) for k, shard in enumerate(shards)]
    names = np.array([name for shard in shards for name in shard.names])
    if classes == wnids():
        # The Hub calls n01440764_10026.JPEG n01440764_10026_n01440764.JPEG, which sorts otherwise.
        names = np.array([re.sub(rb"_n\d{8}(?=\.)", b"", name) for name in names.tolist()])
    order = np.lexsort((names, labels))
    places, names = np.concatenate(places)[order], names[order]
    if (names == b"").any():
        named = [f"{files[k].name}/{group}/{row}".encode() for k, group, row in places.tolist()]
        names = np.where(names == b"", named, names)
    footers = tuple(shard.footer for shard in shards)
    return classes, Rows(tuple(files), stamps, footers, places, names, labels[order])


def _are_imagenets(names: tuple[str, ...]) -> bool:
    """Whether these are ImageNet-1K's names; a few are spelt otherwise, as the Hub's `crane2`."""
    if len(names) != len(wnids()):
        return False
    pairs = zip(names, map(human_name, wnids()), strict=True)
    return sum(name == known for name, known in pairs) >= 990


@dataclass(frozen=True)
class _Shard:
    """What is kept of one file."""

    footer: Any
    classes: tuple[str, ...] | None
    """What the labels count, where the file says it."""
    places: Integers
    """Row group and row in it of each image. Shape (n, 2)."""
    labels: NDArray[Any]
    """Integers or strings. Shape (n,)."""
    names: list[bytes]
    """Base name of each image's path, or nothing."""


def _read(path: Path) -> _Shard:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as opened:
            schema, footer = opened.schema_arrow, opened.metadata
            column = _label_column(path, schema)
            table = opened.read([column, "image.path"], use_threads=False).flatten()
    except (pa.ArrowException, OSError) as error:
        raise data_error(path, "a Parquet file", _line(error), "download it again") from error
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = described.get("info", {}).get("features", {}).get(column, {})
    classes = tuple(feature["names"]) if "names" in feature else None
    labels = _labels(path, table[column], classes)
    counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    rows = np.concatenate([np.arange(0), *map(np.arange, counts)])
    places = np.stack([np.repeat(np.arange(len(counts)), counts), rows], axis=1)
    paths = table["image.path"].to_pylist() if "image.path" in table.column_names else []
    names = [(path or "").rpartition("/")[2].encode() for path in paths or [None] * len(labels)]
    return _Shard(footer, classes, places, labels, names)


def _label_column(path: Path, schema: Any) -> str:
    """The name of the labels' column."""
    import pyarrow.types as types

    found = {field.name: field.type for field in schema}
    column = "label" if "label" in found else "labels"
    image, label = found.get("image"), found.get(column)
    if (
        image is not None
        and label is not None
        and types.is_struct(image)
        and image.get_field_index("bytes") >= 0
        and (types.is_integer(label) or types.is_string(label) or types.is_large_string(label))
    ):
        return column
    got = ", ".join(f"{name}: {kind}" for name, kind in found.items())
    expected = "columns image: struct<bytes: binary, path: string> and label: int64 or string"
    raise data_error(path, expected, got, "rename or convert them")


def _labels(path: Path, column: Any, classes: tuple[str, ...] | None) -> NDArray[Any]:
    """The labels, integers or strings. Shape (n,)."""
    if column.null_count:
        raise data_error(path, "a label in each row", f"{column.null_count} without", "remove them")
    labels = column.to_numpy()
    if len(labels) and labels.dtype != object:
        most = len(classes) - 1 if classes else labels.max()
        wrong = labels[(labels < 0) | (labels > most)]
        if len(wrong):
            fix = "if it is a test split without labels, which have -1, move it elsewhere"
            raise data_error(path, f"labels from 0 to {most}", str(wrong[0]), fix)
    return labels


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
