"""Tables of results, with one row per test set or image size."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from vitral.data.imagenet import human_name
from vitral.storage import replacing, write_csv


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


def write_named(
    path: Path,
    classes: Sequence[str],
    num_names: int,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
) -> None:
    """Writes a CSV file whose first `num_names` columns are classes; for wnids, adds their names.

    Args:
        classes: all classes of the dataset.
    """
    if any(map(human_name, classes)):
        header = (*header, *(f"{column}_name" for column in header[:num_names]))
        rows = [(*row, *(human_name(str(name)) for name in row[:num_names])) for row in rows]
    write_csv(path, header, rows)


def write_metrics(path: Path, metrics: Mapping[str, float], facts: Mapping[str, object]) -> None:
    """Writes facts and, below "metrics", metrics by name as JSON; those that are not finite are
    null.
    """
    known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    with replacing(path) as file:
        text = json.dumps({**facts, "metrics": known}, indent=2)
        file.write_text(text + "\n", encoding="utf-8")
