"""Recipes: YAML files that name whole runs, and the parser behind YAML and command line.

A YAML file is flattened to `--section.key value` tokens, so that a mistake in a file and one on the
command line meet the same strict parser and get the same message.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import os
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from vitral.config import Config, UserError, flatten

T = TypeVar("T")
# What tyro says, and what people understand.
PLAIN = {
    r"no type matching (.+?) could be .* from \['(.*)'\]\..*": r"expected \1, got '\2'",
    "Could not find valid parse for arguments: ": "expected pairs of a size and a share, got ",
    r"\{None\}\|\{INT INT\}": "two integers or None",
    r"\{None\}\|INT": "an integer or None",
    r"\{None\}\|FLOAT": "a number or None",
    r"invalid literal for int\(\) with base 10: ": "expected an integer, got ",
    r"could not convert string to float: ": "expected a number, got ",
    r"^Unrecognized options: (.*)": r"expected nothing more after the settings, got \1",
}
SHORT = {"--data": "--data.path", "--out": "--train.out", "--init": "--train.init"}


def names() -> list[str]:
    """The recipes that come with vitral."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def text(name: str) -> str:
    """The YAML of a recipe.

    Raises:
        UserError: for a name that is none, with the nearest one.
    """
    if name not in names():
        settings = Path(name, "config.yaml")  # of a run folder
        near = f"; did you mean {settings}?" if settings.is_file() else nearest(name, names())
        raise UserError(
            f"recipe: none is called {name!r}{near}; "
            "`vitral recipes` lists them; a file's name ends in .yaml"
        )
    return (resources.files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")


def load(
    source: str,
    arguments: Sequence[str] = (),
    *,
    default: Config | None = None,
    program: str = "vitral train",
    about: str = "",
) -> Config:
    """The settings of a recipe, by name or as a YAML file, changed by command-line arguments.

    What neither gives is as in `default`, or else as in `Config()`. Without a `train.out` of its
    own the run goes to runs/<recipe>.

    Raises:
        UserError: for an unknown recipe, key or value.
    """
    tokens, arguments = _recipe_tokens(source), _expand(arguments)
    try:
        config = _parsed(tuple(tokens), default or Config(), program)
    except UserError as error:
        if default is None:
            raise UserError(f"{source}: {error}") from None
        # What does not fit this default, as another patch size, the arguments may mend.
        config, arguments = default, [*tokens, *arguments]
    if config.train.out is None:
        arguments = ["--train.out", f"runs/{Path(source).stem}", *arguments]
    if not arguments:
        return config
    return parse(arguments, config, program=f"{program} {source}", about=about)


@functools.lru_cache(maxsize=256)
def _parsed(tokens: tuple[str, ...], default: Config, program: str) -> Config:
    """The settings of a file, parsed once: it takes 0.1 s, and a comparison reads runs often."""
    return parse(tokens, default, program=program)


def weights_to_fit(source: str, arguments: Sequence[str] = ()) -> str | None:
    """The weights to start from, where a recipe leaves its model to them; None for all others.

    A recipe that names `model.size` or `model.dim`, as a run's `config.yaml` does, leaves nothing
    to them, and help needs none.

    Raises:
        UserError: for an unknown recipe, or one that cannot be read.
    """
    tokens = _recipe_tokens(source)
    named = any(re.match(r"--model\.(size|dim)\b", token) for token in tokens)
    if named or not {"-h", "--help"}.isdisjoint(arguments):
        return None
    # Not parsed, as the other settings may fit the weights' model alone.
    found = given("--train.init", [*tokens, *arguments])
    return None if found == "None" else found


def given(setting: str, arguments: Sequence[str]) -> str | None:
    """What arguments that are not parsed yet give for a setting at last; None where nothing."""
    found = None
    for word, value in pairwise([*_expand(arguments), ""]):
        name, equals, own = word.partition("=")
        if name == setting:
            found = own if equals else value
    return None if not found or found.startswith("--") else found


def dump(config: Config) -> str:
    """`config` as YAML that `load` reads back to the same settings."""
    sections: dict[str, dict[str, object]] = {}
    for path, value in flatten(config).items():
        section, key = path.split(".")
        plain = list(value) if isinstance(value, tuple) else value
        sections.setdefault(section, {})[key] = plain
    return yaml.safe_dump(sections, sort_keys=False, default_flow_style=False)


def parse(arguments: Sequence[str], default: T, *, program: str, about: str = "") -> T:
    """The dataclass `default` changed by arguments; prints help and exits for --help.

    Args:
        arguments: `--key value`, or `--section.key value`.
        default: what holds for what is not given; help shows it.
        program: how the command is called.
        about: a description for help.

    Raises:
        UserError: one line for an unknown key (with the nearest), or a value of the wrong kind.
    """
    arguments = _expand(arguments) if isinstance(default, Config) else list(arguments)
    _check_names(arguments, default, program)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box), _wide_terminal("--help" not in arguments):
            return tyro.cli(
                type(default), args=arguments, default=default, prog=program, description=about
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        raise UserError(_one_line(box.getvalue())) from None


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that takes no key twice, where YAML's would keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key!r} is given twice")
        return super().construct_mapping(node, deep)


@contextlib.contextmanager
def _wide_terminal(wanted: bool) -> Iterator[None]:
    """Keeps tyro from breaking a message into lines."""
    before = dict(os.environ)
    if wanted:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        os.environ.update(before)


def _recipe_tokens(source: str) -> list[str]:
    """The tokens of a recipe, by name or as a YAML file."""
    content = _read(Path(source)) if source.endswith((".yaml", ".yml")) else text(source)
    try:
        return _tokens(content)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"recipe: cannot read {path}: {reason}; `vitral recipes` lists the others"
        ) from None


def _expand(arguments: Sequence[str]) -> list[str]:
    """Writes --data, --out and --init out, whether their value follows or stands behind '='."""
    expanded = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        expanded.append(SHORT.get(name, name) + equals + value)
    return expanded


def _tokens(content: str) -> list[str]:
    """The `--section.key value` form of a YAML document."""
    try:
        document = yaml.load(content, _StrictLoader) or {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"not valid YAML: {reason}") from None
    if not isinstance(document, dict):
        raise UserError(f"expected sections such as 'model:', got {document!r}")
    defaults = flatten(Config())
    flags = {path for path, value in defaults.items() if isinstance(value, bool)}
    texts = {path for path, value in defaults.items() if isinstance(value, str)}
    texts |= {"train.out", "train.init"}
    tokens: list[str] = []
    for section, settings in document.items():
        if not isinstance(settings, dict):
            raise UserError(f"{section}: expected 'key: value' lines below, got {settings!r}")
        for key, value in settings.items():
            path = f"{section}.{key}".replace("-", "_")
            if path in texts and not isinstance(value, str | None):
                raise UserError(f"{path}: expected text, got {value!r}; quote it")
            if path in flags and isinstance(value, bool):
                tokens.append(f"--{section}.{'' if value else 'no-'}{key}")
            else:
                # Behind '=' a value may begin with dashes.
                many = isinstance(value, list)
                tokens += [f"--{path}", *_words(value)] if many else [f"--{path}={value}"]
    return tokens


def _words(value: Any) -> list[str]:
    """A list as the words of a command line; a list of lists likewise, one after the other."""
    return [w for v in value for w in _words(v)] if isinstance(value, list) else [str(value)]


def _check_names(arguments: Sequence[str], default: object, program: str) -> None:
    options = ["--help"]
    for path, value in flatten(default).items():
        section, dot, key = path.replace("_", "-").rpartition(".")
        options.append(f"--{section}{dot}{key}")
        if isinstance(value, bool):
            options.append(f"--{section}{dot}no-{key}")
    short = SHORT if isinstance(default, Config) else {}
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name.replace("_", "-") not in options:
            near = nearest(name.replace("_", "-"), [*options, *short])
            raise UserError(f"{name}: no such setting{near}; `{program} --help` lists all")


def nearest(word: str, words: Sequence[str]) -> str:
    """A hint at the word that may be meant: a longer one, one in a section, or one like it."""
    longer = [other for other in words if word and other.startswith(word)]
    inside = [other for other in words if other.endswith(f".{word.lstrip('-')}")]
    near = [*longer, *inside, *difflib.get_close_matches(word, words, n=1, cutoff=0.4)]
    return f"; did you mean {near[0]}?" if near else ""


def _one_line(box: str) -> str:
    """tyro's boxed message as one line: its first paragraph, without the frame."""
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line) for line in box.splitlines()]
    lines = [line.strip() for line in lines if not line.startswith(("╭", "╰", "+"))]
    if len(lines) > 1 and set(lines[1]) == {"-"}:  # where UTF-8 is not spoken, a title, no frame
        lines = lines[2:]
    paragraph: list[str] = []
    for line in lines:
        if line.startswith("──") or set(line) <= {"-"}:
            break
        paragraph.append(line)
    line = " ".join(paragraph).removeprefix("Error parsing ")
    for pattern, plain in PLAIN.items():
        line = re.sub(pattern, plain, line)
    return line
