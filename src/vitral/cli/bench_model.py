"""Measure the training step on synthetic images; with --peers, compare with timm's models."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from vitral.cli.common import load_config

ARGUMENTS = {"recipe": "RECIPE?"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `vitral bench model` in addition to the settings."""

    peers: bool = False
    """Also measure timm's models."""


def run(args: argparse.Namespace, options: Options) -> int:
    """Prints the measurements and returns the exit code."""
    config = load_config(args)
    from vitral.bench.model import bench_model

    print(bench_model(config, options.peers))
    return 0
