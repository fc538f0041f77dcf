"""Prints the metrics of a dataset and writes them to files."""

from __future__ import annotations

import math
from pathlib import Path

from vitral.data.imagenet import display
from vitral.errors import counted
from vitral.evaluation.metrics import LEVEL, RESAMPLES, ClassMetrics, Results
from vitral.evaluation.table import write_metrics, write_named
from vitral.storage import replacing, write_csv

MAX_LISTED_CLASSES = 20  # above this, only the ten worst and the five best
TITLES = {
    "top1": "top-1",
    "balanced": "balanced accuracy",
    "f1": "macro F1",
    "top5": "top-5",
    "macro_precision": "macro precision",
    "weighted_precision": "weighted precision",
    "weighted_f1": "weighted F1",
    "mcc": "Matthews correlation",
    "kappa": "Cohen's kappa",
    "loss": "loss",
    "map": "mAP",
    "ece": "calibration error",
}
"""Titles of metrics for display; macro recall is the balanced accuracy, weighted recall top-1."""
PERCENT = ("top1", "map", "balanced", "f1", "top5", "macro_precision", "weighted_precision")
PERCENT += ("weighted_f1", "ece")


def shown(name: str, value: float) -> str:
    """Formats the value of a metric, or returns a dash if it is NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:.2%}" if name in PERCENT else f"{value:.4f}"


def headline_rows(results: Results) -> list[tuple[str, str, str]]:
    """Returns the title, value and 95% interval of each metric; the interval may be empty."""
    values, bounds, rows = results.headline, results.intervals, []
    for name, title in TITLES.items():
        if name not in values:
            continue
        low, high = bounds.get(name, (math.nan, math.nan))
        interval = f"{low:.2%} to {high:.2%}" if name in bounds else ""
        rows.append((title, shown(name, values[name]), interval))
    return rows


def summarize(results: Results) -> str:
    """Formats the metrics and a table of classes; for over 20, only the worst and the best."""
    scores, nonfinite = results.scores, results.num_nonfinite
    lines = [f"{counted(len(scores.labels), 'image')}, {counted(len(scores.classes), 'class')}"]
    if nonfinite:
        lines.append(f"{counted(nonfinite, 'image')} with a non-finite output, counted as wrong")
    width = max(map(len, TITLES.values()))
    lines.append(f"{'metric':{width}}    value  {LEVEL:.0%} interval")
    for title, value, interval in headline_rows(results):
        lines.append(f"{title:{width}}  {value:>7}  {interval}".rstrip())
    return "\n".join([*lines, *_class_lines(results.per_class)])


def _class_lines(table: list[ClassMetrics]) -> list[str]:
    lines = []
    if len(table) > MAX_LISTED_CLASSES:
        table = sorted(table, key=lambda row: row.f1)
        table = table[:10] + table[-5:]
        lines.append("the ten worst and the five best classes by F1:")
    width = max(len("class"), *(len(display(row.name)) for row in table))
    lines.append(f"{'class':{width}}  images  precision   recall       F1")
    lines += [
        f"{display(row.name):{width}}  {row.images:6,}  {row.precision:9.2%}  {row.top1:7.2%}  "
        f"{row.f1:7.2%}"
        for row in table
    ]
    return lines


def write_tables(results: Results, directory: Path) -> None:
    """Writes per_class.csv and confused_pairs.csv; for wnids, adds columns with their names.

    With probabilities, per_class.csv also contains the average precision and ROC AUC, which is
    empty if no image has another class.
    """
    header = ["class", "images", "top1", "top5", "precision", "recall", "f1"]
    scores, rows = results.scores, []
    areas = scores.probabilities is not None
    for row in results.per_class:
        rates = (row.top1, row.top5, row.precision, row.top1, row.f1)
        auc = "" if row.roc_auc != row.roc_auc else row.roc_auc
        rows.append(
            (row.name, row.images, *rates, *([row.average_precision, auc] if areas else []))
        )
    header += ["average_precision", "roc_auc"] if areas else []
    write_named(directory / "per_class.csv", scores.classes, 1, header, rows)
    pairs, header = scores.confused_pairs(), ["class", "predicted", "images"]
    write_named(directory / "confused_pairs.csv", scores.classes, 2, header, pairs)


def write_results(results: Results, directory: Path) -> None:
    """Writes metrics.json, the tables, and the confusion matrix as confusion.csv and .png."""
    from vitral.evaluation.confusion import draw  # imports matplotlib

    scores = results.scores
    facts = {
        "images": len(scores.labels),
        "classes": len(scores.classes),
        "nonfinite": results.num_nonfinite,
        "intervals": {"level": LEVEL, "resamples": RESAMPLES, **results.intervals},
    }
    write_metrics(directory / "metrics.json", results.headline, facts)
    write_tables(results, directory)
    header = ("class", *scores.classes)
    named = zip(scores.classes, scores.confusion().tolist(), strict=True)
    write_csv(directory / "confusion.csv", header, ((name, *counts) for name, counts in named))
    with replacing(directory / "confusion.png") as file:
        file.write_bytes(draw(scores))
