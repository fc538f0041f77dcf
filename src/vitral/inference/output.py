"""Writes predictions as text, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

from tqdm import tqdm

from vitral.data.imagenet import display, human_name
from vitral.errors import counted, printable
from vitral.inference.predict import Prediction
from vitral.storage import replacing

Format = Literal["text", "json", "csv"]
CSV_HEADER = "path,rank,class,name,probability,error,calibrated\n"
UNKNOWN = "unknown"
NO_CLASSES = "no class"  # in text, if no probability reaches its threshold


def write(found: Iterable[Prediction], count: int, format: Format, place: Path | None) -> int:
    """Writes predictions for files as they arrive, and errors to standard error.

    Text has one line for each image that could be read. For every image, JSON has one line with an
    object, and CSV has one or more lines.

    Args:
        count: number of predictions, for the progress bar.
        place: file to write atomically; None writes to standard output.

    Returns:
        Number of images that could be read.
    """
    formats = {"text": _text, "json": _json, "csv": _csv}
    read = 0
    with _opened(place) as out, tqdm(total=count, unit=" images", disable=None) as bar:
        out.write(CSV_HEADER if format == "csv" else "")
        for prediction in found:
            if prediction.error is not None:
                line = printable(f"vitral: {prediction.path}: {prediction.error}")
                tqdm.write(line, file=sys.stderr)
            read += prediction.error is None
            tqdm.write(formats[format](prediction), file=out, end="")
            out.flush()
            bar.update()
    if read < count:
        total = counted(count, "image")
        print(f"vitral: {count - read:,} of {total} cannot be read", file=sys.stderr)
    return read


@contextmanager
def _opened(place: Path | None) -> Iterator[TextIO]:
    if place is None:
        yield sys.stdout
        return
    with replacing(place) as building, building.open("w", newline="", encoding="utf-8") as file:
        yield file


def _named_probabilities(prediction: Prediction) -> Iterator[tuple[str, float]]:
    return zip(prediction.names, prediction.probabilities, strict=True)


def _text(prediction: Prediction) -> str:
    if prediction.error is not None:
        return ""
    top_classes = ", ".join(
        f"{display(name)} {p:.2%}" for name, p in _named_probabilities(prediction)
    )
    top_classes = UNKNOWN if prediction.unknown else top_classes
    return f"{printable(str(prediction.path))}: {top_classes or NO_CLASSES}\n"


def _json(prediction: Prediction) -> str:
    if prediction.error is not None:
        return json.dumps({"path": prediction.path, "error": prediction.error}) + "\n"
    top_classes = [
        {
            "class": name,
            "name": human_name(name) or name,
            "probability": None if math.isnan(p) else round(p, 6),  # JSON has no NaN
        }
        for name, p in _named_probabilities(prediction)
    ]
    state = {"calibrated": prediction.calibrated, "unknown": prediction.unknown}
    return json.dumps({"path": prediction.path, **state, "predictions": top_classes}) + "\n"


def _csv(prediction: Prediction) -> str:
    path = printable(str(prediction.path))
    calibrated = "true" if prediction.calibrated else "false"
    rows = [
        (path, rank, name, human_name(name) or name, f"{p:.6f}", "", calibrated)
        for rank, (name, p) in enumerate(_named_probabilities(prediction), 1)
    ]
    if prediction.unknown:
        confidence = f"{prediction.probabilities[0]:.6f}"
        rows = [(path, 1, UNKNOWN, UNKNOWN, confidence, "", calibrated)]
    lines = io.StringIO()
    rows = rows or [(path, *[""] * 4, prediction.error or "", "")]
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue()
