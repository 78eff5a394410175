"""Text of unknown origin, made safe to print: documents and predictions can hold terminal control sequences."""

from __future__ import annotations

import re

# C0 except tab and newline, DEL, C1, bidirectional overrides and isolates, line and paragraph separators, surrogates.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """`text` with every control character but tab and newline spelled out, as in `\\x1b`."""

    def spell(match: re.Match[str]) -> str:
        code = ord(match.group())
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _CONTROL.sub(spell, text)
