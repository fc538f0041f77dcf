"""Pack a dataset into one file of decoded squares or small JPEGs.

Decoded squares can be read with almost no CPU work.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from vitral.cli.common import TableOptions
from vitral.config import Config
from vitral.errors import UserError

ARGUMENTS = {"src": "SRC", "dst": "DST"}


@dataclass(frozen=True, kw_only=True)
class Options(TableOptions):
    """Options of `vitral data pack`."""

    size: int = 256
    """Side length of the squares or, with --jpeg, of the images' shorter side, in pixels."""
    jpeg: bool = False
    """Write JPEGs of quality 90 instead of decoded pixels: a seventh of the size, but they must be
    decoded during training."""
    workers: int | None = None
    """Number of decoding processes. Default: one per core."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"size: expected 1 or more, got {self.size}")


def run(args: argparse.Namespace, options: Options) -> int:
    """Packs the dataset and returns the exit code."""
    from vitral.data.tools.packing import pack
    from vitral.machine import available_cores

    config = dataclasses.replace(Config().data, path=args.src, **options.columns)
    workers = available_cores() if options.workers is None else options.workers
    print(pack(config, Config().train.seed, Path(args.dst), options.size, options.jpeg, workers))
    return 0
