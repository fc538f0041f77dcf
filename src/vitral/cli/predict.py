"""Classify images.

PATH is a file, a folder, a quoted glob pattern, or - to read paths from standard input.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vitral.cli.common import EngineOptions
from vitral.errors import UserError
from vitral.files import check_output

ARGUMENTS = {"weights": "WEIGHTS", "paths": "PATH+"}


@dataclass(frozen=True, kw_only=True)
class Options(EngineOptions):
    """Options of `vitral predict`."""

    top: int = 5
    """Number of classes per image. Weights for several labels per image list all classes that
    reach their threshold instead."""
    min_confidence: float = 0.0
    """Report "unknown" if the probability of the most likely class is below this value."""
    tta: Literal["none", "flip", "five-crop"] = "none"
    """Test-time augmentation: average the probabilities of an image and its mirror image (flip),
    or of crops at its four corners and center (five-crop)."""
    image_size: int | None = None
    """Side length of the model's input, in pixels, a multiple of the patch size. Default: the
    training size."""
    which: Literal["model", "ema"] | None = None
    """Weights to use: raw (model) or averaged (ema). Default: as stored with the weights."""
    batch_size: int = 64
    """Number of images per forward pass."""
    workers: int | None = None
    """Number of decoding processes. Default: all cores but one."""
    json: bool = False
    """Print one JSON object per image, one per line."""
    csv: bool = False
    """Print CSV, one line per image and class."""
    out: str | None = None
    """File to write to instead of standard output."""

    def __post_init__(self) -> None:
        if self.json and self.csv:
            raise UserError("json, csv: expected one of the two, got both")


def run(args: argparse.Namespace, options: Options) -> int:
    """Writes the predictions and returns the exit code."""
    from vitral.engines.choice import pick_engine_device, with_engine
    from vitral.inference.output import write
    from vitral.inference.predict import find_images, predictions
    from vitral.weights import load

    device = pick_engine_device(options.engine, options.device)
    weights = load(args.weights, which=options.which, device=device)
    images = find_images(args.paths)
    found = predictions(
        with_engine(weights, options.engine),
        images,
        options.top,
        min_confidence=options.min_confidence,
        tta=options.tta,
        image_size=options.image_size,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    out = None if options.out is None else Path(options.out)
    if out is not None:
        check_output(out)
    form = "json" if options.json else "csv" if options.csv else "text"
    read = write(found, len(images), form, out)
    # The other formats contain it. Weights for several labels cannot be calibrated.
    if read and form == "text" and not weights.description.multi_label:
        state = "not calibrated: the weights have no temperature"
        if (temperature := weights.description.temperature) is not None:
            state = f"calibrated with temperature {temperature:.4g}"
        print(f"vitral: probabilities are {state}", file=sys.stderr)
    return 0 if read else 1
