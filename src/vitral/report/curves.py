"""Plots the loss and accuracy of a run from the rows of its metrics log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitral.storage import replacing

Rows = Sequence[Mapping[str, float]]


def draw(path: Path, rows: Rows) -> None:
    """Plots the rows and writes the figure as PNG, atomically."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    _line(loss, rows, "loss", "training")
    _line(loss, rows, "val_loss", "validation")
    _line(loss, rows, "ema_loss", "validation, EMA")
    for name, title in (("top1", "top-1"), ("map", "mAP")):
        _line(accuracy, rows, f"val_{name}", title, 100)
        _line(accuracy, rows, f"ema_{name}", f"{title}, EMA", 100)
    _line(accuracy, rows, "val_top5", "top-5", 100)
    _finish(loss, "cross-entropy (nats)")
    _finish(accuracy, "validation accuracy (%)")
    with replacing(path) as building:
        figure.savefig(building, format="png", dpi=120)


def _line(axes: Axes, rows: Rows, column: str, label: str, factor: float = 1.0) -> None:
    points = [(row["epoch"], factor * row[column]) for row in rows if column in row]
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, label=label, linewidth=1.5, marker="." if len(points) < 3 else None)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) > 1:
        axes.legend(frameon=False)
