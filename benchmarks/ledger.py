"""Maintains the ledger of results: one JSON file per row, and the pages that show the rows.

    python benchmarks/ledger.py add NAME RUN [RUN ...] [--title T] [--data D] [--study S] [--note N]
    python benchmarks/ledger.py draw [--check]

`add` writes docs/results/NAME.json from finished runs that differ only in their seed. `draw`
regenerates the tables and figures of docs/results.md and README.md from these files; with `--check`
it only reports whether they are up to date. Scores are those of the last step, never of the best
validation. The headline score of a row is that of the averaged weights (EMA) if its recipe keeps
them, and of the raw weights otherwise, even if the other score is higher. Both are shown.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ledger_pages import draw, stale
from ledger_rows import ROOT, headline_top1, mean_and_deviation, summarize, write

from vitral.errors import UserError


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command on a checkout; returns 0, 1 for stale pages, or 2 for a user error."""
    options = parse(arguments)
    try:
        if options.command == "add":
            add(options, root)
            return 0
        if not options.check:
            draw(root)
        elif names := stale(root):
            print(f"{', '.join(names)}: stale; run `python benchmarks/ledger.py draw`")
            return 1
    except UserError as error:
        print(f"ledger: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="write docs/results/NAME.json")
    option = adding.add_argument
    option("name", metavar="NAME")
    option("runs", metavar="RUN", nargs="+", type=Path, help="finished runs, one per seed")
    option("--title", help="title of the row (default: the name of the recipe)")
    option("--data", help="name of the data, including any re-encoding (default: the dataset name)")
    option("--study", help="study that the row belongs to (default: none, a headline row)")
    option("--note", default="", help="remark shown below the title")
    option("--commit", help="commit of the training code (default: that of this checkout)")
    drawing = commands.add_parser("draw", help="regenerate the tables and figures")
    drawing.add_argument("--check", action="store_true", help="only report stale files")
    return parser.parse_args(arguments)


def add(options: argparse.Namespace, root: Path) -> None:
    """Writes a row.

    Raises:
        UserError: if a name is invalid, or if the runs do not form a row.
    """
    for what, name in (("name", options.name), ("study", options.study)):
        if name is not None and not re.fullmatch(r"\w[\w-]*", name):
            raise UserError(f"{what}: expected letters, digits and hyphens, got {name!r}")
    row = summarize(
        options.runs,
        title=options.title,
        data=options.data,
        study=options.study,
        note=options.note,
        commit=options.commit,
    )
    path = root / "docs" / "results" / f"{options.name}.json"
    write(row, path)
    raw = mean_and_deviation([100 * run["top1"]["raw"] for run in row["runs"]])
    print(f"{path}: top-1 {mean_and_deviation(headline_top1(row))}, raw {raw}")


if __name__ == "__main__":
    sys.exit(main())
