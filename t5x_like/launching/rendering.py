"""What a launcher makes of a job: files, and the commands that use them."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from t5x_like.launching.shell import command_line

Stage = Literal["before", "launch", "follow", "stop"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
      purpose: In a few words.
      argv: The program and its arguments.
      stage: before: once, by hand, such as building an image; launch: what `--execute` runs; follow and stop: later.
      until: The command is repeated until it prints this.
      never: What it may print instead when waiting is in vain.
    """

    purpose: str
    argv: tuple[str, ...]
    stage: Stage = "launch"
    until: str | None = None
    never: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rendering:
    """Attributes:
    directory: Where the commands expect the files.
    files: Text by name.
    steps: In their order.
    notes: What the user must know or see to, a sentence each.
    """

    directory: Path
    files: Mapping[str, str]
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    @property
    def programs(self) -> list[str]:
        """What `--execute` needs to be installed."""
        return list(dict.fromkeys(step.argv[0] for step in self.steps if step.stage == "launch"))


_HEADINGS: dict[Stage, str] = {
    "before": "once, before",
    "launch": "launch: what --execute runs",
    "follow": "follow",
    "stop": "stop and clean up",
}


def to_text(rendering: Rendering) -> str:
    """Everything on one page, to be read; the commands are for a shell."""
    return "".join(_page(rendering))


def commands_text(rendering: Rendering) -> str:
    """The commands alone, by stage."""
    return "".join(_commands(rendering))


def _page(rendering: Rendering) -> Iterator[str]:
    for name, text in rendering.files.items():
        yield f"# ==== {_one_line(str(rendering.directory / name))}\n{text}\n"
    yield from _commands(rendering)


def _commands(rendering: Rendering) -> Iterator[str]:
    for note in rendering.notes:
        yield f"# Note: {_one_line(note)}\n"
    for stage, heading in _HEADINGS.items():
        steps = [step for step in rendering.steps if step.stage == stage]
        if steps:
            yield f"\n# ==== {heading}\n"
        for step in steps:
            yield f"# {step.purpose}\n{_line(step)}\n"


def _one_line(text: str) -> str:
    """For a comment, behind whose line a shell would run what follows."""
    return text.replace("\n", "?")


def _line(step: Step) -> str:
    if step.until is None:
        return command_line(step.argv)
    return f'until [ "$({shlex.join(step.argv)})" = {shlex.quote(step.until)} ]; do sleep 30; done'
