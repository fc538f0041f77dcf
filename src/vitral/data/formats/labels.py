"""Reads the columns of a table of labels: CSV, TSV, JSON Lines or Parquet."""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vitral.config import DataConfig
from vitral.data.sampling import Integers
from vitral.documents import parse_json
from vitral.errors import UserError, data_error, did_you_mean, first_few, short
from vitral.files import open_regular

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
COLUMNS = {
    "image": (
        *("image", "image_path", "image_file", "image_name", "img", "img_path"),
        *("file_name", "filename", "file", "file_path", "filepath", "path"),
    ),
    "label": ("label", "labels", "class", "class_name", "target", "category"),
    "split": ("split", "subset"),
    "group": ("group", "group_id", "patient_id"),
}
"""Common names of each column, in lower case with underscores, the preferred ones first."""
CLASS = "class "  # prefix of the kind of a column of 0 and 1; its name follows
BINARY = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
"""Cells of such a column, in lower case."""
LIST = "\0"  # precedes each item of a list in a cell


@dataclass(frozen=True, eq=False)
class Table:
    """The columns of a table that a dataset uses."""

    path: Path
    names: dict[str, str]
    """Name in the table of each kind of column. Contains "image", and either "label" or two or more
    kinds that begin with CLASS."""
    cells: dict[str, list[str]]
    """Text of each column, without surrounding spaces."""
    rows: Integers
    """Number of each row in the file, counted from 1. Shape (n,)."""

    @property
    def classes(self) -> list[str]:
        """Kinds of the columns of 0 and 1, one for each class."""
        return [kind for kind in self.names if kind.startswith(CLASS)]

    def error(self, i: int, column: str, expected: str, got: str, fix: str) -> UserError:
        """Returns the error for cell `i` of a column."""
        name = self.names[column]
        return data_error(f"{self.path}: row {self.rows[i]}, column {name}", expected, got, fix)


def read_table(path: Path, config: DataConfig, train: bool) -> Table:
    """Reads the columns that `config` names, or those with common names.

    Args:
        train: whether to train on the images; otherwise the group column may be missing.

    Raises:
        UserError: if a column is missing or a row is malformed; the message names file and row.
        OSError: if the file cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, config, train)
    with _open_text(path) as text:
        if path.suffix.lower() == ".jsonl":
            return _read_json(path, text, config, train)
        return _read_csv(path, text, config, train)


def read_header(path: Path) -> list[str]:
    """Returns the names of the columns of a CSV, TSV or JSON Lines file.

    Raises:
        UserError, OSError: as for `read_table`.
    """
    with _open_text(path) as text:
        if path.suffix.lower() == ".jsonl":
            return [*next((item for _, item in _objects(path, text)), {})]
        return _header(path, _csv_rows(path, text))


def _open_text(path: Path) -> TextIO:
    binary = open_regular(path)
    if binary.read(2) in (b"\xff\xfe", b"\xfe\xff"):
        binary.close()
        raise data_error(path, "UTF-8 text", "UTF-16", "save it as UTF-8")
    binary.seek(0)
    # Names of files may contain bytes that are not UTF-8; os.fsencode restores them.
    return io.TextIOWrapper(binary, "utf-8-sig", errors="surrogateescape", newline="")


def find_columns(
    path: Path, header: Sequence[str], config: DataConfig, train: bool
) -> dict[str, str]:
    """Returns the name in the table of each kind of column that the dataset uses.

    Without a column for the label, these are all columns, which may contain 0 and 1 for a class.

    Raises:
        UserError: if a column is missing, or is there twice.
    """
    usual: dict[str, str] = {}
    for name in reversed(header):
        usual[name.strip().lower().replace(" ", "_").replace("-", "_")] = name
    found: dict[str, str] = {}
    for column, names in COLUMNS.items():
        given: str | None = getattr(config, f"{column}_column")
        if given is not None and given not in header:
            if not train and column == "group":
                continue
            hint = did_you_mean(given, header).removeprefix("; ")
            fix = hint or f"give {_option(column)} with one of these names"
            raise data_error(path, f"a column {given}", first_few(header), fix)
        name = given or next((usual[name] for name in names if name in usual), None)
        if name is None and column == "image":
            raise _missing(path, column, header)
        if name is not None:
            found[column] = name
    if "label" not in found:
        others = [name for name in header if name and name not in found.values()]
        if config.task == "single" or config.label_separator is not None or len(others) < 2:
            raise _missing(path, "label", header)
        found |= {f"{CLASS}{name}": name for name in others}
    for name in found.values():
        if header.count(name) > 1:
            raise data_error(path, f"one column {name}", "several", "rename the others")
    return found


def _option(column: str) -> str:
    return f"--{column}-column"


def _missing(path: Path, column: str, header: Sequence[str], otherwise: str = "") -> UserError:
    expected = f"a column for the {column}, such as {COLUMNS[column][0]}"
    fix = f"name it in the first row, or give {_option(column)}{otherwise}"
    return data_error(path, expected, first_few(header), fix)


def _only_binary(table: Table, config: DataConfig) -> Table:
    """Drops columns that do not contain 0 and 1, if there is no column for the label.

    A column with a few other values is kept, so that these are errors.

    Raises:
        UserError: if fewer than two columns contain 0 and 1, or if `config.task` is "auto" and
            others do not: one of them may be the label.
    """

    def is_binary(kind: str) -> bool:
        cells = table.cells[kind]
        return 2 * sum(cell.lower() in BINARY for cell in cells) > len(cells)

    binary = [kind for kind in table.classes if is_binary(kind)]
    others = {*table.classes} - {*binary}
    if table.classes and (len(binary) < 2 or (others and config.task == "auto")):
        hint = ", or --task multi for columns of 0 and 1, one for each class"
        otherwise = hint if len(binary) >= 2 else ""
        raise _missing(table.path, "label", [*table.names.values()], otherwise)
    names = {kind: name for kind, name in table.names.items() if kind not in others}
    cells = {kind: cells for kind, cells in table.cells.items() if kind not in others}
    return Table(table.path, names, cells, table.rows)


def _read_csv(path: Path, text: TextIO, config: DataConfig, train: bool) -> Table:
    rows = _csv_rows(path, text)
    header = _header(path, rows)
    names = find_columns(path, header, config, train)
    places = [header.index(name) for name in names.values()]

    def selected() -> Iterator[tuple[int, list[str]]]:
        for number, cells in rows:
            if not any(map(str.strip, cells)):
                continue
            if len(cells) != len(header):
                expected, fix = f"{len(header)} cells", "check the quotes and separators there"
                raise data_error(f"{path}: row {number}", expected, str(len(cells)), fix)
            yield number, [cells[place] for place in places]

    return _only_binary(_collect(path, names, selected()), config)


def _csv_rows(path: Path, text: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Yields number and cells of each row; the separator is the most frequent in the first line."""
    first = text.readline()
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    text.seek(0)
    reader, number = csv.reader(text, delimiter=separator, skipinitialspace=True), 1
    try:
        for number, cells in enumerate(reader, 1):
            yield number, cells
    except csv.Error as error:
        fix = "check the quotes there"
        raise data_error(f"{path}: row {number + 1}", "CSV", str(error), fix) from error


def _header(path: Path, rows: Iterator[tuple[int, list[str]]]) -> list[str]:
    header = [cell.strip() for cell in next(rows, (1, []))[1]]
    if not any(header):
        raise data_error(path, "names of columns in the first row", "nothing", "add them")
    return header


def _read_json(path: Path, text: TextIO, config: DataConfig, train: bool) -> Table:
    objects = _objects(path, text)
    first = next(objects, (1, {}))
    names = find_columns(path, [*first[1]], config, train)

    def selected() -> Iterator[tuple[int, list[str]]]:
        for number, item in chain([first], objects):
            cells = {kind: item.get(name) for kind, name in names.items()}
            for kind, cell in cells.items():
                listed = kind == "label" and config.task != "single"
                values = cell if listed and isinstance(cell, list) else [cell]
                if kind in COLUMNS and any(isinstance(value, list | dict) for value in values):
                    place = f"{path}: row {number}, column {names[kind]}"
                    fix = "use one value per image"
                    raise data_error(place, "text or a number", short(cell), fix)
            yield number, [*map(_text, cells.values())]

    return _only_binary(_collect(path, names, selected()), config)


def _objects(path: Path, text: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number and object of each line that is not empty."""
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            item = parse_json(line)
        except ValueError as error:
            got = next(iter(str(error).splitlines()), "")
            raise data_error(f"{path}: row {number}", "JSON", got, "fix this line") from error
        if not isinstance(item, dict):
            expected, got = "a JSON object", short(item)
            raise data_error(f"{path}: row {number}", expected, got, "fix this line")
        yield number, item


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return LIST + LIST.join(map(_text, value))
    return "" if value is None else str(value)


def _read_parquet(path: Path, config: DataConfig, train: bool) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as opened:
            names = find_columns(path, opened.schema_arrow.names, config, train)
            names = {
                kind: name
                for kind, name in names.items()
                if kind in COLUMNS or not pa.types.is_nested(opened.schema_arrow.field(name).type)
            }
            table = opened.read([*dict.fromkeys(names.values())], use_threads=False)
        columns = [
            table[name].to_pylist()
            if kind == "label" and config.task != "single" and _is_list(table[name].type)
            else table[name].cast(pa.string()).to_pylist()
            for kind, name in names.items()
        ]
    except (pa.ArrowException, ValueError) as error:
        got = next(iter(str(error).splitlines()), type(error).__name__)
        raise data_error(path, "columns of text or numbers", got, "convert them") from error
    rows = enumerate(zip(*columns, strict=True), 1)
    collected = _collect(path, names, ((number, [*map(_text, cells)]) for number, cells in rows))
    return _only_binary(collected, config)


def _is_list(kind: Any) -> bool:
    """Whether a column contains lists of text or numbers."""
    import pyarrow as pa

    return pa.types.is_list(kind) and not pa.types.is_nested(kind.value_type)


def _collect(
    path: Path, names: dict[str, str], selected: Iterable[tuple[int, Sequence[str]]]
) -> Table:
    """Gathers the cells of the selected columns; equal cells other than paths are stored once."""
    columns: list[list[str]] = [[] for _ in names]
    rows, known = array("q"), dict[str, str]()
    image = [*names].index("image")
    for number, cells in selected:
        rows.append(number)
        for i, cell in enumerate(cells):
            cell = cell.strip()
            columns[i].append(cell if i == image else known.setdefault(cell, cell))
    if not rows:
        raise data_error(path, "rows with images", "none", "add some, or give another table")
    return Table(path, names, dict(zip(names, columns, strict=True)), np.frombuffer(rows, np.int64))
