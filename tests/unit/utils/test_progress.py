"""Progress display: lines without a terminal, a bar on a terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

from t5x_like.utils.progress import ProgressDisplay, RowProgress


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def test_line_has_the_text_and_the_remaining_time() -> None:
    lines: list[str] = []
    with ProgressDisplay(1000, "work", console=console(), report=lines.append, interval_seconds=0.0) as display:
        display.advance(250, "1,200 documents")
        display.advance(250)
        display.advance(500, "2,400 documents")
    assert re.fullmatch(r"1,200 documents, \d+\.\d s left", lines[0])
    assert lines[1:] == ["2,400 documents, 0.0 s left"], "without a text there is no line"


def test_lines_have_a_minimum_interval() -> None:
    lines: list[str] = []
    with ProgressDisplay(10, "work", console=console(), report=lines.append, interval_seconds=60.0) as display:
        display.advance(10, "done")
    assert lines == []


def test_bar_is_shown_on_a_terminal_instead_of_lines() -> None:
    lines: list[str] = []
    terminal = console(terminal=True)
    with ProgressDisplay(10, "work", console=terminal, report=lines.append, interval_seconds=0.0) as display:
        display.advance_to(4)
        display.advance(6, "all of it")
    assert isinstance(terminal.file, io.StringIO) and "all of it" in terminal.file.getvalue()
    assert lines == []


def test_rows_of_an_earlier_process_are_reported() -> None:
    lines = console()
    with RowProgress(100, 40, label="generate", console=lines) as progress:
        progress.advance(60)
    assert isinstance(lines.file, io.StringIO)
    assert lines.file.getvalue() == "generate: 40 of 100 rows exist already\n"
