"""Writes the tables of options, settings and recipes into the pages: `python docs/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. NAME is a dataclass of vitral.cli,
a section of the settings, `presets` or `recipes`. The tests compare the pages with what comes out.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import typing
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from vitral import cli, config, recipes

PAGES = Path(__file__).parent
SECTIONS = {
    "model": config.ViTConfig,
    "data": config.DataConfig,
    "augment": config.AugmentConfig,
    "optim": config.OptimConfig,
    "train": config.TrainConfig,
}
WORDS = {int: "integer", float: "number", str: "text", bool: "switch"}
HEADER = ("command", "data", "hardware", "hours", "result")  # what a recipe says of itself


def main() -> None:
    """Writes every page whose tables are not what the code says."""
    for page in sorted(PAGES.glob("*.md")):
        was = page.read_text(encoding="utf-8")
        if (now := filled(was)) != was:
            page.write_text(now, encoding="utf-8")
            print(page)


def filled(text: str) -> str:
    """A page with its tables written anew."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def table(name: str) -> str:
    """The table of that name, in Markdown."""
    if name == "presets":
        return _presets()
    if name == "recipes":
        return _recipes()
    section = SECTIONS.get(name)
    return _options(section or getattr(cli, name), f"{name}." if section else "")


def _options(settings: type, prefix: str) -> str:
    meanings, kinds = _meanings(settings), typing.get_type_hints(settings)
    lines = ["| option | value | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(settings):
        kind, default = kinds[field.name], field.default
        word = field.name.replace("_", "-")
        flag = f"`--{prefix}{word}`"
        if default is True:  # the only thing to do with it is to turn it off
            flag += f" (off: `--{prefix}no-{word}`)"
        meaning = meanings[field.name].replace("<", "&lt;")
        lines.append(f"| {flag} | {_value(kind)} | `{_shown(default)}` | {meaning} |")
    return "\n".join(lines)


def _meanings(settings: type) -> dict[str, str]:
    """The docstring under each field."""
    (body,) = ast.parse(inspect.getsource(settings)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(before, ast.AnnAssign) and is_text:
            assert isinstance(before.target, ast.Name)
            found[before.target.id] = " ".join(str(after.value.value).split())
    return found


def _value(kind: Any) -> str:
    """What a setting of a type takes, in words."""
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if typing.get_origin(kind) in (UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
        return _value(kind)
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if parts[-1] is Ellipsis:
            return (
                "pairs of a size and a share" if parts[0] not in WORDS else f"{_value(parts[0])}s"
            )
        counted = {2: "two", 3: "three"}[len(parts)]
        return f"{counted} {_value(parts[0])}s"
    return WORDS[kind]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(_shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _presets() -> str:
    names = ("size", *config.Shape._fields)
    rows = [names, ["---"] * len(names), *((size, *s) for size, s in config.PRESETS.items())]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _recipes() -> str:
    lines = ["| recipe | hardware | hours | result |", "|---|---|---|---|"]
    for name in recipes.names():
        title, facts = header(name)
        cells = (f"`{name}`<br>{title}", *(facts[key] for key in HEADER[2:]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def header(name: str) -> tuple[str, dict[str, str]]:
    """What a recipe is for, and the facts that its header states."""
    comment = recipes.text(name).split("\n\n")[0].replace("\n#              ", " ")
    comment = comment.replace("docs/results.md", "[results](results.md)")
    lines = [line.lstrip("# ") for line in comment.splitlines()]
    facts = (line.split(maxsplit=1) for line in lines if line.startswith(HEADER))
    return lines[0], {key: text for key, text in facts if key in HEADER}


if __name__ == "__main__":
    main()
