"""Convert a pretrained model from timm to a weight directory, and compare the outputs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from vitral.errors import UserError, counted, printable
from vitral.files import check_writable

ARGUMENTS = {"name": "timm:NAME", "directory": "DIR"}
PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `vitral import`."""

    file: str | None = None
    """Weights file to convert instead of downloading, with timm's or the original parameter
    names."""


def run(args: argparse.Namespace, options: Options) -> int:
    """Converts the model and returns the exit code."""
    from vitral.weights import public

    if not args.name.startswith(public.PREFIX):
        raise UserError(f"name: expected {public.PREFIX}NAME, got {args.name}")
    if options.file is not None and not Path(options.file).is_file():
        raise UserError(
            f"file: expected a weights file, got {options.file}, which does not exist or is not a "
            "file"
        )
    place = Path(args.directory)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place}: expected a new or empty directory, got one with files")
    check_writable(place.parent)
    name = args.name.removeprefix(public.PREFIX)
    imported, description = public.write(name, public.create(name, options.file), place)
    known = description.classes
    classes = counted(len(known), "class") if known else "no classifier"
    print(
        f"{printable(place)}: {imported.model.num_parameters / 1e6:.1f} M parameters, {classes}; "
        f"largest difference from timm's outputs {imported.error:.1e} of their rms"
    )
    if imported.folded:
        channels = counted(imported.folded, "channel")
        print(f"LayerScale is folded into the weights in {channels}, where it is close to 0")
    license = description.license or "unknown"
    caution = "" if license.lower() in PERMISSIVE else "; read it before using the weights"
    print(f"license: {license}{caution}")
    return 0
