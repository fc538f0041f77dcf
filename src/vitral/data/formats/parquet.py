"""Parquet files as on the Hugging Face Hub: each row has an image, `{bytes, path}`, and a label.

Files are in the folder itself, in its `data/`, or in a folder per split. The names of files or
folders determine the split: `data/train-00000-of-00294.parquet`.
"""

from __future__ import annotations

import dataclasses
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
from vitral.data.archives import REDOWNLOAD
from vitral.data.decode import DecodeError
from vitral.data.imagenet import human_name, wnids
from vitral.data.objects import IMAGES, LABELS
from vitral.data.records import Names, Stamp, stamp
from vitral.data.sampling import Integers
from vitral.data.splits import VALIDATION, Dataset, Split, merge_splits
from vitral.documents import parse_json
from vitral.errors import counted, data_error, printable

SPLITS = ("train", *VALIDATION)
MAX_CACHE_BYTES = 256 << 20  # row groups cached per process; small datasets fit completely


@dataclass(frozen=True, eq=False)
class Rows:
    """Encoded images in rows of Parquet files, one image per row.

    Reading a row reads its row group, which is fast in file order and slow in any other order.
    Files are not kept open, so that a process can be forked at any time.
    """

    files: tuple[Path, ...]
    stamps: tuple[Stamp, ...]
    """Stamp of each file when it was opened."""
    footers: tuple[Any, ...]
    """pyarrow's FileMetaData of each file."""
    column: str
    """Path of the column with the encoded images."""
    places: Integers
    """For each image: index into `files`, row group, and row in the group. Shape (N, 3)."""
    names: Names
    """Base names of the images' paths, or their locations if there are none. Shape (N,)."""
    labels: Integers
    """Shape (N,)."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _cache(self) -> OrderedDict[tuple[int, int], Any]:
        """Columns of row groups by file and group, the most recently used last."""
        return OrderedDict()

    def read(self, i: int) -> bytes:
        """Returns the encoded bytes of image `i`.

        Raises:
            OSError: if the file cannot be read or has changed.
            DecodeError: if the row group is damaged, or the row contains no bytes.
        """
        file, group, row = self.places[i].tolist()
        recent = self._cache
        if (file, group) not in recent:
            recent[file, group] = self._load(file, group)
            while (
                len(recent) > 1
                and sum(column.nbytes for column in recent.values()) > MAX_CACHE_BYTES
            ):
                recent.popitem(last=False)
        recent.move_to_end((file, group))
        content = recent[file, group][row].as_py()
        if content is None:
            raise DecodeError("the row contains no image")
        return content

    def _load(self, file: int, group: int) -> Any:
        """Reads the encoded images of a row group."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.files[file]
        if stamp(path) != self.stamps[file]:
            raise FileNotFoundError(f"{path} has changed since it was opened")
        try:
            with pq.ParquetFile(path, metadata=self.footers[file], pre_buffer=False) as opened:
                table = opened.read_row_group(group, [self.column], use_threads=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DecodeError(f"row group {group} is damaged: {_line(error)}") from error
        return table.flatten().column(0)

    def where(self, i: int) -> str:
        """Returns the file, row group and row of image `i`, for messages."""
        file, group, row = self.places[i].tolist()
        return f"{printable(self.files[file])}: row group {group}, row {row}"

    def take(self, chosen: NDArray[np.bool_]) -> Rows:
        """Returns the images where `chosen`, shape (N,), is true."""
        columns = {name: getattr(self, name)[chosen] for name in ("places", "names", "labels")}
        return dataclasses.replace(self, **columns)

    def identity(self) -> Iterator[bytes]:
        """Yields names, locations, and file sizes; the sizes of the images are not known."""
        yield b"\0".join(self.names.tolist())
        yield np.ascontiguousarray(self.places, "<i8").tobytes()
        yield np.array([size for size, _ in self.stamps], "<i8").tobytes()


def matches(root: Path) -> bool:
    """Returns whether `root` is a Parquet file with images, or contains such files, also in its
    split folders.
    """
    return _may_hold_images(root) if root.is_file() else bool(_find(root))


def open(root: Path, config: DataConfig, seed: int, train: bool) -> Dataset:
    """Opens the dataset in the Parquet files of `root`.

    Raises:
        UserError: if pyarrow is missing, or the files cannot be used.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        fix = "run `pip install 'vitral[parquet]'`"
        raise data_error(root, "the package pyarrow to read Parquet files", "none", fix) from None
    splits: dict[str, list[Path]] = {}
    for path in _find(root):
        splits.setdefault(_split_of(path.relative_to(root)), []).append(path)
    if "" in splits and len(splits) > 1:
        expected = f"{', '.join(SPLITS)} in the name of each file"
        raise data_error(splits[""][0], expected, "none of these", "rename or remove it")
    val = next((name for name in VALIDATION if name in splits), None)
    if val is None:
        found = _scan(splits.get("train") or splits[""], config)
        if not train and "" in splits:
            return merge_splits(root, None, found, config, seed)
        return merge_splits(root, found, None, config, seed)
    held_out = _scan(splits[val], config)
    if train and "train" not in splits:
        got = f"only {splits[val][0].name}"
        raise data_error(root, "train-*.parquet", got, "put the training images there")
    known = _scan(splits["train"], config) if train else None
    dataset = merge_splits(root, known, held_out, config, seed)
    if val != "test":
        return dataset
    choice = f"{dataset.name} has no validation-*.parquet: using test for validation"
    return dataclasses.replace(dataset, choices=(choice,))


def _may_hold_images(path: Path) -> bool:
    """Whether a file has a column of images; True for a Parquet file that cannot be read."""
    if path.suffix.lower() != ".parquet":
        return False
    try:
        import pyarrow.parquet as pq

        return any(_holds_images(field.type) for field in pq.read_schema(path))
    except (ImportError, OSError, ValueError):  # `open` raises the error
        return True


def _find(root: Path) -> list[Path]:
    """Returns the Parquet files of the dataset in a folder, or the file itself."""
    if root.is_file():
        return [root]
    folders = [root, *(root / name for name in ("data", *SPLITS))]
    return [path for folder in folders for path in sorted(folder.glob("[!.]*.parquet"))]


def _split_of(path: Path) -> str:
    """Returns the first word in a path that names a split, or an empty string."""
    return next((word for word in re.findall("[a-z]+", str(path).lower()) if word in SPLITS), "")


def _scan(files: Sequence[Path], config: DataConfig) -> Split:
    """Reads the classes and rows of one split; only labels and paths are read."""
    stamps = tuple(stamp(path) for path in files)
    shards = [_read(path, config) for path in files]
    first = shards[0]
    for path, shard in zip(files, shards, strict=True):
        if shard.kind != first.kind:
            expected = f"the same columns, labels and class names as in {files[0].name}"
            raise data_error(path, expected, "different ones", "remove one of the files")
    values = np.concatenate([shard.labels for shard in shards])
    if not len(values):
        raise data_error(files[0], "images", "no rows", "download it again")
    classes, labels = first.classes, values
    if classes is None:
        found, labels = np.unique(values, return_inverse=True)
        classes = tuple(map(str, found.tolist()))
    elif _is_imagenet(classes):
        classes = wnids()
    places = [np.insert(shard.places, 0, k, axis=1) for k, shard in enumerate(shards)]
    names = np.array([name for shard in shards for name in shard.names])
    if classes == wnids():
        # On the Hub, n01440764_10026.JPEG is named n01440764_10026_n01440764.JPEG, which sorts
        # differently.
        names = np.array([re.sub(rb"_n\d{8}(?=\.)", b"", name) for name in names.tolist()])
    order = np.lexsort((names, labels))
    places, names = np.concatenate(places)[order], names[order]
    if (names == b"").any():
        named = [f"{files[k].name}/{group}/{row}".encode() for k, group, row in places.tolist()]
        names = np.where(names == b"", named, names)
    footers = tuple(shard.footer for shard in shards)
    column = first.column
    return classes, Rows(tuple(files), stamps, footers, column, places, names, labels[order])


def _is_imagenet(names: tuple[str, ...]) -> bool:
    """Returns whether these are ImageNet-1K's names; the Hub changes some, such as `crane2`."""
    if len(names) != len(wnids()):
        return False
    pairs = zip(names, map(human_name, wnids()), strict=True)
    return sum(name == known for name, known in pairs) >= 990


@dataclass(frozen=True)
class _Shard:
    """Contents of one file, except the images."""

    footer: Any
    column: str
    """Path of the column with the encoded images."""
    classes: tuple[str, ...] | None
    """Class names, if the file lists them."""
    places: Integers
    """For each image: row group, and row in the group. Shape (n, 2)."""
    labels: NDArray[Any]
    """Integers or strings. Shape (n,)."""
    names: list[bytes]
    """Base name of each image's path; empty if there is none."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """Properties that must be the same in all files of a split."""
        return self.column, self.labels.dtype, self.classes


def _read(path: Path, config: DataConfig) -> _Shard:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as opened:
            schema, footer = opened.schema_arrow, opened.metadata
            image, label = _columns(path, schema, config)
            table = opened.read([label, f"{image}.path"], use_threads=False).flatten()
            classes = _described_classes(path, schema, label)
            labels = _labels(path, table[label], classes)
            known = f"{image}.path" in table.column_names
            paths = table[f"{image}.path"].to_pylist() if known else [None] * len(labels)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text is not UTF-8
        raise data_error(path, "a Parquet file", _line(error), REDOWNLOAD) from error
    counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    rows = np.concatenate([np.arange(0), *map(np.arange, counts)])
    places = np.stack([np.repeat(np.arange(len(counts)), counts), rows], axis=1)
    names = [(name or "").rpartition("/")[2].encode() for name in paths]
    content = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
    return _Shard(footer, content, classes, places, labels, names)


def _columns(path: Path, schema: Any, config: DataConfig) -> tuple[str, str]:
    """Returns the image and label columns: by the settings, by the usual names, or the only ones of
    their types.
    """
    found = {field.name: field.type for field in schema}
    images = (config.image_column,) if config.image_column else IMAGES
    labels = (config.label_column,) if config.label_column else LABELS
    chosen = []
    for names, usual, fits in ((images, IMAGES, _holds_images), (labels, LABELS, _holds_labels)):
        fitting = [name for name, kind in found.items() if fits(kind)]
        known = [name for name in names if name in fitting]
        chosen += known[:1] or (fitting if len(fitting) == 1 and names is usual else [])
    if len(chosen) == 2:
        return chosen[0], chosen[1]
    got = ", ".join(f"{name}: {kind}" for name, kind in found.items())
    expected = (
        f"a column {' or '.join(images)} of struct<bytes: binary, path: string> or binary, "
        f"and a column {' or '.join(labels)} of integers, text or booleans"
    )
    fix = "convert them, or name them with --image-column and --label-column"
    raise data_error(path, expected, got, fix)


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _holds_labels(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    tests = (types.is_integer, types.is_boolean, types.is_string, types.is_large_string)
    return any(test(kind) for test in tests)


def _described_classes(path: Path, schema: Any, label: str) -> tuple[str, ...] | None:
    """Returns the class names from a file's Hub metadata; None if they are not listed."""
    try:
        found = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError as error:
        raise data_error(path, "JSON in its metadata", _line(error), REDOWNLOAD) from error
    for key in ("info", "features", label, "names"):
        found = found.get(key) if isinstance(found, dict) else None
    if found is None:
        return None
    if not isinstance(found, list) or not all(type(name) in (str, int) for name in found):
        got = repr(found)[:80]
        raise data_error(path, "a list of class names in its metadata", got, REDOWNLOAD)
    return tuple(map(str, found))


def _labels(path: Path, column: Any, classes: tuple[str, ...] | None) -> NDArray[Any]:
    """Returns the labels, integers or strings. Shape (n,)."""
    import pyarrow as pa

    if column.null_count:
        got = f"none in {counted(column.null_count, 'row')}"
        raise data_error(path, "a label in each row", got, "remove these rows")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.string())
    labels = column.to_numpy()
    if len(labels) and labels.dtype != object:
        max_label = len(classes) - 1 if classes else labels.max()
        wrong = labels[(labels < 0) | (labels > max_label)]
        if len(wrong):
            fix = "if it is a test split without labels (all -1), move it elsewhere"
            raise data_error(path, f"labels from 0 to {max_label}", str(wrong[0]), fix)
    return labels


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
