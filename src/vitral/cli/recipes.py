"""List the recipes, or print one."""

from __future__ import annotations

import argparse

from vitral import settings

ARGUMENTS = {"name": "NAME?"}


def run(args: argparse.Namespace, _: None) -> int:
    """Prints the recipe or the list and returns the exit code."""
    if args.name is not None:
        print(settings.recipe_text(args.name), end="")
        return 0
    for name in settings.recipes():
        print(f"{name:20}  {settings.recipe_text(name).splitlines()[0].lstrip('# ')}")
    return 0
