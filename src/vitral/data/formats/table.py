"""Tables of labels: a file, or `metadata.csv` or `metadata.jsonl` next to the images.

The latter is a layout of the Hugging Face Hub: the file is in the folder itself, or in `train/` and
`val/`. Each row contains the path of an image, relative to the folder of the table, and its class.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from bisect import bisect
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitral.config import DataConfig
from vitral.data.formats import parquet
from vitral.data.formats.folder import holds_images
from vitral.data.formats.labels import SUFFIXES, Table, find_columns, read_header, read_table
from vitral.data.records import VALIDATION, Dataset, Files, class_name, merge_splits
from vitral.data.sampling import Integers
from vitral.errors import UserError, counted, data_error, first_few, printable, short

METADATA = ("metadata.csv", "metadata.jsonl")
TRAINING = ("train", "training")
TRAIN, VAL, UNUSED = range(3)
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def matches(root: Path) -> bool:
    """Whether `root` is a table of labels, or a folder with one."""
    if root.is_file():
        return root.suffix.lower() in SUFFIXES and not parquet.matches(root)
    return any(map(_has_labels, _metadata_files(root)))


def open(root: Path, config: DataConfig, seed: int, train: bool) -> Dataset:
    """Opens the images in a table; without a validation split, a part is held out.

    The records are in the order of a folder with the same images: by class, then by path. With
    `train` False, there may be a single class, and all images of a table without splits are
    validation images.

    Raises:
        UserError: if the table cannot be used; the message names file, row and column.
        OSError: if a file cannot be read.
    """
    files = _metadata_files(root) if root.is_dir() else [root]
    rows = _Rows(root, tuple(read_table(path, config, train) for path in files))
    splits, notes = _assign_splits(rows, train)
    classes, labels = _classes(rows, splits, train)
    has_val = bool((splits == VAL).any())
    chosen = np.flatnonzero(splits == VAL if has_val and not train else splits != UNUSED)
    names, sizes = _locate(rows, chosen)
    columns = {"label": labels[chosen], "split": splits[chosen]}
    if rows.has("group"):
        columns["group"] = _groups(rows, chosen, splits[chosen])
    first = _drop_duplicates(rows, names, columns, chosen)
    if len(first) < len(chosen):
        rows_merged = counted(len(chosen) - len(first), "duplicate row")
        notes = (*notes, f"{printable(root.name)}: {rows_merged} merged")
    order = first[np.lexsort((names[first], columns["label"][first]))]
    parts = {name: column[order] for name, column in columns.items()}
    records = Files(
        rows.folder,
        names[order],
        sizes[order],
        parts["label"],
        parts.get("group"),
    )
    by_split = [records.take(parts["split"] == split) for split in (TRAIN, VAL)]
    training, val = ((classes, each) if len(each) else None for each in by_split)
    dataset = merge_splits(root, training, val, config, seed)
    return dataclasses.replace(dataset, choices=(*dataset.choices, *notes))


def _metadata_files(root: Path) -> list[Path]:
    """Returns the metadata file in a folder, or those in its split folders."""
    for folders in ([root], [root / name for name in ("train", *VALIDATION)]):
        found = [
            next((path for path in (folder / name for name in METADATA) if path.is_file()), None)
            for folder in folders
        ]
        if any(found):
            return [path for path in found if path is not None]
    return []


def _has_labels(path: Path) -> bool:
    """Whether a metadata file lists classes, or describes images that are not in class folders."""
    if holds_images(path.parent):
        return True
    try:
        return bool(find_columns(path, read_header(path), DataConfig(), train=False))
    except UserError:
        return False


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of one or more tables, one after another."""

    root: Path
    """The table, or the folder with the tables."""
    tables: tuple[Table, ...]

    @property
    def folder(self) -> Path:
        """The folder that paths in the dataset are relative to."""
        return self.root if self.root.is_dir() else self.root.parent

    @cached_property
    def ends(self) -> list[int]:
        """Number of rows up to the end of each table."""
        return [*accumulate(len(table.rows) for table in self.tables)]

    def has(self, column: str) -> bool:
        """Whether all tables have a column."""
        return all(column in table.cells for table in self.tables)

    def cells(self, column: str) -> list[str]:
        """Returns the text of all cells in a column that all tables have."""
        return [cell for table in self.tables for cell in table.cells[column]]

    def paths(self) -> list[str]:
        """Returns the path of each image, relative to `folder` or absolute."""
        paths: list[str] = []
        for table in self.tables:
            inside = "" if table.path.parent == self.folder else table.path.parent.name
            cells = table.cells["image"]
            paths += [os.path.join(inside, cell) for cell in cells] if inside else cells  # noqa: PTH118
        return paths

    def error(self, i: int, column: str, expected: str, got: str, fix: str) -> UserError:
        """Returns the error for row `i` and a column."""
        which = bisect(self.ends, i)
        return self.tables[which].error(i - self.ends[which], column, expected, got, fix)

    def number(self, i: int) -> int:
        """Returns the number in its file of row `i`."""
        which = bisect(self.ends, i)
        return int(self.tables[which].rows[i - self.ends[which]])


def _assign_splits(rows: _Rows, train: bool) -> tuple[Integers, tuple[str, ...]]:
    """Returns the split of each row, and notes about the splits."""
    words = _split_words(rows)
    if words is None:
        return np.full(rows.ends[-1], TRAIN if train else VAL), ()
    known = dict.fromkeys(words)
    name, place = printable(rows.root.name), rows.root
    for word in known:
        if word not in (*TRAINING, *VALIDATION):
            expected = f"one of train, {', '.join(VALIDATION)}"
            i, fix = words.index(word), "correct it, or give --split-column"
            raise rows.error(i, "split", expected, repr(word) if word else "nothing", fix)
    val = next((word for word in VALIDATION if word in known), None)
    if train and not {*TRAINING} & known.keys():
        fix = "label the training images train"
        raise data_error(place, "rows of the split train", f"only {first_few([*known])}", fix)
    codes = {word: TRAIN if word in TRAINING else VAL if word == val else UNUSED for word in known}
    notes = [f"{name} has no rows of val: using test for validation"] if val == "test" else []
    unused = [word for word, code in codes.items() if code == UNUSED]
    if unused:
        notes.append(f"{name}: rows of {first_few(unused)} are not used")
    return np.array([codes[word] for word in words]), tuple(notes)


def _split_words(rows: _Rows) -> list[str] | None:
    """Returns the name of each row's split, or None if there are no splits.

    Splits are those of the column, of the tables' folders, or of the first folders in the paths.
    """
    if rows.has("split"):
        return [cell.lower() for cell in rows.cells("split")]
    firsts = [path.replace("\\", "/").partition("/")[0] for path in rows.paths()]
    known = {*firsts}
    from_folders = known <= {"train", *VALIDATION} and (len(rows.tables) > 1 or "train" in known)
    return firsts if from_folders else None


def _classes(rows: _Rows, splits: Integers, train: bool) -> tuple[tuple[str, ...], Integers]:
    """Returns the classes, sorted as names of folders, and each row's position in them."""
    cells, known = rows.cells("label"), dict[str, int]()
    codes = np.array([known.setdefault(cell, len(known)) for cell in cells])
    used = np.flatnonzero(splits != UNUSED)
    empty = used[codes[used] == known.get("", -1)]
    if len(empty):
        raise rows.error(empty[0], "label", "a class", "nothing", "add it or remove the row")
    texts = [*known]
    for text in texts:
        if len(text.splitlines()) > 1:  # of a quote that is not closed
            i, fix = cells.index(text), "check the quotes there"
            raise rows.error(i, "label", "a class on one line", short(text), fix)
    names = [class_name(text) for text in texts]
    present = {names[code] for code in np.unique(codes[used]).tolist()}
    classes = tuple(sorted(present, key=os.fsencode))
    position = {name: i for i, name in enumerate(classes)}
    labels = np.array([position.get(name, -1) for name in names])[codes]
    if train:
        if len(classes) < 2:
            got = f"only {first_few(classes)}"
            fix = "add images of other classes, or give --label-column"
            raise data_error(rows.root, "two or more classes", got, fix)
        known_classes = np.unique(labels[splits == TRAIN])
        unknown = used[~np.isin(labels[used], known_classes)]
        if len(unknown):
            got = f"{classes[labels[unknown[0]]]}, which no training image has"
            fix = "correct it, or add training images"
            raise rows.error(unknown[0], "label", "a class of the training images", got, fix)
    return classes, labels


def _locate(rows: _Rows, chosen: Integers) -> tuple[NDArray[np.bytes_], Integers]:
    """Returns path relative to the folder, and size, of the images in the chosen rows."""
    paths, folder = rows.paths(), os.path.join(os.fsencode(rows.folder), b"")  # noqa: PTH118
    inside = os.path.join(os.path.realpath(folder), b"")  # noqa: PTH118
    real: dict[bytes, bytes] = {}
    names, sizes, missing = list[bytes](), np.empty(len(chosen), np.int64), list[int]()
    for place, i in enumerate(chosen.tolist()):
        found = _find_file(folder, paths[i]) or _find_file(folder, paths[i].replace("\\", "/"))
        name, sizes[place] = found or (b"", 0)
        if not found:
            missing.append(i)
        if b"/." in name or b"//" in name or name.startswith(b"."):
            name = os.path.normpath(name)
        if name.startswith(b"/"):
            above, base = os.path.split(name)
            above = real.get(above) or real.setdefault(above, os.path.realpath(above))
            name = os.path.join(above, base).removeprefix(inside)  # noqa: PTH118
        names.append(name)
    if missing:
        i = missing[0]
        cell = rows.cells("image")[i]
        got = f"nothing named {short(cell)}" if cell else "nothing"
        got += f", and {counted(len(missing) - 1, 'more missing file')}" if missing[1:] else ""
        fix = "paths are relative to the folder of the table"
        raise rows.error(i, "image", "an image file", got, fix)
    return np.array(names), sizes


def _find_file(folder: bytes, path: str) -> tuple[bytes, int] | None:
    """Returns path and size of a file, or None if there is no such file. Raises OSError."""
    try:
        name = os.fsencode(path)
        status = os.stat(name if name.startswith(b"/") else folder + name)  # noqa: PTH116
    except ValueError:  # null characters, or characters that no file name has
        return None
    except OSError as error:
        if error.errno in MISSING:
            return None
        raise
    return (name, status.st_size) if stat.S_ISREG(status.st_mode) else None


def _groups(rows: _Rows, chosen: Integers, splits: Integers) -> Integers:
    """Returns the hashed group of each chosen row."""
    cells = rows.cells("group")
    for i in chosen.tolist():
        if not cells[i]:
            fix = "give images without a known group a group of their own"
            raise rows.error(i, "group", "a group", "nothing", fix)
    hashes = {cell: _hash(cell) for cell in {*cells}}
    groups = np.array([hashes[cells[i]] for i in chosen.tolist()])
    both = np.intersect1d(groups[splits == TRAIN], groups[splits == VAL])
    if len(both):
        place = chosen[(splits == VAL) & np.isin(groups, both)][0]
        got = f"{short(cells[place])}, which is in both splits"
        raise rows.error(place, "group", "a group in one split", got, "move its images")
    return groups


def _hash(name: str) -> int:
    """Returns 64 bits of a hash, so that two of a million groups do not get the same one."""
    digest = blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _drop_duplicates(
    rows: _Rows,
    names: NDArray[np.bytes_],
    columns: dict[str, NDArray[Any]],
    chosen: Integers,
) -> Integers:
    """Returns the positions of the first row of each image.

    Raises:
        UserError: if two rows of an image differ.
    """
    listed = names.tolist()
    if len({*listed}) == len(listed):
        return np.arange(len(listed))
    first: dict[bytes, int] = {}
    for place, name in enumerate(listed):
        before = first.setdefault(name, place)
        for column, values in columns.items():
            if values[before] != values[place]:
                cells = rows.cells(column) if rows.has(column) else rows.paths()
                i, j = int(chosen[place]), int(chosen[before])
                expected = f"{short(cells[j])} as in row {rows.number(j)} for the same image"
                column, fix = column if rows.has(column) else "image", "remove one of the rows"
                raise rows.error(i, column, expected, short(cells[i]), fix)
    return np.array([*first.values()])
