"""Draw a training batch before and after augmentation."""

from __future__ import annotations

import argparse
from pathlib import Path

from vitral.cli.common import load_config
from vitral.errors import UserError, printable
from vitral.files import check_output
from vitral.settings import Field

ARGUMENTS = {"path": "PATH", "recipe": "RECIPE?"}
OUT = "preview.jpg"
REPLACEMENTS = (Field("train.out", str, OUT, "Image file to write."),)


def run(args: argparse.Namespace, _: None) -> int:
    """Writes the image and returns the exit code."""
    (out,) = vars(args).pop("train.out", [OUT])
    config = load_config(args)
    if Path(out).suffix.lower() not in (".jpg", ".png"):
        raise UserError(f"out: expected a name that ends in .jpg or .png, got {out or 'nothing'}")
    from vitral.data.tools.preview import preview

    check_output(Path(out))
    preview(config, Path(out))
    print(f"{printable(out)}: each image as used in validation, and below it as used in training")
    return 0
