"""Tables of labels: a file, or `metadata.csv` or `metadata.jsonl` next to the images.

The latter is a layout of the Hugging Face Hub: the file is in the folder itself, or in `train/` and
`val/`. Each row contains the path of an image, relative to the folder of the table, and its class
or classes.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitral.config import DataConfig
from vitral.data.formats import parquet
from vitral.data.formats.classes import class_columns, find_classes
from vitral.data.formats.folder import holds_images
from vitral.data.formats.labels import SUFFIXES, find_columns, read_header, read_table
from vitral.data.formats.rows import Rows
from vitral.data.records import Files
from vitral.data.sampling import Integers
from vitral.data.splits import VALIDATION, Dataset, merge_splits
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

    The records are in the order of a folder with the same images: by class, then by path. If an
    image can have several labels, they are in the order of the paths. With
    `train` False, there may be a single class, and all images of a table without splits are
    validation images.

    Raises:
        UserError: if the table cannot be used; the message names file, row and column.
        OSError: if a file cannot be read.
    """
    files = _metadata_files(root) if root.is_dir() else [root]
    rows = Rows(root, tuple(read_table(path, config, train) for path in files))
    splits, notes = _assign_splits(rows, train)
    used = np.flatnonzero(splits != UNUSED)
    training = np.flatnonzero(splits == TRAIN) if train else None
    classes, labels = find_classes(rows, used, training, config)
    has_val = bool((splits == VAL).any())
    chosen = np.flatnonzero(splits == VAL) if has_val and not train else used
    names, sizes = _locate(rows, chosen)
    columns = {"label": labels[chosen], "split": splits[chosen]}
    if rows.has("group"):
        columns["group"] = _groups(rows, chosen, splits[chosen])
    first = _drop_duplicates(rows, names, columns, chosen)
    if len(first) < len(chosen):
        rows_merged = counted(len(chosen) - len(first), "duplicate row")
        notes = (*notes, f"{printable(root.name)}: {rows_merged} merged")
    keys = (names,) if labels.ndim == 2 else (names, columns["label"])
    order = first[np.lexsort([key[first] for key in keys])]
    parts = {name: column[order] for name, column in columns.items()}
    unlabeled = int((~parts["label"].any(1)).sum()) if labels.ndim == 2 else 0
    if unlabeled:
        notes = (*notes, f"{printable(root.name)}: {counted(unlabeled, 'image')} without labels")
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
        return "label" in find_columns(path, read_header(path), DataConfig(), train=False)
    except UserError:
        return False


def _assign_splits(rows: Rows, train: bool) -> tuple[Integers, tuple[str, ...]]:
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


def _split_words(rows: Rows) -> list[str] | None:
    """Returns the name of each row's split, or None if there are no splits.

    Splits are those of the column, of the tables' folders, or of the first folders in the paths.
    """
    if rows.has("split"):
        return [cell.lower() for cell in rows.cells("split")]
    firsts = [path.replace("\\", "/").partition("/")[0] for path in rows.paths()]
    known = {*firsts}
    from_folders = known <= {"train", *VALIDATION} and (len(rows.tables) > 1 or "train" in known)
    return firsts if from_folders else None


def _locate(rows: Rows, chosen: Integers) -> tuple[NDArray[np.bytes_], Integers]:
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


def _groups(rows: Rows, chosen: Integers, splits: Integers) -> Integers:
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
    rows: Rows,
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
        for column, values in columns.items() if before != place else ():
            if np.any(values[before] != values[place]):
                column = _column_of(rows, column, values[before] != values[place])
                cells = rows.cells(column) if rows.has(column) else rows.paths()
                i, j = int(chosen[place]), int(chosen[before])
                expected = f"{short(cells[j])} as in row {rows.number(j)} for the same image"
                column, fix = column if rows.has(column) else "image", "remove one of the rows"
                raise rows.error(i, column, expected, short(cells[i]), fix)
    return np.array([*first.values()])


def _column_of(rows: Rows, column: str, differs: NDArray[np.bool_]) -> str:
    """Returns the column with a value that differs: for labels, possibly that of a class."""
    if column != "label" or rows.has("label"):
        return column
    return class_columns(rows)[int(differs.argmax())]
