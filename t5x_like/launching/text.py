"""Text of rendered files: shell commands and scripts with quoted words, and YAML.

Every word that comes from a user is quoted by `shlex.quote` or by the YAML dumper; nothing is put between quotes by
hand.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_LINE = 110
_PLAIN_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_./-]{2,}")
_RESERVED = {"null", "true", "false", "yes", "off", "nan", "inf", "none"}


def command_line(argv: Sequence[str], indent: str = "") -> str:
    """Return `argv` as a shell command; a long one has a line per option, for readability.

    An option and the words after it stay on one line. A shell reads back exactly `argv`.
    """
    text = shlex.join(argv)
    if len(text) <= _MAX_LINE and "\n" not in text:
        return text
    lines: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("-") and len(word) > 2 and lines[-1]:
            lines.append([])
        lines[-1].append(word)
    return f" \\\n{indent}  ".join(shlex.join(line) for line in lines)


def exports(env: Mapping[str, str]) -> list[str]:
    """Return lines that set environment variables."""
    return [f"export {name}={shlex.quote(value)}" for name, value in env.items()]


def script(*lines: str, interpreter: str = "#!/usr/bin/env bash") -> str:
    """Return the text of a script file."""
    return "\n".join([interpreter, *lines]) + "\n"


def to_yaml(document: Any) -> str:
    """Return a YAML document of mappings, lists, strings, numbers and booleans; strings are read back unchanged.

    YAML readers differ in which plain words are numbers or booleans, so every string that is not clearly a word is
    quoted. Text of several lines becomes a literal block if a block can represent it.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            # Indent lists below their key, as Kubernetes' documentation does.
            super().increase_indent(flow, False)

    def represent_string(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        style: str | None = '"'
        if _PLAIN_WORD.fullmatch(value) and value.lower() not in _RESERVED:
            style = None
        elif "\n" in value[:-1] and value[0].strip() and all(line.isprintable() for line in value.split("\n")):
            # Text with other line separators stays quoted: the reader of a block would turn them into newlines.
            style = "|"
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, represent_string)
    # An unlimited width keeps each command on its line.
    dumped: str = yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**9)
    return dumped
