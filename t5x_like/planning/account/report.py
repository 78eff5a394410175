"""Console report of an account: a table for each section, and below it the common formulas and what they get wrong."""

from __future__ import annotations

from typing import assert_never

from rich import box
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from t5x_like.planning.account.figures import Account, CommonFormula, Section, Unit
from t5x_like.utils import formatting
from t5x_like.utils.console import Console
from t5x_like.utils.sanitize import visible


def print_account(account: Account, console: Console) -> None:
    """Print an account."""
    console.print(f"[bold]{escape(visible(account.name))}[/]", highlight=False)
    for section in account.sections:
        console.print(_table(section))
        for common in section.common:
            console.print(Padding(Text(_sentence(common)), (0, 0, 0, 1)))
        console.print()


def formatted(value: float, unit: Unit) -> str:
    """Return a value with its unit."""
    match unit:
        case "parameters":
            return f"{value:,.0f}"
        case "FLOP":
            return formatting.flops(value)
        case "bytes":
            return f"{value:,.0f} B" if value < 1e7 else formatting.decimal_size(value)
        case "seconds":
            return formatting.short_time(value)
        case "tokens per second":
            return f"{value:,.0f} tokens/s"
        case "times":
            return f"{value:.3g}x"
        case "tokens" | "rows" | "":
            return formatting.count(value)
        case unknown:
            assert_never(unknown)


def _table(section: Section) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(section.title, overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for figure in section.figures:
        table.add_row(escape(figure.name), formatted(figure.value, figure.unit), escape(figure.note))
    return table


def _sentence(common: CommonFormula) -> str:
    value = "" if common.value is None else f" = {formatted(common.value, common.unit)}"
    return f"common: {common.formula}{value}. {common.remark}"
