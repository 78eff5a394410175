"""Console for tables and progress displays, which sanitizes the text in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment

from t5x_like.utils.sanitize import visible


class Console(rich.console.Console):
    """rich's console, in which text cannot contain control sequences of its own; those of styles are rich's."""

    def render(self, renderable: Any, options: rich.console.ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)
