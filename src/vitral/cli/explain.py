"""Show what a model attends to, and test whether its prediction depends on it."""

from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vitral.config import Device
from vitral.errors import printable
from vitral.files import check_writable

ARGUMENTS = {"weights": "WEIGHTS", "paths": "PATH+"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `vitral explain`."""

    layer: int | None = None
    """Layer whose heads are shown, counted from 0; None uses the last layer."""
    patch: tuple[int, int] | None = None
    """Row and column of the patch to explain, from 0; None uses the most attended one."""
    image_size: int | None = None
    """Side of the model's input, a multiple of its patch size; None uses that of training."""
    which: Literal["model", "ema"] | None = None
    """Raw or averaged weights; None uses the default of the weights."""
    device: Device = "auto"
    """Device to run on; auto uses a GPU if there is one."""
    out: str = "explain"
    """Directory to write the pictures to."""


def run(args: argparse.Namespace, options: Options) -> int:
    """Writes the pictures and returns the exit code."""
    from vitral.inference.explain import explanations, save
    from vitral.inference.predict import find_images
    from vitral.machine import pick_device
    from vitral.weights import load

    weights = load(args.weights, which=options.which, device=str(pick_device(options.device)))
    images = find_images(args.paths)
    out, some = Path(options.out), False
    new = not os.path.lexists(out)
    check_writable(out)
    try:
        for name, explanation in explanations(
            weights,
            images,
            layer=options.layer,
            patch=options.patch,
            image_size=options.image_size,
        ):
            if explanation is not None:
                save(explanation, out, name)
                print(f"{printable(out / name)}_explained.png: {explanation.summary}", flush=True)
                some = True
    finally:
        if new and not some:
            with contextlib.suppress(OSError):
                out.rmdir()
    return 0 if some else 1
