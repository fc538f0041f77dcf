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
    """Layer whose heads are shown, counted from 0. Default: the last layer."""
    patch: tuple[int, int] | None = None
    """Row and column of the patch to explain, counted from 0. Default: the patch with the highest
    attention."""
    image_size: int | None = None
    """Side length of the model's input, in pixels, a multiple of the patch size. Default: the
    training size."""
    which: Literal["model", "ema"] | None = None
    """Weights to use: raw (model) or averaged (ema). Default: as stored with the weights."""
    device: Device = "auto"
    """Device to run on; auto uses a GPU if one is available."""
    out: str = "explain"
    """Directory to write the images to."""


def run(args: argparse.Namespace, options: Options) -> int:
    """Writes the images and returns the exit code."""
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
