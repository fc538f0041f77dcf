"""Write a picture of a training batch before and after augmentation.

--out is the file of the picture, by default preview.jpg.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vitral.cli.common import load_config
from vitral.errors import UserError, printable
from vitral.files import check_output

ARGUMENTS = {"path": "PATH", "recipe": "RECIPE?"}


def run(args: argparse.Namespace, _: None) -> int:
    """Writes the picture and returns the exit code."""
    (out,) = vars(args).pop("train.out", ["preview.jpg"])
    config = load_config(args)
    if Path(out).suffix.lower() not in (".jpg", ".png"):
        raise UserError(f"out: expected a name that ends in .jpg or .png, got {out or 'nothing'}")
    from vitral.data.tools.preview import preview

    check_output(Path(out))
    preview(config, Path(out))
    print(f"{printable(out)}: each image as used in validation, and below it as used in training")
    return 0
