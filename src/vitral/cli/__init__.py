"""The `vitral` command: dispatch, exit codes, and handling of Ctrl-C.

Each command is a module. Its docstring is the help text. ARGUMENTS maps the name of each positional
argument in the namespace to its name in the help (? means optional, + one or more). The dataclass
Options defines the options, HINTS maps common options of other tools to error messages, and
REPLACEMENTS contains settings with a different meaning in this command. `run(args, options)`
imports what it needs and returns the exit code. A command with a RECIPE accepts all settings as
options.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType, ModuleType

from vitral.cli.common import given_settings
from vitral.config import Config
from vitral.errors import DISK, Messages, UserError, did_you_mean, printable, system_error
from vitral.settings import Parser, default_recipe, load, options

COMMANDS = {
    "train": "train",
    "val": "val",
    "predict": "predict",
    "embed": "embed",
    "explain": "explain",
    "report": "report",
    "export": "export",
    "push": "push",
    "import": "import_",
    "recipes": "recipes",
    "data check": "data_check",
    "data pack": "data_pack",
    "data preview": "data_preview",
    "bench model": "bench_model",
    "bench train": "bench_train",
    "bench data": "bench_data",
    "doctor": "doctor",
    "completion": "completion",
}
HELP = ("-h", "--help")
NOTES = """
WEIGHTS is a run directory, a weight directory such as runs/digits/weights/best, a pretrained model
(timm:NAME), or weights on the Hugging Face Hub (hf-hub:owner/name or hf-hub:owner/name@revision).
`vitral COMMAND --help` lists the options of a command; `vitral train RECIPE --help` lists every
setting with its value in the recipe.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    The exit code is 0 for success, 1 for a full disk or a result described by the command, 2 for a
    user error or another system error, or 128 plus the signal number.
    Messages are discarded without an error if standard error cannot be written.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # OpenMP reads it when torch is imported. By default, a thread that waits for another one keeps
    # its core busy, which multiplies the time of a step if other processes use the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _open_streams()
    stderr = sys.stderr
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if plain and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        # If only some processes raise the error, local rank 0 of each machine prints it.
        rank = "RANK" if error.shared else "LOCAL_RANK"
        if os.environ.get(rank, "0") == "0":
            print(f"vitral: {printable(str(error))}", file=Messages(sys.stderr))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141  # the reader has exited, as `head` does
    except OSError as error:
        text = system_error(error)
        if text is None:
            raise
        print(f"vitral: {text}", file=Messages(sys.stderr))
        return 1 if error.errno in DISK else 2
    finally:
        sys.stderr = stderr
        for stream in (sys.stdout, sys.stderr):  # the interpreter could fail to flush them at exit
            Messages(stream).flush()
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def parser_for(name: str, config: Config | None = None) -> Parser:
    """Returns the parser of a command such as "data pack", whose help shows `config`'s values."""
    module = _module(name)
    parser = Parser(f"vitral {name}", (module.__doc__ or "").strip())
    arguments: dict[str, str] = getattr(module, "ARGUMENTS", {})
    for argument, metavar in arguments.items():
        parser.add_positional(argument, metavar)
    if "recipe" in arguments:
        parser.add_settings(config or Config(), getattr(module, "REPLACEMENTS", ()))
    if hasattr(module, "Options"):
        parser.add_options(module.Options(), "common settings")
    return parser


def overview() -> str:
    """Returns the text of `vitral --help`."""
    lines = ["Train, fine-tune, evaluate, explain and export Vision Transformers.", ""]
    for name in COMMANDS:
        parser = parser_for(name)
        summary = (parser.description or "").splitlines()[0]
        lines += [f"  {parser.usage}", f"      {summary}"]
    return "\n".join(lines) + "\n" + NOTES


def _open_streams() -> None:
    """Opens the null device for standard streams that are closed.

    Otherwise another file could be opened with the descriptor of a closed stream, and output would
    be written to that file.
    """
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        os.set_inheritable(null, True)
        null = os.dup(null)
    os.close(null)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def _run(words: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):  # the terminal may be unable to encode a file name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = Messages(sys.stderr)
    if "_ARGCOMPLETE" in os.environ:
        from vitral.cli.completion import complete

        complete()
    if not words or words[0] in (*HELP, "help"):
        print(overview(), end="")
        return 0
    if words[0] == "--version":
        print(f"vitral {import_module('importlib.metadata').version('vitral')}")
        return 0
    name, words = _choose(words)
    if name is None:
        return 0
    parser, module = parser_for(name), _module(name)
    if {*HELP} & {*words}:
        if "recipe" in getattr(module, "ARGUMENTS", {}):
            config = _config_for_help(parser, [word for word in words if word not in HELP])
            parser = parser_for(name, config)
        parser.usage = f"{parser.usage} [options]"
        parser.print_help()
        return 0
    for word, hint in getattr(module, "HINTS", {}).items():
        if word in words:
            raise UserError(f"{word}: {hint}")
    args = parser.parse(words)
    return module.run(args, options(args, module.Options()) if hasattr(module, "Options") else None)


def _config_for_help(parser: Parser, words: list[str]) -> Config:
    """Returns the settings of the recipe that a command would use."""
    try:
        args = parser.parse(words)
        return load(args.recipe or default_recipe(given_settings(args), gpu=False))
    except UserError:  # the words are incomplete
        return load("digits")


def _choose(words: list[str]) -> tuple[str | None, list[str]]:
    """Returns the command and its arguments, or None after printing the help of a group."""
    first, groups = words[0], {name.split()[0] for name in COMMANDS if " " in name}
    if first in COMMANDS:
        return first, words[1:]
    if first not in groups:
        known = [*dict.fromkeys(name.split()[0] for name in COMMANDS)]
        raise UserError(
            f"command: expected one of {', '.join(known)}, got {first}{did_you_mean(first, known)}"
        )
    members = [name.split()[1] for name in COMMANDS if name.startswith(f"{first} ")]
    second = words[1] if len(words) > 1 else "nothing"
    if second in (*HELP, "help"):
        for member in members:
            parser = parser_for(f"{first} {member}")
            print(f"usage: {parser.usage}\n    {(parser.description or '').splitlines()[0]}")
        return None, []
    if second not in members:
        raise UserError(
            f"{first}: expected one of {', '.join(members)}, got {second}"
            f"{did_you_mean(second, members)}"
        )
    return f"{first} {second}", words[2:]


def _module(name: str) -> ModuleType:
    return import_module(f"vitral.cli.{COMMANDS[name]}")


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C; exits immediately during imports, where torch would convert the exception."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt
