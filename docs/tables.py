"""Writes the tables of options, settings and recipes into the pages: `python docs/tables.py`.

A table is between `<!-- table: NAME -->` and `<!-- end -->`, where NAME is a command with options
such as `vitral val`, a section of the settings, `presets` or `recipes`. The tests check that the
pages are up to date.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from vitral import cli, config, settings
from vitral.settings import SHORTCUTS, Field, shown

PAGES = Path(__file__).parent
SECTIONS = tuple(field.name for field in dataclasses.fields(config.Config))
VALUES = {int: "integer", float: "number", str: "text", bool: "switch", config.Seconds: "time"}
HEADER = ("command", "data", "hardware", "hours", "result")  # keys in the header of a recipe


def main() -> None:
    """Writes every page whose tables differ from the code."""
    for page in sorted(PAGES.glob("*.md")):
        old = page.read_text(encoding="utf-8")
        if (new := filled(old)) != old:
            page.write_text(new, encoding="utf-8")
            print(page)


def filled(text: str) -> str:
    """Returns a page with its tables regenerated."""
    return re.sub(
        r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def table(name: str) -> str:
    """Returns the table of that name in Markdown."""
    if name == "presets":
        return _presets()
    if name == "recipes":
        return _recipes()
    if name.startswith("vitral "):
        return _rows(_command(name.removeprefix("vitral ")))
    return _rows(f for f in settings.fields(config.Config()) if f.path.startswith(f"{name}."))


def commands() -> list[str]:
    """Returns the commands that have options besides the settings, such as `vitral val`."""
    return [f"vitral {name}" for name in cli.COMMANDS if hasattr(_module(name), "Options")]


def _module(command: str) -> Any:
    return importlib.import_module(f"vitral.cli.{cli.COMMANDS[command]}")


def _command(name: str) -> Iterator[Field]:
    """Yields the options of a command; for `train`, first the settings that have shortcuts."""
    if name == "train":
        found = {field.path: field for field in settings.fields(config.Config())}
        yield from (found[path] for path in SHORTCUTS)
    yield from settings.fields(_module(name).Options())


def _rows(fields: Iterable[Field]) -> str:
    lines = ["| option | value | default | meaning |", "|---|---|---|---|"]
    for path, kind, value, doc in fields:
        word = path.replace("_", "-")
        option = f"`--{word}`"
        if path in SHORTCUTS:
            option = f"`--{SHORTCUTS[path]}` or {option}"
        if value is True:  # the option is only useful to turn it off
            section, dot, key = word.rpartition(".")
            option += f" (off: `--{section}{dot}no-{key}`)"
        default = "" if "Default: " in doc else f"`{shown(value)}`"
        meaning = doc.replace("<", "&lt;")
        lines.append(f"| {option} | {_value(kind)} | {default} | {meaning} |")
    return "\n".join(lines)


def _value(kind: Any) -> str:
    """Describes the values that an option of a type accepts."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in args)
    if origin in (UnionType, typing.Union):
        return " or ".join(_value(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        if args[-1] is not Ellipsis:
            count = {2: "two", 3: "three"}[len(args)]
            return f"{count} {_value(args[0])}s"
        return f"{_value(args[0])}s" if args[0] in VALUES else "pairs of image size and fraction"
    return VALUES[kind]


def _presets() -> str:
    names = ("size", *config.Shape._fields)
    rows = [names, ["---"] * len(names), *((size, *s) for size, s in config.PRESETS.items())]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _recipes() -> str:
    lines = ["| recipe | hardware | hours | result |", "|---|---|---|---|"]
    for name in settings.recipes():
        title, facts = header(name)
        cells = (f"`{name}`<br>{title}", *(facts[key] for key in HEADER[2:]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def header(name: str) -> tuple[str, dict[str, str]]:
    """Returns the title of a recipe and the facts in its header, by key."""
    comment = settings.recipe_text(name).split("\n\n")[0].replace("\n#              ", " ")
    comment = comment.replace("docs/results.md", "[results](results.md)")
    lines = [line.lstrip("# ") for line in comment.splitlines()]
    facts = (line.split(maxsplit=1) for line in lines if line.startswith(HEADER))
    return lines[0], {key: text for key, text in facts if key in HEADER}


if __name__ == "__main__":
    main()
