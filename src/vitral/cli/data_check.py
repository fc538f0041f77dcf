"""Check a dataset: counts, classes, broken files and decoding rate."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from vitral.cli.common import TableOptions
from vitral.config import Config
from vitral.errors import UserError
from vitral.files import check_output

ARGUMENTS = {"path": "PATH"}


@dataclass(frozen=True, kw_only=True)
class Options(TableOptions):
    """Options of `vitral data check`."""

    workers: int | None = None
    """Number of decoding processes. Default: one per core."""
    duplicates: bool = False
    """Search for identical and similar images, within and across splits."""
    out: str | None = None
    """CSV file to write the groups of duplicates to; requires --duplicates."""

    def __post_init__(self) -> None:
        if self.out is not None and not self.duplicates:
            raise UserError("out: expected --duplicates with --out, got only --out; add it")


def run(args: argparse.Namespace, options: Options) -> int:
    """Prints the report and returns the exit code, 2 if there are broken files."""
    from vitral.data.tools.check import check, format_report
    from vitral.machine import available_cores

    config = dataclasses.replace(Config().data, path=args.path, **options.columns)
    workers = available_cores() if options.workers is None else options.workers
    if options.out is not None:
        check_output(Path(options.out))
    image_size, seed = Config().model.image_size, Config().train.seed
    report = check(config, image_size, seed, workers, options.duplicates)
    print(format_report(report))
    if options.out is not None:
        assert report.duplicates is not None
        report.duplicates.write(Path(options.out))
    return 2 if report.broken else 0
