"""Draws charts as inline SVG whose text and lines use the colors of the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from vitral.evaluation.scores import BINS

NUM_COLORS = 6  # defined in report.css as .s0 to .s5
WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 386, 10, 216  # bounds of the plot area
NUM_BUCKETS = 300  # for downsampling long lines

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line in a chart."""

    label: str
    points: Points
    """Pairs of x and y in ascending order of x."""
    color: int = 0
    dashed: bool = False

    @property
    def css(self) -> str:
        """CSS classes of the line."""
        return f"s{self.color % NUM_COLORS}" + (" dashed" if self.dashed else "")


@dataclass(frozen=True)
class Chart:
    """A chart of values by epoch."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    from_zero: bool = False

    @property
    def svg(self) -> Markup:
        """The chart as SVG; its label contains the first and last value of each line."""
        curves = [
            downsample([p for p in line.points if math.isfinite(p[1])]) for line in self.lines
        ]
        everything = [point for points in curves for point in points]
        if not everything:
            return Markup('<p class="empty">No values yet.</p>')
        low = 0.0 if self.from_zero else min(y for _, y in everything)
        x = Axis.exact(0.0, max(x for x, _ in everything), LEFT, RIGHT)
        y = Axis.rounded(low, max(y for _, y in everything), BOTTOM, TOP)
        parts = [*x.grid(vertical=True), *y.grid(vertical=False), _caption("epoch")]
        for line, points in zip(self.lines, curves, strict=True):
            path = " ".join(f"{x.position(a):.1f},{y.position(b):.1f}" for a, b in points)
            if len(points) == 1:
                a, b = path.split(",")
                parts.append(f'<circle class="{line.css}" cx="{a}" cy="{b}" r="4"/>')
            elif points:
                parts.append(f'<polyline class="{line.css}" points="{path}"/>')
        ends = (
            f"{line.label} from {number(points[0][1])} to {number(points[-1][1])}"
            for line, points in zip(self.lines, curves, strict=True)
            if points
        )
        return _svg(f"{self.title} over epochs: {'; '.join(ends)}", parts)


@dataclass(frozen=True)
class Axis:
    """A scale that maps values to positions in the drawing."""

    low: float
    high: float
    ticks: list[float]
    begin: float
    end: float

    @classmethod
    def exact(cls, low: float, high: float, begin: float, end: float) -> Axis:
        """Returns an axis from `low` to `high`."""
        ticks = [tick for tick in _round_values(low, high) if low <= tick <= high]
        return cls(low, high, ticks, begin, end)

    @classmethod
    def rounded(cls, low: float, high: float, begin: float, end: float) -> Axis:
        """Returns an axis between round values; if `low` equals `high`, the axis includes 0."""
        if low == high:  # larger values may be impossible, such as accuracy above 100%
            low, high = min(low, 0.0), max(high, 0.0) or float(not low)
        ticks = _round_values(low, high)
        return cls(ticks[0], ticks[-1], ticks, begin, end)

    def position(self, value: float) -> float:
        """Returns the position of a value."""
        fraction = (value - self.low) / (self.high - self.low)
        return self.begin + fraction * (self.end - self.begin)

    def grid(self, vertical: bool) -> list[str]:
        """Returns grid lines and their labels."""
        parts = []
        for tick in self.ticks:
            at = f"{self.position(tick):.1f}"
            if vertical:
                parts.append(f'<path class="grid" d="M{at} {TOP}V{BOTTOM}"/>')
                parts.append(f'<text x="{at}" y="{BOTTOM + 15}" class="mid">{tick:,.6g}</text>')
            else:
                parts.append(f'<path class="grid" d="M{LEFT} {at}H{RIGHT}"/>')
                parts.append(f'<text x="{LEFT - 6}" y="{at}" dy="4" class="end">{tick:,.6g}</text>')
        return parts


def reliability(bins: Sequence[tuple[float, int, float, float]]) -> Markup:
    """Draws accuracy against confidence, with the diagonal of perfect calibration.

    Args:
        bins: bins from `Scores.reliability`.
    """
    x, y = Axis.exact(0.0, 1.0, LEFT, RIGHT), Axis.exact(0.0, 1.0, BOTTOM, TOP)
    parts = [*x.grid(vertical=True), *y.grid(vertical=False), _caption("confidence")]
    most = max(count for _, count, _, _ in bins)
    for edge, count, confidence, accuracy in bins:
        begin, end = x.position(edge - 1 / BINS) + 1, x.position(edge) - 1
        top, confidence_y = y.position(accuracy), y.position(confidence)
        parts.append(
            f'<rect class="bar" x="{begin:.1f}" y="{top:.1f}" width="{end - begin:.1f}" '
            f'height="{BOTTOM - top:.1f}" opacity="{0.3 + 0.7 * (count / most) ** 0.5:.2f}"/>'
            f'<path class="confidence" d="M{begin:.1f} {confidence_y:.1f}H{end:.1f}"/>'
        )
    parts.append(f'<path class="diagonal" d="M{LEFT} {BOTTOM}L{RIGHT} {TOP}"/>')
    return _svg("Accuracy against confidence of the predictions", parts)


def coverage(points: Points) -> Markup:
    """Draws accuracy against coverage, the fraction of the images that are answered.

    Args:
        points: pairs of coverage and accuracy, in ascending order of coverage.
    """
    low = min(accuracy for _, accuracy in points)
    x, y = Axis.exact(0.0, 1.0, LEFT, RIGHT), Axis.rounded(min(low, 0.9), 1.0, BOTTOM, TOP)
    parts = [*x.grid(vertical=True), *y.grid(vertical=False), _caption("coverage")]
    path = " ".join(f"{x.position(a):.1f},{y.position(b):.1f}" for a, b in downsample(points))
    parts.append(f'<polyline class="s0" points="{path}"/>')
    return _svg("Accuracy of the answered images against their fraction", parts)


def downsample(points: Points) -> Points:
    """Returns at most about 600 points, with the minimum and maximum of each bucket."""
    if len(points) <= 2 * NUM_BUCKETS:
        return points
    size = -(-len(points) // NUM_BUCKETS)
    kept = [points[0]]
    for first in range(0, len(points), size):
        bucket = points[first : first + size]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return [*kept, points[-1]]


def number(value: float) -> str:
    """Formats a value with four digits or thousands separators: 0.0003, 2.187, 12,500."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _round_values(low: float, high: float) -> list[float]:
    return list(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))


def _caption(text: str) -> str:
    return f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 4}" class="mid">{text}</text>'


def _svg(label: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
