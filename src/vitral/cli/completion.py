"""Print a shell script that completes vitral's commands and options.

For bash, add to ~/.bashrc: eval "$(vitral completion bash)"
"""

from __future__ import annotations

import argparse

from vitral.errors import UserError

SHELLS = ("bash", "zsh", "fish")

ARGUMENTS = {"shell": "SHELL"}


def run(args: argparse.Namespace, _: None) -> int:
    """Prints the script and returns the exit code."""
    if args.shell not in SHELLS:
        raise UserError(f"completion: expected one of {', '.join(SHELLS)}, got {args.shell}")
    import argcomplete

    print(argcomplete.shellcode(["vitral"], shell=args.shell))
    return 0


def complete() -> None:
    """Prints the completions that a shell requested, and exits."""
    import argcomplete

    from vitral.cli import COMMANDS, parser_for

    parser = argparse.ArgumentParser("vitral")
    groups = {"": parser.add_subparsers()}
    for name in COMMANDS:
        group, _, command = name.rpartition(" ")
        if group not in groups:
            groups[group] = groups[""].add_parser(group).add_subparsers()
        own = parser_for(name)
        groups[group].add_parser(command, parents=[own], add_help=False)
    argcomplete.autocomplete(parser, always_complete_options="long")
