"""`t5x-like doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.cli.arguments import add_command, location_text
from t5x_like.errors import EXIT_OK, EXIT_REFUSED


def register(commands: Any) -> None:
    parser = add_command(commands, "doctor", _run, "check this machine, and a run, a token store or a model on it")
    parser.add_argument(
        "target",
        type=location_text,
        nargs="?",
        metavar="RUN|STORE|MODEL",
        help="directory or URL of a run, a token store or a model, which is verified (default: the machine only)",
    )
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from rich.table import Table
    from rich.text import Text

    from t5x_like.diagnosis import examine, examine_machine, examine_object_store
    from t5x_like.storage.locations import Url, location
    from t5x_like.utils.console import Console

    target = None if options.target is None else location(options.target, "RUN|STORE|MODEL")
    findings = [*examine_machine(target if isinstance(target, Path) else Path.cwd())]
    if isinstance(target, Url):
        findings += examine_object_store(target)
    if target is not None:
        findings += examine(target)
    table = Table(box=None, show_header=False)
    for finding in findings:
        word, style = ("ok", "green") if not finding.advice else ("note", "yellow")
        if finding.is_failure:
            word, style = "BAD", "bold red"
        found = Text(finding.found)
        if finding.advice:
            found.append(f"\n-> {finding.advice}", style="dim")
        table.add_row(Text(word, style=style), Text(finding.subject), found)
    Console().print(table)
    return EXIT_REFUSED if any(finding.is_failure for finding in findings) else EXIT_OK
