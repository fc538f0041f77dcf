"""Upload weights and their model card to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

ARGUMENTS = {"weights": "WEIGHTS", "name": "OWNER/NAME"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `vitral push`."""

    license: str | None = None
    """License of the weights, as an SPDX identifier such as Apache-2.0. Default: none stated."""
    private: bool = False
    """Make the repository private; stops with an error if it is already public."""
    dry_run: bool = False
    """Print the model card without uploading anything."""


def run(args: argparse.Namespace, options: Options) -> int:
    """Uploads the weights and returns the exit code."""
    from vitral import hub

    hub.check_name(args.name)
    from vitral.inference.card import card, push
    from vitral.weights import load

    weights = load(args.weights)
    if options.dry_run:
        print(card(weights, args.name, options.license), end="")
    else:
        print(push(weights, args.name, private=options.private, license=options.license))
    return 0
