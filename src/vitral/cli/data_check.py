"""Check a dataset: counts, classes, broken files and decoding rate."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

from vitral.cli.common import TableOptions
from vitral.config import Config

ARGUMENTS = {"path": "PATH"}


@dataclass(frozen=True, kw_only=True)
class Options(TableOptions):
    """Options of `vitral data check`."""

    workers: int | None = None
    """Number of decoding processes. Default: one per core."""


def run(args: argparse.Namespace, options: Options) -> int:
    """Prints the report and returns the exit code, 2 if there are broken files."""
    from vitral.data.tools.check import check, format_report
    from vitral.machine import available_cores

    config = dataclasses.replace(Config().data, path=args.path, **options.columns)
    workers = available_cores() if options.workers is None else options.workers
    report = check(config, Config().model.image_size, Config().train.seed, workers)
    print(format_report(report))
    return 2 if report.broken else 0
