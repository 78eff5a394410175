"""Rendering of a job for a target: files, and the commands that use them."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from t5x_like.launching.job import Job
from t5x_like.launching.text import command_line
from t5x_like.utils.trusted_urls import scheme_of

Stage = Literal["before", "launch", "follow", "stop"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
      purpose: Short description.
      argv: Program and arguments.
      stage: before: run once by hand, such as building an image; launch: run by `--execute`; follow and stop: run
        later.
      until: Output until which the command is repeated.
      never: Outputs after which `until` can no longer be reached.
    """

    purpose: str
    argv: tuple[str, ...]
    stage: Stage = "launch"
    until: str | None = None
    never: tuple[str, ...] = ()


def bucket_notes(job: Job, account: str) -> list[str]:
    """Return notes about the bucket of a run directory: the rights that the machines need; none for a directory.

    Args:
      account: Whom the provider knows the machines as.
    """
    if not scheme_of(job.workdir):
        return []
    bucket = "/".join(job.workdir.split("/")[:3])
    rights = "roles/storage.objectUser" if bucket.startswith("gs://") else "the rights to get, put, delete and list"
    return [f"{account} needs {rights} on {bucket}; keep the bucket in the machines' region"]


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Commands with which machines that the provider takes away are found and requested again.

    Attributes:
      state: Prints the state of the machines.
      lost: States of machines that were taken away.
      result: Prints the exit code of the run; fails or prints nothing before its end.
      remove: Removes what is left of the lost machines, so that they can be created again.
    """

    state: tuple[str, ...]
    lost: tuple[str, ...]
    result: tuple[str, ...]
    remove: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rendering:
    """Files and commands that start a job.

    Attributes:
      directory: Directory in which the commands expect the files.
      files: File name -> text.
      steps: Commands in order.
      notes: Facts that the user must know or requirements that the user must meet, a sentence each.
      recovery: Recovery of lost machines; None if the target has its own, or machines are not taken away.
    """

    directory: Path
    files: Mapping[str, str]
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    recovery: Recovery | None = None

    @property
    def programs(self) -> list[str]:
        """Programs that `--execute` requires."""
        return list(dict.fromkeys(step.argv[0] for step in self.steps if step.stage == "launch"))


_HEADINGS: dict[Stage, str] = {
    "before": "once, before the launch",
    "launch": "launch (run by --execute)",
    "follow": "follow",
    "stop": "stop and clean up",
}


def to_text(rendering: Rendering) -> str:
    """Return all files and commands as one text to read; the commands are valid shell."""
    return "".join(_page(rendering))


def commands_text(rendering: Rendering) -> str:
    """Return the commands by stage, as a shell script."""
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
    """Return the text for a comment: after a line break a shell would run the rest."""
    return text.replace("\n", "?")


def _line(step: Step) -> str:
    if step.until is None:
        return command_line(step.argv)
    return f'until [ "$({shlex.join(step.argv)})" = {shlex.quote(step.until)} ]; do sleep 30; done'
