"""Measure training, compared with the training step on synthetic images."""

from __future__ import annotations

import argparse

from vitral.cli.common import load_config

ARGUMENTS = {"recipe": "RECIPE?"}


def run(args: argparse.Namespace, _: None) -> int:
    """Prints the measurements and returns the exit code."""
    config = load_config(args)
    from vitral.bench.train import bench_train

    print(bench_train(config))
    return 0
