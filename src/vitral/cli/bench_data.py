"""Measure every input path in images per second, next to torchvision's transforms."""

from __future__ import annotations

import argparse

from vitral.cli.common import load_config

ARGUMENTS = {"path": "PATH", "recipe": "RECIPE?"}


def run(args: argparse.Namespace, _: None) -> int:
    """Measures; returns the exit code."""
    config = load_config(args)
    from vitral.bench.data import bench_data

    print(bench_data(config))
    return 0
