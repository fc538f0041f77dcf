"""Show what this machine supports: devices, kernels, decoders and disk."""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace, _: None) -> int:
    """Prints the report and returns the exit code."""
    from vitral.doctor import examine

    print(examine())
    return 0
