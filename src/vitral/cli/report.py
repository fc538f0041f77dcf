"""Write a self-contained HTML page about a run, or a comparison of several runs."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from vitral.cli.common import TableOptions
from vitral.errors import UserError, printable
from vitral.files import check_output

ARGUMENTS = {"runs": "RUN+"}


@dataclass(frozen=True, kw_only=True)
class Options(TableOptions):
    """Options of `vitral report`."""

    data: str | None = None
    """Current path of the run's dataset. Default: the path in its settings."""
    out: str | None = None
    """File to write. Default: report.html in the run directory, or in the current directory for
    several runs."""
    label_errors: bool = False
    """Add images whose label is probably wrong to the report, and write label_errors.csv next to
    it."""


def run(args: argparse.Namespace, options: Options) -> int:
    """Writes the report and returns the exit code."""
    several = len(args.runs) > 1
    if several and (options.data is not None or options.label_errors):
        name = "label-errors" if options.data is None else "data"
        raise UserError(f"{name}: not supported for several runs, which are compared by their logs")
    from vitral.report.html import write_comparison, write_report
    from vitral.report.predictions import evaluate_best
    from vitral.rundir import REPORT, read_run

    runs = [read_run(Path(path)) for path in args.runs]
    out = Path(options.out or (Path() if several else runs[0].path) / REPORT)
    check_output(out)
    if several:
        write_comparison(runs, out)
    else:
        predictions, missing, errors = None, "", None
        try:
            predictions = evaluate_best(runs[0], options.data, options.columns)
        except UserError as error:
            if options.label_errors:
                raise
            missing = str(error)
            print(f"vitral: no predictions: {printable(str(error))}", file=sys.stderr)
        if options.label_errors and predictions is not None:
            from vitral.evaluation.label_errors import FILE
            from vitral.training.label_errors import find_label_errors

            errors = find_label_errors(runs[0], predictions)
            errors.write(out.with_name(FILE))
            print(printable(out.with_name(FILE)))
        write_report(runs[0], out, predictions, missing, errors)
    print(printable(out))
    return 0
