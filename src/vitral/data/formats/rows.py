"""Rows of one or more tables of labels, one after another."""

from __future__ import annotations

import os
from bisect import bisect
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from vitral.data.formats.labels import Table
from vitral.errors import UserError


@dataclass(frozen=True, eq=False)
class Rows:
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
