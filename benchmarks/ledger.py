"""The ledger of results: a file for each row, made from run folders, and the pages that show them.

    python benchmarks/ledger.py add NAME RUN [RUN ...] [--title T] [--data D] [--study S] [--note N]
    python benchmarks/ledger.py draw [--check]

`add` writes docs/results/NAME.json from finished runs that differ in their seed alone; `draw`
writes the tables and figures of docs/results.md and README.md anew from these files, and with
`--check` only tells whether they are what the files say. Scores are those of the last step, never
of the best validation. A row is quoted with the averaged weights (EMA) where its recipe keeps them
and with the raw ones elsewhere, whichever score better; both are shown.
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
    """Runs the command on a checkout; returns 0, 1 for stale pages, 2 for a user's mistake."""
    options = parse(arguments)
    try:
        if options.command == "add":
            add(options, root)
            return 0
        if not options.check:
            draw(root)
        elif names := stale(root):
            print(f"{', '.join(names)}: stale; `python benchmarks/ledger.py draw` mends it")
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
    option("runs", metavar="RUN", nargs="+", type=Path, help="finished runs, a seed each")
    option("--title", help="what the row is; else the name of its recipe")
    option("--data", help="what it was measured on, re-encoding named; else the set's name")
    option("--study", help="the experiment that it belongs to; else it is a headline row")
    option("--note", default="", help="what else must be known")
    option("--commit", help="of the code that trained; else that of this checkout")
    drawing = commands.add_parser("draw", help="write tables and figures anew")
    drawing.add_argument("--check", action="store_true", help="only tell whether one is stale")
    return parser.parse_args(arguments)


def add(options: argparse.Namespace, root: Path) -> None:
    """Writes a row.

    Raises:
        UserError: for a name that is none, or runs that make no row.
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
