"""Show what this machine offers: devices, kernels, decoders, disk."""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace, _: None) -> int:
    """Prints; returns the exit code."""
    from vitral.doctor import examine

    print(examine())
    return 0
