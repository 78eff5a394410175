"""`t5x-like generate`: prompts from the command line, a file or standard input; answers to the screen or to a file."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from t5x_like.config import EXIT_OK, EXIT_RESUMABLE, ConfigError, Problem, RefusedError
from t5x_like.decoding import journal
from t5x_like.decoding.answers import Answer, Answering, Settings, explain_memory
from t5x_like.decoding.journal import Journal
from t5x_like.decoding.models import Formats, PromptedModel, checkpoint_digest, formats_of, open_model
from t5x_like.decoding.progress import RowProgress
from t5x_like.decoding.requests import Digest, Request, Requests, of_argument, open_requests
from t5x_like.interruption import Interruption, interruption
from t5x_like.monitoring.text import visible

BATCHES_PER_CHUNK = 4
"""Prompts are answered in chunks of so many batches, sorted by length within; a chunk's lines are written together."""
FORMAT_VERSION = 1
_POLL_SECONDS = 0.2


def generate_command(
    directory: Path,
    settings: Settings,
    *,
    prompt: str | None = None,
    input_path: Path | None = None,
    output: Path | None = None,
    step: int | None = None,
    process: int = 0,
    processes: int = 1,
) -> int:
    """Answers prompts with the model in `directory`: a run's, or made by `convert --from`.

    A single `prompt` is answered by text on standard output. Prompts from `input_path`, or else standard input, are
    answered by one JSON object per line, in order: the fields that came in and `output`; with more than one sample also
    `sample`. All input is read and checked before the model is restored.

    With `output` the lines go to that file, and the same command goes on where it was killed: what is there stays, and
    what is missing is computed in the same batches, so that the file is the one of an undisturbed command. Each of
    several processes answers every so many-th chunk on its own devices; the first one joins the parts.

    Args:
      step: Checkpoint; None for the newest, or for that of the lines that are there.
      process, processes: Which one this is, and of how many; they share a file system.

    Returns:
      The exit code.

    Raises:
      UserError: the input, the settings or the model cannot be used, or the output is of other settings.
    """
    if processes > 1 and (output is None or input_path is None):
        found = f"{processes} processes"
        raise ConfigError([Problem("--input, --output", found, "files of both, which each process can read and write")])
    formats = formats_of(directory, settings.mode)
    if prompt is not None:
        if output is not None:
            raise ConfigError([Problem("--output", str(output), "none with --prompt", "give --input FILE")])
        model, answering, _ = _opened(directory, formats, settings, step)
        request = of_argument(prompt)
        _note_length(model, formats, answering.check(request))
        for answer in _answered(answering, [request], 0)[0]:
            print(visible(answer.text) if sys.stdout.isatty() else answer.text)
        _note_passes(answering)
        return EXIT_OK
    with open_requests(input_path) as requests:
        digest = requests.check()
        if output is None:
            return _to_screen(directory, formats, settings, step, requests, digest)
        with interruption() as stop:
            job = _Job(directory, formats, settings, requests, digest, output, process, processes)
            return job.run(step, stop)


def _to_screen(
    directory: Path, formats: Formats, settings: Settings, step: int | None, requests: Requests, digest: Digest
) -> int:
    model, answering, _ = _opened(directory, formats, settings, step)
    _note_length(model, formats, max(map(answering.check, requests)))
    with _progress(digest.rows * settings.num_samples, 0) as progress:
        for number, chunk in _chunks(requests, _chunk_size(settings)):
            for line in _lines(answering, chunk, number * _chunk_size(settings)):
                print(line)
                progress.advance(1)
            sys.stdout.flush()
    _note_passes(answering)
    return EXIT_OK


@dataclasses.dataclass(frozen=True)
class _Job:
    """A file of prompts that becomes a file of answers."""

    directory: Path
    formats: Formats
    settings: Settings
    requests: Requests
    digest: Digest
    output: Path
    process: int
    processes: int

    def run(self, step: int | None, stop: Interruption) -> int:
        own = journal.part_path(self.output, self.process, self.processes)
        begun = journal.has_lines(self.output) or any(map(journal.has_lines, self._parts()))
        # Before anything is opened for writing: a file that is not ours stays as it is.
        kept = journal.settings_of_lines(self.output) if begun else {}
        if step is None:
            step = kept.get("step")
        if self.processes > 1 and self.output.exists():
            journal.claim(self.output, self._settings(step), begun=True)
            return self._finished()
        with contextlib.closing(Journal(own)) as lines:
            wanted = self._lines_of(self.process)
            if lines.lines > wanted:
                raise RefusedError(f"{own}: found {lines.lines:,} lines, expected {wanted:,} at most; remove it")
            # Restoring is done by all processes together, so all of them do, or none.
            parts = self._parts()
            complete = all(journal.done_path(part).exists() for part in parts) if parts else lines.lines == wanted
            if complete:
                journal.claim(self.output, self._settings(step), begun=True)
            else:
                code = self._write(lines, wanted, step, stop, begun=begun)
                if code != EXIT_OK:
                    return code
        if self.processes == 1:
            return self._finished()
        journal.done_path(own).touch()
        return self._joined(stop)

    def _write(self, lines: Journal, wanted: int, step: int | None, stop: Interruption, *, begun: bool) -> int:
        opened = self._settings(step) if step is not None else None
        if opened is not None and begun:
            journal.claim(self.output, opened, begun=True)
        model, answering, step = _opened(self.directory, self.formats, self.settings, step)
        journal.claim(self.output, self._settings(step), begun=begun)
        _note_length(model, self.formats, max(map(answering.check, self.requests)))
        size = _chunk_size(self.settings)
        of_chunk = size * self.settings.num_samples
        with _progress(wanted, lines.lines) as progress:
            mine = (chunk for chunk in _chunks(self.requests, size) if chunk[0] % self.processes == self.process)
            for place, (number, chunk) in enumerate(mine):
                there = lines.lines - place * of_chunk
                if there >= len(chunk) * self.settings.num_samples:
                    continue
                if stop.reason is not None:
                    print(f"{self.output}: stopped; the same command goes on", file=sys.stderr)
                    return EXIT_RESUMABLE
                # A chunk of which a part is there is computed again as a whole, so that its batches are the same.
                answers = _lines(answering, chunk, number * size)
                lines.append(answers[there:])
                progress.advance(len(answers) - there)
        _note_passes(answering)
        return EXIT_OK

    def _settings(self, step: int | None) -> dict[str, Any]:
        """What decides about the lines. Where the directory of the model is does not."""
        digest = None
        if step is not None:
            digest = checkpoint_digest(self.directory, step)
        named = dataclasses.asdict(self.settings)
        return {
            "format": FORMAT_VERSION,
            "step": step,
            "checkpoint": digest,
            "input": {"rows": self.digest.rows, "sha256": self.digest.sha256},
            "processes": self.processes,
            "settings": named,
        }

    def _parts(self) -> list[Path]:
        if self.processes == 1:
            return []
        return [journal.part_path(self.output, index, self.processes) for index in range(self.processes)]

    def _lines_of(self, process: int) -> int:
        size = _chunk_size(self.settings)
        chunks = range(process, -(-self.digest.rows // size), self.processes)
        rows = sum(min(size, self.digest.rows - chunk * size) for chunk in chunks)
        return rows * self.settings.num_samples

    def _joined(self, stop: Interruption) -> int:
        parts = self._parts()
        while not self.output.exists():
            waiting = [part for part in parts if not journal.done_path(part).exists()]
            if self.process == 0 and not waiting:
                self._require_whole(parts)
                journal.join(self.output, parts, _chunk_size(self.settings) * self.settings.num_samples)
                break
            if self.process != 0:
                return EXIT_OK
            if stop.reason is not None:
                print(f"{self.output}: stopped; the same command goes on", file=sys.stderr)
                return EXIT_RESUMABLE
            time.sleep(_POLL_SECONDS)
        return self._finished()

    def _require_whole(self, parts: Sequence[Path]) -> None:
        for index, part in enumerate(parts):
            found, wanted = journal.count_lines(part), self._lines_of(index)
            if found != wanted:
                journal.done_path(part).unlink()
                raise RefusedError(f"{part}: found {found:,} lines, expected {wanted:,}; the same command makes them")

    def _finished(self) -> int:
        if self.process == 0:
            for part in self._parts():
                part.unlink(missing_ok=True)
                journal.done_path(part).unlink(missing_ok=True)
            print(f"{self.output}: {self._total():,} lines", file=sys.stderr)
        return EXIT_OK

    def _total(self) -> int:
        return self.digest.rows * self.settings.num_samples


def _opened(
    directory: Path, formats: Formats, settings: Settings, step: int | None
) -> tuple[PromptedModel, Answering, int]:
    # A process's own devices: processes share prompts out, not arrays.
    model = open_model(directory, jax.local_devices())
    step, params = model.load(step)
    return model, Answering(model, params, formats, settings), step


def _note_length(model: PromptedModel, formats: Formats, longest: int) -> None:
    trained_on = model.longest_prompt(formats.plain)
    if trained_on is not None and longest > trained_on:
        print(f"note: a prompt of {longest} tokens, longer than the {trained_on} of training", file=sys.stderr)


def _note_passes(answering: Answering) -> None:
    tokens, passes = answering.passes
    if passes:
        line = f"speculation: {tokens:,} tokens in {passes:,} passes of the model, {tokens / passes:.2f} per pass"
        print(line, file=sys.stderr)


def _chunk_size(settings: Settings) -> int:
    """Prompts of a chunk."""
    return max(BATCHES_PER_CHUNK * settings.batch_size // settings.num_samples, 1)


def _chunks(requests: Requests, size: int) -> Iterator[tuple[int, list[Request]]]:
    source = iter(requests)
    for number in itertools.count():
        chunk = list(itertools.islice(source, size))
        if not chunk:
            return
        yield number, chunk


def _answered(answering: Answering, requests: Sequence[Request], first: int) -> list[list[Answer]]:
    try:
        return answering(requests, first)
    except jax.errors.JaxRuntimeError as error:
        explained = explain_memory(error, answering.settings.batch_size)
        if explained is None:
            raise
        raise explained from None


def _lines(answering: Answering, requests: Sequence[Request], first: int) -> list[str]:
    """A JSON object for each answer; `num_samples` of each request, even if a beam search has fewer: then empty."""
    settings, lines = answering.settings, []
    for request, answers in zip(requests, _answered(answering, requests, first), strict=True):
        filler = [Answer("", ended_by="length")] * (settings.num_samples - len(answers))
        for sample, answer in enumerate([*answers, *filler]):
            fields: dict[str, Any] = {"prompt": request.prompt, **request.fields, "output": answer.text}
            if answer.spans is not None:
                fields["spans"] = list(answer.spans)
            if settings.num_samples > 1:
                fields["sample"] = sample
            if settings.scores:
                fields |= {
                    "ended_by": answer.ended_by,
                    "num_tokens": answer.tokens,
                    "log_likelihood": answer.log_likelihood,
                }
                if settings.beam is not None:
                    fields["score"] = answer.score
            lines.append(json.dumps(fields, ensure_ascii=False))
    return lines


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[RowProgress]:
    progress = RowProgress(total, done, console=Console(stderr=True))
    try:
        yield progress
    finally:
        progress.close()
