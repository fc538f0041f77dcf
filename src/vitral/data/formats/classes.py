"""Classes and labels of the rows of a table: one label per image, or several."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from vitral.config import DataConfig
from vitral.data.formats.labels import BINARY, CLASS, LIST
from vitral.data.formats.rows import Rows
from vitral.data.sampling import Integers, Labels
from vitral.data.splits import class_name
from vitral.errors import data_error, first_few, printable, short

Classes = tuple[str, ...]


def find_classes(
    rows: Rows, used: Integers, training: Integers | None, config: DataConfig
) -> tuple[Classes, Labels]:
    """Returns the classes, sorted as names of folders, and the labels of all rows.

    Args:
        used: indices of the rows whose labels are read.
        training: indices of the training images; None if there are none, in which case a single
            class is accepted.
        config: selects whether an image can have several labels.

    Returns:
        Labels have shape (rows,), or (rows, classes) if an image can have several.

    Raises:
        UserError: if a label cannot be used; the message names file, row and column.
    """
    _require_same_columns(rows)
    if not rows.has("label"):
        classes, labels = _from_columns(rows, used)
    elif _several_per_cell(rows, config):
        classes, labels = _from_lists(rows, used, config.label_separator)
    else:
        classes, labels = _from_cells(rows, used)
    if training is None:
        return classes, labels
    if len(classes) < 2:
        got = f"only {first_few(classes)}"
        fix = "add images of other classes, or give --label-column"
        raise data_error(rows.root, "two or more classes", got, fix)
    known = labels[training].any(0) if labels.ndim == 2 else np.unique(labels[training])
    if labels.ndim == 2:
        unknown = np.argwhere(labels[used] > known)
    else:
        unknown = [(i, labels[used[i]]) for i in np.flatnonzero(~np.isin(labels[used], known))]
    for i, which in unknown[:1]:
        column = "label" if rows.has("label") else class_columns(rows)[which]
        got, fix = (
            f"{classes[which]}, which no training image has",
            "correct it, or add training images",
        )
        raise rows.error(used[i], column, "a class of the training images", got, fix)
    if labels.ndim == 2 and not known.all():
        got, fix = "no image with this class", "remove the column, or add images"
        place = f"{rows.root}: column {classes[known.argmin()]}"
        raise data_error(place, "1 in a row", got, fix)
    return classes, labels


def _require_same_columns(rows: Rows) -> None:
    first = rows.tables[0]
    for other in rows.tables[1:]:
        if {*other.classes} != {*first.classes}:
            expected = f"the same columns for the classes as in {first.path}"
            got = first_few([other.names[kind] for kind in other.classes or ["label"]])
            raise data_error(other.path, expected, got, "rename or add columns")


def _several_per_cell(rows: Rows, config: DataConfig) -> bool:
    """Whether cells of the label column contain any number of labels.

    Raises:
        UserError: if the separator is missing.
    """
    if config.label_separator is not None:
        return True
    if any(cell.startswith(LIST) for cell in rows.cells("label")):
        return True
    if config.task == "multi":
        table = rows.tables[0]
        got = f"column {table.names['label']} and none"
        fix = "give --label-separator, such as ;"
        raise data_error(table.path, "a separator of labels", got, fix)
    return False


def _from_cells(rows: Rows, used: Integers) -> tuple[Classes, Labels]:
    """Reads one label per cell. Rows that are not used may have the label -1."""
    texts, codes = _distinct(rows)
    empty = used[codes[used] == texts.get("", -1)]
    if len(empty):
        raise rows.error(empty[0], "label", "a class", "nothing", "add it or remove the row")
    names = [class_name(text) for text in texts]
    classes = _sorted(names[code] for code in np.unique(codes[used]).tolist())
    position = {name: i for i, name in enumerate(classes)}
    return classes, np.array([position.get(name, -1) for name in names])[codes]


def _from_lists(rows: Rows, used: Integers, separator: str | None) -> tuple[Classes, Labels]:
    """Reads cells with any number of labels; repeated labels count once."""
    texts, codes = _distinct(rows)
    lists: list[list[str]] = []
    for text, code in texts.items():
        parts = _split(text, separator)
        if "" in parts:
            i, expected = int(np.argmax(codes == code)), f"labels separated by {separator!r}"
            fix = "remove the separator, or add the label"
            raise rows.error(i, "label", expected, short(text.strip(LIST)), fix)
        lists.append([class_name(part) for part in parts])
    classes = _sorted(name for code in np.unique(codes[used]).tolist() for name in lists[code])
    position = {name: i for i, name in enumerate(classes)}
    hot = np.zeros((len(lists), len(classes)), np.uint8)
    for row, names in zip(hot, lists, strict=True):
        row[[position[name] for name in names if name in position]] = 1
    return classes, hot[codes]


def _split(text: str, separator: str | None) -> list[str]:
    """Returns the labels in a cell, without surrounding spaces."""
    if text.startswith(LIST):
        return [part.strip() for part in text.split(LIST)[1:]] if text != LIST else []
    if separator is None:
        return [text] if text else []
    parts = text.split(None if separator.isspace() else separator)
    return [part.strip() for part in parts] if text else []


def _from_columns(rows: Rows, used: Integers) -> tuple[Classes, Labels]:
    """Reads one column of 0 and 1 for each class."""
    kinds = class_columns(rows)
    labels = np.empty((rows.ends[-1], len(kinds)), np.uint8)
    for column, kind in zip(labels.T, kinds, strict=True):
        cells = rows.cells(kind)
        column[:] = [BINARY.get(cell.lower(), 2) for cell in cells]
        wrong = used[column[used] == 2]
        if len(wrong):
            got = short(cells[wrong[0]]) if cells[wrong[0]] else "nothing"
            fix = "correct it, or remove the column if it is not a class"
            raise rows.error(wrong[0], kind, "0 or 1", got, fix)
    return tuple(map(_name, kinds)), labels


def class_columns(rows: Rows) -> list[str]:
    """Returns the kinds of the columns of 0 and 1, in the order of the classes.

    Raises:
        UserError: if two names are the same class, or a name is not UTF-8.
    """
    kinds = sorted(rows.tables[0].classes, key=lambda kind: os.fsencode(_name(kind)))
    for kind in kinds:
        if not _is_unicode(kind):
            got, fix = f"column {_name(kind)}", "save the table as UTF-8"
            raise data_error(rows.tables[0].path, "UTF-8 text", got, fix)
    for kind, following in pairwise(kinds):
        if _name(kind) == _name(following):
            got, fix = f"two columns {_name(kind)}", "rename or remove one"
            raise data_error(rows.tables[0].path, "each class once", got, fix)
    return kinds


def _is_unicode(text: str) -> bool:
    """Whether the text has no surrogates, which represent bytes that are not UTF-8."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _name(kind: str) -> str:
    return class_name(kind.removeprefix(CLASS))


def _distinct(rows: Rows) -> tuple[dict[str, int], Integers]:
    """Returns the number of each different label cell, and the number for each row.

    Raises:
        UserError: if a cell has several lines, or is not UTF-8.
    """
    cells, known = rows.cells("label"), dict[str, int]()
    codes = np.array([known.setdefault(cell, len(known)) for cell in cells])
    for text in known:
        if len(text.splitlines()) > 1:  # of a quote that is not closed
            i, fix = cells.index(text), "check the quotes there"
            raise rows.error(i, "label", "a class on one line", short(text), fix)
        if not _is_unicode(text):
            i, fix = cells.index(text), "save the table as UTF-8"
            raise rows.error(i, "label", "UTF-8 text", printable(text), fix)
    return known, codes


def _sorted(names: Iterable[str]) -> Classes:
    return tuple(sorted({*names}, key=os.fsencode))
