"""Draws confusion matrices."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vitral.data.imagenet import short_name
from vitral.evaluation.scores import Scores

MAX_NUMBERS = 20  # classes up to which counts are written in the cells
MAX_NAMES = 60  # classes up to which names are written on the axes
MAX_NAME_LENGTH = 24  # characters


def draw(scores: Scores) -> bytes:
    """Returns a PNG of the image counts and, next to them, the fractions of each true class."""
    counts = scores.confusion()
    C = len(counts)
    images = np.bincount(scores.labels, minlength=C)
    fractions = counts / images.clip(1)[:, None]
    side = float(np.clip(0.45 * C, 3.5, 11.0))  # inches
    content = io.BytesIO()
    # Names of classes may contain dollar signs, and characters that the font does not have.
    with (
        mpl.rc_context({"text.parse_math": False, "font.size": 10 if C <= MAX_NAMES else 20}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(2 * side + 2.5, side + 1), layout="constrained")
        left, right = figure.subplots(1, 2)
        _matrix(left, "images", counts, scores.classes, "{:,}")
        _matrix(right, "fraction of the true class", fractions, scores.classes, "{:.2f}")
        figure.savefig(content, dpi=110, format="png")
    return content.getvalue()


def _matrix(
    axes: Axes, title: str, values: NDArray[Any], classes: Sequence[str], number: str
) -> None:
    C = len(classes)
    # The exponent makes rare confusions visible next to the diagonal.
    norm = PowerNorm(0.5 if C <= MAX_NUMBERS else 0.3, 0, max(values.max(), 1))
    drawn = axes.imshow(values, cmap="Blues", norm=norm, interpolation="nearest")
    axes.set_title(title, loc="left")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if C <= MAX_NAMES:
        names, size = [*map(_shortened, classes)], 9 if C <= MAX_NUMBERS else 6
        axes.set_xticks(range(C), names, rotation=90, fontsize=size)
        axes.set_yticks(range(C), names, fontsize=size)
    if C > MAX_NUMBERS:
        axes.figure.colorbar(drawn, ax=axes, shrink=0.8)
        return
    for i, j in zip(*values.nonzero(), strict=True):
        color = "white" if norm(values[i, j]) > 0.6 else "black"
        text = number.format(values[i, j])
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)


def _shortened(name: str) -> str:
    name = short_name(name)
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…"
