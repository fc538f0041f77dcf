"""Draws the figures of the ledger as SVG, without a plotting library.

The same rows give the same bytes on every machine. Each dataset has a panel of curves and a panel
of final scores, because scores on different datasets are not comparable. Runs that were validated
only at the end have no curves. The axes are those of vitral's reports. The background is opaque and
light, also on dark pages.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from ledger_rows import Row, headline_top1, mean_and_deviation
from markupsafe import escape

from vitral.report.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, Axis

WIDTH = 400  # of a panel, as in the reports
TITLE = 50  # height of a dataset's name above its panels
MARGIN = 24  # left of the scores
PITCH = 34  # height of the scores of one row
MAX_TITLE = 40  # characters of a title that fit next to its score
STYLE = """\
text{font:11px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#545d68}
.name{font-size:14px;font-weight:600;fill:#1b1f24}.mid{text-anchor:middle}.end{text-anchor:end}
.label{fill:#1b1f24;paint-order:stroke;stroke:#ffffff;stroke-width:4px}.grid{stroke:#d5dae0;fill:none}.line{fill:none;stroke-width:1.8}
.dashed{stroke-dasharray:5 3}.band{opacity:.16}.dot{opacity:.55}.mean{stroke-width:2.5}
"""
COLORS = ("#0b5cad", "#b3400a", "#17702f", "#7a3fd1", "#b02a80", "#6b5900")


def figure(rows: Sequence[Row], by: str = "data") -> str:
    """Returns an SVG document of the rows in their order, grouped by dataset or by another key."""
    parts, top, summary = [], 0.0, []
    for title, found in groupby(sorted(rows, key=lambda row: row[by]), key=lambda row: row[by]):
        group = list(found)
        parts.append(f'<g transform="translate(0 {top:g})">{panels(str(title), group)}</g>')
        top += TITLE + height(group)
        summary += [
            f"{title}: {name(row)} {mean_and_deviation(headline_top1(row))}%" for row in group
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {top:g}" role="img">\n'
        f"<title>Top-1 at the last step: {escape('; '.join(summary))}</title>\n"
        f"<style>\n{STYLE}</style>\n"
        f'<rect width="{2 * WIDTH}" height="{top:g}" fill="#ffffff"/>\n{"".join(parts)}</svg>\n'
    )


def height(rows: Sequence[Row]) -> float:
    """Height of the panels of some rows."""
    return max(HEIGHT * validated(rows), foot(len(rows)) + HEIGHT - BOTTOM) + 10


def foot(count: int) -> float:
    """The y coordinate where the scores of `count` rows end."""
    return TOP + PITCH * count + 4


def validated(rows: Sequence[Row]) -> bool:
    """Whether any row has a curve, that is, more than one validation."""
    return any(len(curve(row)) > 1 for row in rows)


def panels(title: str, rows: Sequence[Row]) -> str:
    """Draws both panels of a group below its title."""
    curves = "\n".join(draw_curves(rows)) if validated(rows) else ""
    scores = "\n".join(draw_scores(rows))
    return (
        f'<text class="name" x="{LEFT}" y="22">{escape(title)}</text>\n'
        f'<g transform="translate(0 {TITLE})">{curves}</g>\n'
        f'<g transform="translate({WIDTH if curves else 0} {TITLE})">{scores}</g>\n'
    )


def draw_curves(rows: Sequence[Row]) -> Iterator[str]:
    """Draws top-1 against images seen: a line through the means and a band from min to max."""
    curves = [curve(row) for row in rows]
    max_images = max(images for points in curves for images, _ in points)
    unit, word = (1e6, "millions") if max_images >= 2e6 else (1e3, "thousands")
    seen = [value for points in curves for _, values in points for value in values]
    x = Axis.exact(0, max_images / unit, LEFT, RIGHT)
    y = Axis.rounded(min(seen), max(seen), BOTTOM, TOP)
    yield from (*x.grid(vertical=True), *y.grid(vertical=False))
    middle, below = (LEFT + RIGHT) / 2, BOTTOM + 30
    yield f'<text class="mid" x="{middle:g}" y="{below}">images seen ({word})</text>'
    yield heading("validation top-1 (%): mean and range of the seeds", LEFT)
    for number, points in enumerate(curves):
        color, dashed = color_style(number)
        at = [x.position(images / unit) for images, _ in points]
        columns = [[y.position(value) for value in values] for _, values in points]
        around = path(at, map(max, columns)) + " " + path(at[::-1], map(min, columns[::-1]))
        if len(rows[number]["runs"]) > 1:
            yield f'<polygon class="band" fill="{color}" points="{around}"/>'
        means = path(at, map(statistics.fmean, columns))
        yield f'<polyline class="line{dashed}" stroke="{color}" points="{means}"/>'


def curve(row: Row) -> list[tuple[float, list[float]]]:
    """Images seen and headline top-1 of each seed in percent, where all seeds were validated."""
    seeds = []
    for run in row["runs"]:
        column = 3 if "ema" in run["top1"] else 2
        seeds.append({point[0]: 100 * point[column] for point in run["curve"]})
    shared = sorted(set.intersection(*(set(seed) for seed in seeds)))
    return [(images, [seed[images] for seed in seeds]) for images in shared]


def draw_scores(rows: Sequence[Row]) -> Iterator[str]:
    """Draws top-1 at the last step: a dot per seed, a line at the mean, and the title and score."""
    values = [headline_top1(row) for row in rows]
    bottom = foot(len(rows))
    x = Axis.rounded(min(map(min, values)), max(map(max, values)), MARGIN, RIGHT)
    for tick in x.ticks:
        at = f"{x.position(tick):.1f}"
        yield f'<path class="grid" d="M{at} {TOP}V{bottom:g}"/>'
        yield f'<text class="mid" x="{at}" y="{bottom + 15:g}">{tick:,.6g}</text>'
    yield heading("top-1 (%) at the last step: each seed, and the mean", MARGIN)
    for number, (row, scores) in enumerate(zip(rows, values, strict=True)):
        color, _ = color_style(number)
        y = TOP + PITCH * (number + 0.5)
        kind = "EMA" if "ema" in row["runs"][0]["top1"] else "raw"
        yield key(number, MARGIN, y - 7)
        yield f'<text class="label" x="{MARGIN + 22}" y="{y - 3:g}">{escape(name(row))}</text>'
        text = f"{mean_and_deviation(scores)} {kind}"
        yield f'<text class="label end" x="{RIGHT}" y="{y - 3:g}">{text}</text>'
        for which, score in enumerate(scores):
            at, down = f"{x.position(score):.1f}", y + 4 + 4 * (which % 3)  # separates equal ones
            yield f'<circle class="dot" fill="{color}" cx="{at}" cy="{down:g}" r="3"/>'
        at = f"{x.position(statistics.fmean(scores)):.1f}"
        yield f'<path class="mean" stroke="{color}" d="M{at} {y + 2:g}V{y + 14:g}"/>'


def name(row: Row) -> str:
    """The title as plain text, truncated before it overlaps the score."""
    text = str(row["title"]).replace("`", "")
    return text if len(text) <= MAX_TITLE else f"{text[: MAX_TITLE - 1]}…"


def color_style(number: int) -> tuple[str, str]:
    """The color of a row's line, and a class that marks repeated colors."""
    cycle, which = divmod(number, len(COLORS))
    return COLORS[which], " dashed" if cycle % 2 else ""


def key(number: int, x: float, y: float) -> str:
    """Draws the legend key of a row: a piece of its line."""
    color, dashed = color_style(number)
    return f'<path class="line{dashed}" stroke="{color}" d="M{x:g} {y:g}h16"/>'


def path(x: Sequence[float], y: Any) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def heading(text: str, x: float) -> str:
    """Draws the heading of a panel."""
    return f'<text x="{x:g}" y="-4">{text}</text>'
