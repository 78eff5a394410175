"""YAML, by a dumper. Readers differ in which plain words are numbers or truth values, so whatever is not plainly a word
is quoted."""

from __future__ import annotations

import re
from typing import Any

_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_./-]{2,}")
_NOT_WORDS = {"null", "true", "false", "yes", "off", "nan", "inf", "none"}


def to_yaml(document: Any) -> str:
    """One document of mappings, lists, strings, numbers and truth values; strings come back as they are.

    Text of several lines becomes a literal block where YAML has one for it.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            # Lists are set in under their key, as Kubernetes' pages have them.
            super().increase_indent(flow, False)

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        style: str | None = '"'
        if _WORD.fullmatch(value) and value.lower() not in _NOT_WORDS:
            style = None
        elif "\n" in value[:-1] and value[0].strip() and all(line.isprintable() for line in value.split("\n")):
            # Not with other ends of lines, which a reader of a block takes for this one.
            style = "|"
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    # Long lines are not folded: a command stays as it is.
    dumped: str = yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**9)
    return dumped
