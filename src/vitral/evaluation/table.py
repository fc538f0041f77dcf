"""Tables of results, with one row per test set or image size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from vitral.storage import write_csv


@dataclass(frozen=True)
class Row:
    """Results of a model on a dataset; fractions are NaN if no image was scored."""

    name: str
    images: int
    """Number of images that were scored."""
    classes: int
    """Number of candidate classes."""
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
    """Prints the rows below a header, each as soon as it is available, and returns them.

    Args:
        title: title of the first column.
        names: names of all rows, which determine the width of the first column.
    """
    width = max(map(len, (title, *names)))
    print(f"{title:{width}}  {HEADER}", flush=True)
    done = []
    for row in rows:
        print(f"{row.name:{width}}  {row}", flush=True)
        done.append(row)
    return done


def write_rows(path: Path, title: str, rows: Iterable[Row]) -> None:
    """Writes the rows as CSV; fractions are empty if no image was scored."""
    values = ([value if value == value else "" for value in astuple(row)] for row in rows)
    write_csv(path, (title, *COLUMNS), values)
