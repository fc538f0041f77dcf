"""Write a feature vector for each image to a .npz or .parquet file."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vitral.cli.common import EngineOptions
from vitral.errors import UserError, counted, printable
from vitral.files import check_output

ARGUMENTS = {"weights": "WEIGHTS", "paths": "PATH+"}


@dataclass(frozen=True, kw_only=True)
class Options(EngineOptions):
    """Options of `vitral embed`."""

    out: str = "features.npz"
    """File to write: .npz, or .parquet (needs pyarrow)."""
    normalize: bool = False
    """Scale each vector to length 1."""
    image_size: int | None = None
    """Side length of the model's input, in pixels, a multiple of the patch size. Default: the
    training size."""
    which: Literal["model", "ema"] | None = None
    """Weights to use: raw (model) or averaged (ema). Default: as stored with the weights."""
    batch_size: int = 64
    """Number of images per forward pass."""
    workers: int | None = None
    """Number of decoding processes. Default: all cores but one."""

    def __post_init__(self) -> None:
        if Path(self.out).suffix not in (".npz", ".parquet"):
            raise UserError(f"out: expected a name that ends in .npz or .parquet, got {self.out}")


def run(args: argparse.Namespace, options: Options) -> int:
    """Writes the features and returns the exit code, 1 if an image cannot be read."""
    from vitral.engines.choice import pick_engine_device, with_engine
    from vitral.inference.embed import embed, write
    from vitral.inference.predict import find_images, load

    check_output(Path(options.out))
    device = pick_engine_device(options.engine, options.device)
    weights = load(args.weights, which=options.which, device=device)
    features = embed(
        with_engine(weights, options.engine),
        find_images(args.paths),
        normalize=options.normalize,
        image_size=options.image_size,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    write(features, Path(options.out))
    found, dim = features.vectors.shape
    print(f"{printable(options.out)}: {counted(found, 'image')}, {counted(dim, 'feature')}")
    return 1 if features.unreadable else 0
