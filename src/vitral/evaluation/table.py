"""Results of a model on several sets, or at several sizes: a row each."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from vitral.storage import replacing


@dataclass(frozen=True)
class Row:
    """What a model is worth on a set of images; the shares are nan where nothing was scored."""

    name: str
    images: int
    """Those that were scored."""
    classes: int
    """Those that were told apart."""
    top1: float
    top5: float
    calibration_error: float

    def __str__(self) -> str:
        fractions = (self.top1, self.top5, self.calibration_error)
        top1, top5, error = (
            "-" if fraction != fraction else f"{fraction:.2%}" for fraction in fractions
        )
        return f"{self.images:7,}  {self.classes:7,}  {top1:>7}  {top5:>7}  {error:>17}"


COLUMNS = ("images", "classes", "top1", "top5", "ece")
HEADER = " images  classes    top-1    top-5  calibration error"


def show(title: str, names: Sequence[str], rows: Iterable[Row]) -> list[Row]:
    """Prints the rows below a header, each as soon as it is there, and returns them.

    Args:
        title: of the first column.
        names: what the rows are called.
    """
    width = max(map(len, (title, *names)))
    print(f"{title:{width}}  {HEADER}", flush=True)
    done = []
    for row in rows:
        print(f"{row.name:{width}}  {row}", flush=True)
        done.append(row)
    return done


def write_rows(path: Path, title: str, rows: Iterable[Row]) -> None:
    """Writes the rows as CSV; shares of what was not scored stay empty."""
    values = ([value if value == value else "" for value in astuple(row)] for row in rows)
    write_csv(path, (title, *COLUMNS), values)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV file, whole or not at all."""
    with (
        replacing(path) as building,
        building.open("w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file).writerows([header, *rows])
