"""The page of all commands and options, made from the parsers of `t5x_like.cli`."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from config_reference import table_text

from t5x_like.cli.arguments import Parser
from t5x_like.cli.main import COMMANDS

INTRODUCTION = """# Command line

Every command with its arguments and options. Commands that take a RECIPE also take any field of the configuration
([Configuration](configuration.md)). [Run directory and exit codes](../run-directory.md) has the exit codes.

This page is made from the source when the site is built. `t5x-like COMMAND --help` prints the same.
"""
WIDTH = 96


def page() -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION]
    for name, parser in parsers().items():
        parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=WIDTH)  # type: ignore[assignment]
        usage = textwrap.dedent(parser.format_usage().replace("usage: ", " " * len("usage: "), 1))
        parts += [f"## {name}", table_text(parser.description or ""), f"```text\n{usage}```"]
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
            if not actions:
                continue
            if group.title not in ("positional arguments", "options"):
                parts += [f"**{group.title}**", table_text(group.description or "")]
            lines = ["| argument | meaning |", "|---|---|"]
            lines += [f"| {_names(action)} | {_meaning(parser, action)} |" for action in actions]
            parts.append("\n".join(lines))
        parts.append(table_text(parser.epilog or ""))
    return "\n\n".join(part for part in parts if part) + "\n"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command, by name, in the order of `--help`."""
    commands: Any = Parser(prog="t5x-like").add_subparsers(metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.register(commands)
    return dict(commands.choices)


def _names(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else _metavar(action)
    if not action.option_strings:
        return f"`{value}`"
    return ", ".join(f"`{option} {value}`".replace(" `", "`") for option in action.option_strings)


def _metavar(action: argparse.Action) -> str:
    if action.choices is not None and action.metavar is None:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        name = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar or action.dest.upper()
    return f"{name} ..." if action.nargs in ("+", "*", "A...", "...") else name


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return table_text(parser._get_formatter()._expand_help(action)) if action.help else ""
