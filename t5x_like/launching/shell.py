"""Shell text. Every word that is not ours goes through `shlex.quote`; nothing is put between quotes by hand."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

_LINE = 110


def command_line(argv: Sequence[str], indent: str = "") -> str:
    """`argv` as a shell command; a long one with a line for each option, so that it can be read.

    An option and the words behind it stay on one line; a shell reads back exactly `argv`.
    """
    text = shlex.join(argv)
    if len(text) <= _LINE and "\n" not in text:
        return text
    lines: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("-") and len(word) > 2 and lines[-1]:
            lines.append([])
        lines[-1].append(word)
    return f" \\\n{indent}  ".join(shlex.join(line) for line in lines)


def exports(env: Mapping[str, str]) -> list[str]:
    """Lines that set environment variables."""
    return [f"export {name}={shlex.quote(value)}" for name, value in env.items()]


def script(*lines: str, interpreter: str = "#!/usr/bin/env bash") -> str:
    """A file that the interpreter runs."""
    return "\n".join([interpreter, *lines]) + "\n"
