"""Measure the speed of all input pipelines, compared with torchvision's transforms."""

from __future__ import annotations

import argparse

from vitral.cli.common import load_config

ARGUMENTS = {"path": "PATH", "recipe": "RECIPE?"}


def run(args: argparse.Namespace, _: None) -> int:
    """Prints the measurements and returns the exit code."""
    config = load_config(args)
    from vitral.bench.data import bench_data

    print(bench_data(config))
    return 0
