"""Writes the ledger's tables and figures into docs/results.md and README.md.

The rows are docs/results/*.json. The headline rows are between `<!-- ledger -->` and
`<!-- end -->`, those of a study between `<!-- ledger: STUDY -->` and `<!-- end -->`. README.md
contains only the headline rows, without their commands.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from ledger_figures import figure
from ledger_rows import Row, mean_and_deviation, read

from vitral.errors import UserError
from vitral.storage import replacing

PAGES = {"docs/results.md": "", "README.md": "docs/"}  # each with its path to docs
BLOCK = re.compile(r"(<!-- ledger(?:: ([\w-]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
EMPTY = "Nothing measured yet."
KINDS = ("ema", "raw")
HEADER = (
    "run",
    "data",
    "seeds",
    "images seen",
    "training FLOPs",
    "hardware",
    "minutes",
)
IMBALANCE = "imbalance"  # the study whose rows also show the balanced accuracy
MEASURES = (("top-1", "top1"), ("balanced accuracy", "balanced"))


def draw(root: Path) -> None:
    """Writes the stale files, and removes figures without rows.

    Raises:
        UserError: if a page has no block for a study or for the headline rows.
    """
    expected = contents(root)
    for name in stale(root):
        print(name)
        if name not in expected:
            (root / name).unlink()
            continue
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(root / name) as file:
            file.write_text(expected[name], encoding="utf-8")


def stale(root: Path) -> list[str]:
    """Pages and figures that do not match the rows, as paths from the root."""
    expected = contents(root)
    drawn = {f"docs/images/{path.name}" for path in root.glob("docs/images/results*.svg")}
    return [
        name for name in sorted(expected.keys() | drawn) if text(root / name) != expected.get(name)
    ]


def text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def contents(root: Path) -> dict[str, str]:
    """The expected contents of pages and figures, by their paths from the root."""
    studies: dict[str | None, dict[str, Row]] = {}
    for name, row in read(root / "docs" / "results").items():
        studies.setdefault(row["study"], {})[name] = row
    expected = {name: filled(root, name, way, studies) for name, way in PAGES.items()}
    for study, rows in studies.items():
        expected[f"docs/{picture(study)}"] = figure(list(rows.values()))
    return expected


def filled(root: Path, page: str, way: str, studies: dict[str | None, dict[str, Row]]) -> str:
    """A page with its blocks regenerated."""
    old = (root / page).read_text(encoding="utf-8")
    places = {found[2] for found in BLOCK.finditer(old)}
    needed = {None} if page == "README.md" else studies.keys()
    for study in sorted(needed - places, key=str):
        mark = f"<!-- ledger{f': {study}' if study else ''} -->"
        raise UserError(f"{page}: expected a line {mark}, and <!-- end --> after it; add both")
    detailed = page != "README.md"
    return BLOCK.sub(
        lambda found: (
            f"{found[1]}\n{block(found[2], studies.get(found[2], {}), way, detailed)}\n\n{found[3]}"
        ),
        old,
    )


def block(study: str | None, rows: dict[str, Row], way: str, commands: bool) -> str:
    """The table, the figure and the commands of a study."""
    if not rows:
        return EMPTY
    place = f"{way}{picture(study)}"
    caption = f"Validation top-1 against images seen, and at the last step{of_study(study)}"
    measures = MEASURES if study == IMBALANCE else MEASURES[:1]
    header = [*HEADER, *(f"{title}, {kind}" for title, _ in measures for kind in ("EMA", "raw"))]
    lines = [cells(row, f"{way}results/{name}.json", measures) for name, row in rows.items()]
    parts = [table([*header, "commit"], lines), f"[![{caption}]({place})]({place})"]
    if commands:
        lines = dict.fromkeys(row["command"] for row in rows.values())
        parts.append("```sh\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(parts)


def of_study(study: str | None) -> str:
    return f": {study}" if study else ""


def picture(study: str | None) -> str:
    """The path of a study's figure, relative to docs."""
    return f"images/results{f'-{study}' if study else ''}.svg"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ([cell.replace("|", "\\|") for cell in line] for line in (header, *rows))
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(header) + "|", *rest])


def scores(row: Row, measure: str = "top1") -> list[str]:
    """A score of the averaged and the raw weights in percent; the headline score is bold."""
    runs = [run[measure] for run in row["runs"]]
    found = {kind: [100 * run[kind] for run in runs if kind in run] for kind in KINDS}
    ema, raw = (mean_and_deviation(values) if values else "" for values in found.values())
    return [f"**{ema}**", raw] if ema else ["none", f"**{raw}**"]


def images(row: Row) -> str:
    """Images seen in training, as the mean over the seeds."""
    return f"{statistics.fmean(run['images'] for run in row['runs']):,.0f}"


def cells(row: Row, link: str, measures: Sequence[tuple[str, str]]) -> list[str]:
    """The cells of a row."""
    runs = row["runs"]
    note = f"<br>{row['note']}" if row["note"] else ""
    return [
        f"[{row['title']}]({link}){note}",
        row["data"],
        ", ".join(str(run["seed"]) for run in runs),
        images(row),
        operations(statistics.fmean(run["flops"] for run in runs)),
        row["hardware"],
        minutes(row),
        *(cell for _, measure in measures for cell in scores(row, measure)),
        f"`{row['commit']}`",
    ]


def operations(flops: float) -> str:
    """FLOPs with three digits, in PFLOPs, or in EFLOPs from 0.1 EFLOPs on."""
    unit, word = (1e18, "EFLOPs") if flops >= 1e17 else (1e15, "PFLOPs")
    return f"{flops / unit:.3g} {word}"


def minutes(row: Row) -> str:
    """The mean over the seeds, with one decimal below 100 minutes."""
    mean = statistics.fmean(run["minutes"] for run in row["runs"])
    return f"{mean:.1f}" if mean < 100 else f"{mean:,.0f}"
