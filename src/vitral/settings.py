"""Settings: conversion of YAML recipes and command-line options to a Config, and back.

Values in a YAML file and values on the command line go through the same conversion, so errors have
the same messages in both. The options of commands are also dataclasses and use the same code.
Both are in one file because they share the conversion of words to values.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import sys
import time
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union

import yaml

from vitral.config import Config, Seconds, flatten
from vitral.errors import UserError, counted, did_you_mean, short
from vitral.files import read_regular

T = TypeVar("T")
OptionValues = Mapping[str, Sequence[str]]
"""The words given for each setting, by its dotted name, such as `optim.lr`."""
SHORTCUTS = {
    "data.path": "data",
    "data.image_column": "image-column",
    "data.label_column": "label-column",
    "data.task": "task",
    "data.label_separator": "label-separator",
    "data.group_column": "group-column",
    "data.split_column": "split-column",
    "train.init": "init",
    "train.out": "out",
    "train.epochs": "epochs",
    "train.time_budget": "time-budget",
    "train.batch_size": "batch-size",
    "optim.lr": "lr",
    "model.size": "model-size",
    "model.image_size": "image-size",
    "train.seed": "seed",
}
YAML_SUFFIXES = (".yaml", ".yml")
TEXT_TAG = "tag:yaml.org,2002:str"
MAX_NUMBER = 100  # characters
MAX_YAML = 1 << 16  # bytes; a file with all settings is a tenth of this size


def recipes() -> list[str]:
    """Returns the names of the recipes that come with vitral."""
    files = (resources.files("vitral") / "recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """Returns the YAML of a recipe.

    Raises:
        UserError: if there is no recipe with that name.
    """
    if name not in recipes():
        own = Path(name, "config.yaml")  # of a run directory
        hint = f"; did you mean {own}?" if own.is_file() else did_you_mean(name, recipes())
        raise UserError(
            f"recipe: expected the name of a recipe or a YAML file, got {name!r}{hint}; "
            "`vitral recipes` lists the recipes"
        )
    return (resources.files("vitral") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def read(source: str) -> dict[str, list[str]]:
    """Reads the values in a recipe.

    Args:
        source: the name of a recipe, or the path of a YAML file.

    Raises:
        UserError: for an unknown recipe, a file that is not YAML, or an unknown key.
    """
    content = _read_file(source) if source.endswith(YAML_SUFFIXES) else recipe_text(source)
    try:
        return dict(_values(content))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


@dataclass(frozen=True)
class Request:
    """The settings of a run, and which of them must not be changed automatically."""

    config: Config
    given: frozenset[str] = frozenset()
    """Dotted names of the settings that were given as options."""
    notes: tuple[str, ...] = ()
    """Messages to print when the run starts."""
    started: float = dataclasses.field(default_factory=time.monotonic)
    """Time of the request, from which `train.time_budget` counts."""


def load(
    source: str, given: OptionValues | Sequence[str] = (), *, default: Config | None = None
) -> Config:
    """Returns the settings of a recipe, changed by options, like `request`."""
    return request(source, given, default=default).config


def request(
    source: str, given: OptionValues | Sequence[str] = (), *, default: Config | None = None
) -> Request:
    """Returns a recipe's settings, changed by options and by `adjust_to_epochs` for fewer epochs.

    Args:
        source: the name of a recipe, or the path of a YAML file.
        given: values by dotted name, or options as on the command line.
        default: settings to use where neither the recipe nor the options set a value; `Config()`
            if None. A `train.out` of None becomes runs/<recipe>.

    Raises:
        UserError: for an unknown recipe, key or value.
    """
    recipe = read(source)
    given = given if isinstance(given, Mapping) else parse_options(given)
    base = default or Config()
    try:
        own, asked = flatten(base) | converted(base, recipe), converted(base, given)
        own |= _clear_time_budget(asked)
        shorter = adjust_to_epochs(own, asked)
        config = replaced(base, own | shorter | asked)
    except UserError as error:
        try:
            build(base, recipe)
        except UserError as recipe_error:
            if str(recipe_error) == str(error):  # not caused by the options
                raise UserError(f"{source}: {error}") from None
        raise
    if config.train.out is None:
        config = replaced(config, {"train.out": f"runs/{Path(source).stem}"})
    changes = [f"{path} {own[path]:g} -> {value:g}" for path, value in shorter.items()]
    epochs = config.train.epochs
    note = f"adjusted to {counted(epochs, 'epoch')}: {', '.join(changes)}"
    names = {*given}
    if "train.epochs" not in {
        *recipe,
        *given,
    }:  # together with epochs, it records how they were chosen
        names |= {"train.time_budget"} & {*recipe}
    return Request(config, frozenset(names), (note,) if changes else ())


def _clear_time_budget(given: Mapping[str, Any]) -> dict[str, None]:
    """Clears the recipe's time budget if options set the epochs. Raises UserError for both."""
    if "train.epochs" not in given:
        return {}
    if given.get("train.time_budget") is not None:
        raise UserError(
            f"train.time_budget: cannot be combined with train.epochs {given['train.epochs']}; set "
            "only one of them"
        )
    return {"train.time_budget": None}


def adjust_to_epochs(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Adjusts settings to fewer epochs than in the recipe, unless they are given as options.

    With r the fraction of the recipe's epochs, warmup_epochs is multiplied by r. ema_decay d
    becomes 1 - (1 - d) / r, at least 0, which multiplies its span of 1 / (1 - d) steps by r.
    eval_every is lowered until there are four validations, or one per epoch.

    Args:
        recipe: all values of the recipe, by dotted name.
        given: the values given as options, by dotted name.

    Returns:
        The values that change, by dotted name.
    """
    epochs = given.get("train.epochs", 0)
    if not 0 < epochs < recipe["train.epochs"]:
        return {}
    fraction = epochs / recipe["train.epochs"]
    adjusted = {
        # Rounded for readability in config.yaml.
        "optim.warmup_epochs": float(f"{recipe['optim.warmup_epochs'] * fraction:.6g}"),
        "train.eval_every": min(recipe["train.eval_every"], max(1, epochs // 4)),
        "train.ema_decay": round(max(0.0, 1 - (1 - recipe["train.ema_decay"]) / fraction), 6),
    }
    return {p: v for p, v in adjusted.items() if p not in given and v != recipe[p]}


def default_recipe(given: OptionValues, gpu: bool) -> str:
    """Returns the default recipe for the weights to start from, the data, and the device."""
    (weights,) = given.get("train.init", ["None"])
    if weights != "None":
        return "finetune" if gpu else "probe"
    (path,) = given.get("data.path", ["digits"])
    return "digits" if path == "digits" else "imagenette128"


def parse_options(words: Sequence[str]) -> OptionValues:
    """Parses options such as `--optim.lr 1e-3`. Raises UserError."""
    parser = Parser("vitral train")
    parser.add_settings(Config())
    return given_settings(parser.parse(words))


def options(args: argparse.Namespace, default: T) -> T:
    """Returns a dataclass of options, changed by parsed arguments."""
    names = {field.path for field in fields(default)}
    return build(default, {name: value for name, value in vars(args).items() if name in names})


def given_settings(args: argparse.Namespace) -> OptionValues:
    """Returns the settings among parsed arguments."""
    paths = flatten(Config())
    return {name: value for name, value in vars(args).items() if name in paths}


def dump(config: Config) -> str:
    """Returns `config` as YAML, which `load` converts back to the same settings."""
    sections: dict[str, dict[str, object]] = {}
    for path, value in flatten(config).items():
        section, key = path.split(".")
        plain = list(value) if isinstance(value, tuple) else value
        plain = float(value) if isinstance(value, Seconds) else plain
        sections.setdefault(section, {})[key] = plain
    return yaml.safe_dump(sections, sort_keys=False, default_flow_style=False)


def build(default: T, given: OptionValues) -> T:
    """Returns a dataclass, possibly of sections, with some fields replaced.

    Raises:
        UserError: for a value of the wrong type, or one that the dataclass rejects.
    """
    return replaced(default, converted(default, given))


def converted(default: Any, given: OptionValues) -> dict[str, Any]:
    """Converts words to values for the fields of a dataclass, by dotted name.

    Raises:
        UserError: for a value of the wrong type.
    """
    kinds, values = {field.path: field.kind for field in fields(default)}, {}
    for path, words in given.items():
        try:
            values[path] = convert(kinds[path], words)
        except ValueError as error:
            name = path if "." in path else path.replace("_", "-")
            raise UserError(f"{name}: {error}") from None
    return values


def replaced(default: T, values: Mapping[str, Any]) -> T:
    """Returns a dataclass, possibly of sections, with the fields of the given names replaced.

    Raises:
        UserError: for a value that the dataclass rejects.
    """
    changed: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        section, _, key = path.rpartition(".")
        changed.setdefault(section, {})[key] = value
    top = changed.pop("", {})
    for section, values in changed.items():
        try:
            top[section] = dataclasses.replace(getattr(default, section), **values)
        except UserError as error:
            raise UserError(f"{section}.{error}") from None
    return dataclasses.replace(default, **top)  # pyright: ignore[reportArgumentType]


class Field(NamedTuple):
    """A setting: its dotted name, type, value, and docstring."""

    path: str
    kind: Any
    value: Any
    doc: str


def fields(settings: Any, prefix: str = "") -> Iterator[Field]:
    """Iterates over the fields of a dataclass instance, including those of its sections."""
    kinds, docs = typing.get_type_hints(type(settings)), field_docs(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{field.name}.")
        else:
            name = field.name
            yield Field(prefix + name, kinds[name], value, docs.get(name, ""))


def field_docs(settings: type) -> Mapping[str, str]:
    """Returns the docstring under each field of a dataclass, including inherited fields."""
    docs: dict[str, str] = {}
    for each in reversed(settings.__mro__):
        docs |= _module_docs(each.__module__).get(each.__name__, {}) if each is not object else {}
    return docs


def convert(kind: Any, words: Sequence[str]) -> Any:
    """Converts words to a value of a type.

    Args:
        kind: int, float, bool, str, a Literal, a union of these and None, or a tuple of them.
        words: the words given for the value.

    Raises:
        ValueError: if they do not match; the message states what was expected and found.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, UnionType):
        return _convert_union(args, words)
    if origin is tuple:
        return _convert_tuple(args, words)
    found = repr(" ".join(words)) if words else "nothing"
    word = words[0] if len(words) == 1 else None
    choices = {str(choice): choice for choice in args} if origin is Literal else CHOICES.get(kind)
    if choices is not None:
        if word is None or word not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {found}")
        return choices[word]
    try:
        if word is not None:
            return kind(word)
    except ValueError:
        pass
    raise ValueError(f"expected {NAMES[kind]}, got {found}")


def _convert_union(kinds: tuple[Any, ...], words: Sequence[str]) -> Any:
    """Converts words to the first type of a union that they match; the word None becomes None."""
    optional = type(None) in kinds
    if optional and [*words] == ["None"]:
        return None
    expected, got = [], ""
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return convert(kind, words)
        except ValueError as error:
            text, _, got = str(error).removeprefix("expected ").rpartition(", got ")
            expected.append(text)
    expected += ["None"] if optional else []
    raise ValueError(f"expected {' or '.join(expected)}, got {got}")


NAMES = {int: "an integer", float: "a number", str: "text"}
NAMES[Seconds] = "a time such as 600, 90s, 10m or 1h30m"
METAVARS = {int: "N", float: "X", str: "TEXT", Seconds: "TIME"}
CHOICES = {bool: {"true": True, "false": False}}


def _convert_tuple(args: tuple[Any, ...], words: Sequence[str]) -> tuple[Any, ...]:
    if args[-1] is not Ellipsis:
        if len(words) != len(args):
            raise ValueError(f"expected {len(args)} values, got {len(words)}")
        return tuple(convert(arg, [word]) for arg, word in zip(args, words, strict=True))
    size = len(typing.get_args(args[0])) or 1
    if len(words) % size:
        raise ValueError(f"expected groups of {size} values, got {len(words)} values in total")
    return tuple(convert(args[0], words[i : i + size]) for i in range(0, len(words), size))


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError and takes its options from dataclasses."""

    def __init__(self, program: str, description: str = "", *, epilog: str = "") -> None:
        super().__init__(
            program,
            description=description,
            epilog=epilog or None,
            allow_abbrev=False,
            add_help=False,
            argument_default=argparse.SUPPRESS,
            usage=program,
            formatter_class=functools.partial(
                argparse.RawDescriptionHelpFormatter, max_help_position=32, width=100
            ),
        )
        self.names: list[str] = []
        self.open: list[str] = []  # options that take any number of values
        self.groups: dict[str, Any] = {}

    def add_options(self, options: Any, group: str = "") -> None:
        """Adds an option for each field of a dataclass instance, with its value as the default."""
        for field in fields(options):
            self._add(self.groups.get(group, self), field)

    def add_settings(self, config: Config, replacements: Sequence[Field] = ()) -> None:
        """Adds all settings: first those with a shortcut, then one group per section.

        Args:
            replacements: settings to describe differently from `config`.
        """
        settings = {field.path: field for field in (*fields(config), *replacements)}
        order = [*SHORTCUTS, *(path for path in settings if path not in SHORTCUTS)]
        for path in order:
            title = f"{'common' if path in SHORTCUTS else path.partition('.')[0]} settings"
            if title not in self.groups:
                self.groups[title] = self.add_argument_group(title)
            self._add(self.groups[title], settings[path])

    def add_positional(self, name: str, metavar: str) -> None:
        """Adds a positional argument; ? after the metavar means optional, + one or more."""
        shown = metavar.rstrip("?+")
        usage = {"?": f" [{shown}]", "+": f" {shown} [{shown} ...]"}
        self.usage = f"{self.usage}{usage.get(metavar[-1], f' {shown}')}"
        if metavar == shown:
            self.add_argument(name, metavar=shown)
        else:
            self.add_argument(name, metavar=shown, nargs=metavar[-1], default=None)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parses positional arguments and options in any order.

        Raises:
            UserError: for invalid arguments; for an unknown option it suggests the closest one.
        """
        hyphenated = self._open_options_last([*map(_hyphenated, words)])
        args, rest = self.parse_known_intermixed_args(hyphenated)
        for word in rest:
            name = word.partition("=")[0]
            if name.startswith("-") and name != "-":
                hint = did_you_mean(name, self.names)
                raise UserError(f"{name}: unknown option{hint}; `{self.prog} --help` lists all")
        if rest:
            raise UserError(f"{self.prog}: unexpected arguments: {' '.join(rest)}")
        args.words = list(words)
        return args

    def _open_options_last(self, words: list[str]) -> list[str]:
        """Moves options that take any number of values to the end.

        Otherwise a path after their values, which are numbers, would be parsed as another value.
        """
        others, last = [], []
        while words and words[0] != "--":
            word = words.pop(0)
            taken = last if word in self.open else others
            taken.append(word)
            while taken is last and words and not words[0].startswith("--"):
                if last[-1] != word and not _is_number(words[0]):
                    break
                taken.append(words.pop(0))
        return others + last + words

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        message = message.removeprefix("argument ")
        message = message.replace("the following arguments are required:", "expected")
        raise UserError(message if message.startswith("-") else f"{self.prog}: {message}")

    def _add(self, group: Any, field: Field) -> None:
        name = field.path.replace("_", "-")
        flags = [f"--{name}"]
        if field.path in SHORTCUTS:
            flags.insert(0, f"--{SHORTCUTS[field.path]}")
        self.names += flags
        default = "" if field.value is None else f" (default: {shown(field.value)})"
        text = f"{field.doc}{default}".replace("%", "%%")
        if field.kind is bool:
            section, dot, key = name.rpartition(".")
            off = f"--{section}{dot}no-{key}"
            self.names.append(off)
            for flag, value, help_text in (
                (flags[0], "true", text),
                (off, "false", argparse.SUPPRESS),
            ):
                group.add_argument(
                    flag, dest=field.path, action="store_const", const=[value], help=help_text
                )
            return
        count, metavar = _arity(field.kind)
        self.open += flags if count == "*" else []
        action = group.add_argument(
            *flags, dest=field.path, nargs=count, metavar=metavar, help=text
        )
        if choices := _choices(field.kind):
            action.completer = lambda **_: choices  # for argcomplete


def shown(value: Any) -> str:
    """Formats a value for --help and the documentation."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _choices(kind: Any) -> list[str]:
    """Returns the words that an option accepts, if it has a fixed set of them."""
    if typing.get_origin(kind) in (Union, UnionType):
        return [choice for arg in typing.get_args(kind) for choice in _choices(arg)]
    return [*map(str, typing.get_args(kind))] if typing.get_origin(kind) is Literal else []


def _arity(kind: Any) -> tuple[int | str, Any]:
    """Returns the number of words that an option takes, and its metavar."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, UnionType):
        some = [_arity(arg) for arg in args if arg is not type(None)]
        return some[0] if len(some) == 1 else (1, "|".join(str(metavar) for _, metavar in some))
    if origin is tuple and args[-1] is Ellipsis:
        names = [METAVARS[arg] for arg in typing.get_args(args[0]) or args[:1]]
        return "*", " ".join(names)
    if origin is tuple:
        return len(args), tuple(METAVARS[arg] for arg in args)
    return 1, f"{{{','.join(map(str, args))}}}" if origin is Literal else METAVARS[kind]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _hyphenated(word: str) -> str:
    """Converts `--a_b=c_d` to `--a-b=c_d`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that rejects duplicate keys, aliases (which can expand to gigabytes), long
    numbers (whose conversion takes quadratic time), and NUL characters.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not supported; repeat the value instead"
            )
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        value = super().construct_scalar(node)
        if node.tag != TEXT_TAG and len(value) > MAX_NUMBER:
            problem = f"a number of more than {MAX_NUMBER} characters"
            raise yaml.constructor.ConstructorError(problem=problem)
        if "\0" in value:
            raise yaml.constructor.ConstructorError(problem="a NUL character")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        mapping = super().construct_mapping(node, deep)  # rejects unhashable keys
        for key, count in Counter(keys).items():
            if count > 1:  # SafeLoader keeps the last one
                raise yaml.constructor.ConstructorError(problem=f"duplicate key {key!r}")
        return mapping


def _read_file(path: str) -> str:
    try:
        return read_regular(path, MAX_YAML).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"recipe: cannot read {path}: {reason}; `vitral recipes` lists the recipes"
        ) from None


def parse_yaml(content: str) -> Any:
    """Returns the value of an untrusted YAML document. Raises UserError."""
    try:
        return yaml.load(content, _StrictLoader)
    except RecursionError:
        raise UserError("expected sections of 'key: value' lines, got deeper nesting") from None
    except Exception as error:  # invalid values, as in `!!bool x`, raise nearly any exception
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from None


def _values(content: str) -> Iterator[tuple[str, list[str]]]:
    """Iterates over the paths and values in a YAML document."""
    document = parse_yaml(content) or {}
    if not isinstance(document, dict):
        raise UserError(f"expected sections such as 'model:', got {short(document)}")
    known = flatten(Config())
    texts = {field.path for field in fields(Config()) if field.kind in (str, str | None)}
    for section, values in document.items():
        if not isinstance(values, dict):
            raise UserError(f"{section}: expected 'key: value' lines below, got {short(values)}")
        for key, value in values.items():
            path = f"{section}.{key}".replace("-", "_")
            if path not in known:
                raise UserError(f"{path}: no such setting{did_you_mean(path, known)}")
            if path in texts and not isinstance(value, str | None):
                raise UserError(f"{path}: expected text, got {short(value)}; quote it")
            yield path, _words(value)


def _words(value: Any) -> list[str]:
    """Converts a YAML value to command-line words; nested lists are flattened."""
    if isinstance(value, list):
        return [word for inner in value for word in _words(inner)]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


@functools.cache
def _module_docs(module: str) -> Mapping[str, Mapping[str, str]]:
    """Returns the docstrings under the fields of each class in a module."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    found: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for before, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                text = " ".join(str(after.value.value).split())
                found.setdefault(node.name, {})[before.target.id] = text
    return found
