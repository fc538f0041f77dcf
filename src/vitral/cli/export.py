"""Export a model as an ONNX file or a torch.export archive, and compare it with the original."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Literal

from vitral.errors import UserError, printable

ARGUMENTS = {"weights": "WEIGHTS"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `vitral export`."""

    format: Literal["onnx", "pt2"] = "onnx"
    """onnx for onnxruntime and other runtimes, pt2 for torch.export.load."""
    out: str | None = None
    """File to write or replace. Default: the name of the run, in the current directory."""
    which: Literal["model", "ema"] | None = None
    """Weights to use: raw (model) or averaged (ema). Default: as stored with the weights."""
    opset: Literal[20, 23] = 20
    """ONNX opset; 23 has operators for attention and RMSNorm, which older runtimes lack."""
    data: str | None = None
    """Dataset to compare on. Default: the dataset that the weights were trained on, if found."""
    images: int = 256
    """Number of validation images to compare on; 0 compares only on random images."""

    def __post_init__(self) -> None:
        if self.images < 0:
            raise UserError(f"images: expected 0 or more, got {self.images}")


def run(args: argparse.Namespace, options: Options) -> int:
    """Exports the model and returns the exit code."""
    from vitral.inference.export import ExportError, export

    try:
        exported = export(args.weights, **vars(options))
    except ExportError as error:
        print(f"vitral: {printable(str(error))}; the file was discarded", file=sys.stderr)
        return 1
    for file in exported.files:
        print(f"{printable(file)}: {file.stat().st_size / 1e6:.1f} MB")
    print(*exported.agreements, sep="\n")
    if options.images and len(exported.agreements) == 1:
        print("training data not found; pass --data PATH to compare on validation images")
    return 0
