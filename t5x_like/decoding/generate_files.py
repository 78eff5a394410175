"""Generation for prompts of the command line, a file or standard input, to standard output or a resumable file."""

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

from t5x_like.decoding.generation_config import GenerationConfig
from t5x_like.decoding.masked_prompts import settings_and_formats
from t5x_like.decoding.pipeline import Completion, TextGenerator, explain_memory
from t5x_like.decoding.prompt_reader import (
    InputDigest,
    PromptReader,
    PromptRequest,
    open_prompts,
    request_from_argument,
)
from t5x_like.decoding.prompted_model import Formats, PromptedModel, open_prompted
from t5x_like.distributed.preemption import SignalStop, stop_on_signals
from t5x_like.errors import EXIT_OK, EXIT_RESUMABLE, ConfigError, ConfigProblem, SafetyError
from t5x_like.storage.transfers import is_transferred
from t5x_like.utils import jsonl, resumable_jsonl
from t5x_like.utils.progress import RowProgress
from t5x_like.utils.resumable_jsonl import ResumableLines
from t5x_like.utils.sanitize import say, visible

BATCHES_PER_CHUNK = 4
"""Number of batches per chunk. Prompts are sorted by length within a chunk, and its lines are written together."""
FORMAT_VERSION = 1
_POLL_SECONDS = 0.2


def generate_completions(
    directory: Path,
    settings: GenerationConfig,
    *,
    prompt: str | None = None,
    input_path: Path | None = None,
    output: Path | None = None,
    step: int | None = None,
    process: int = 0,
    processes: int = 1,
) -> int:
    """Generate completions with the model in `directory`: a run, or the result of `convert --from`.

    The completion of a single `prompt` is printed as text. Prompts of `input_path`, or else of standard input, give one
    JSON object per line, in order: the fields of the input and `output`; with more than one sample also `sample`. All
    input is read and checked before the model is restored.

    With `output`, the lines are written to that file, and an interrupted command resumes when it is run again: existing
    lines are kept, and missing ones are computed in the same batches, so that the file equals that of an uninterrupted
    command. With N processes, process k computes the chunks k, k + N, ... on its own devices; process 0 joins the
    parts.

    Args:
      directory: Directory of the model.
      settings: Settings of generation.
      step: Step of the checkpoint; None for the newest, or for that of the existing lines.
      process, processes: Index and number of the processes, which share a file system.

    Returns:
      The exit code.

    Raises:
      UserError: the input, the settings or the model cannot be used, or the output was made with other settings.
    """
    if processes > 1 and (output is None or input_path is None or is_transferred(output)):
        found = f"{processes} processes" + (" with a URL as --output" if is_transferred(output) else "")
        raise ConfigError(
            [ConfigProblem("--input, --output", found, "both, as files that every process can read and write")]
        )
    # Processes divide the prompts among them, not the arrays: each decodes on its own devices.
    model = open_prompted(directory, devices="local")
    settings, formats = settings_and_formats(model.loaded, settings)
    if prompt is not None:
        if output is not None:
            raise ConfigError([ConfigProblem("--output", str(output), "none with --prompt", "give --input FILE")])
        generator, _ = _restore(model, formats, settings, step)
        request = request_from_argument(prompt)
        _warn_if_longer_than_trained(model, formats, generator.check(request))
        for completion in _complete(generator, [request], 0)[0]:
            print(visible(completion.text) if sys.stdout.isatty() else completion.text)
        _print_speculation(generator)
        return EXIT_OK
    with open_prompts(input_path) as requests:
        digest = requests.check()
        if output is None:
            return _print_lines(model, formats, settings, step, requests, digest)
        with stop_on_signals() as stop:
            job = _FileJob(model, formats, settings, requests, digest, output, process, processes)
            return job.run(step, stop)


def _print_lines(
    model: PromptedModel,
    formats: Formats,
    settings: GenerationConfig,
    step: int | None,
    requests: PromptReader,
    digest: InputDigest,
) -> int:
    generator, _ = _restore(model, formats, settings, step)
    _warn_if_longer_than_trained(model, formats, max(map(generator.check, requests)))
    with RowProgress(digest.rows * settings.num_samples, label="generate") as progress:
        for number, chunk in _chunks(requests, _chunk_size(settings)):
            for line in _lines(generator, chunk, number * _chunk_size(settings)):
                print(line)
                progress.advance(1)
            sys.stdout.flush()
    _print_speculation(generator)
    return EXIT_OK


@dataclasses.dataclass(frozen=True)
class _FileJob:
    """Resumable job that reads a file of prompts and writes a file of completions."""

    model: PromptedModel
    formats: Formats
    settings: GenerationConfig
    requests: PromptReader
    digest: InputDigest
    output: Path
    process: int
    processes: int

    def run(self, step: int | None, stop: SignalStop) -> int:
        """Write the missing lines of this process, and let process 0 join the parts. Return the exit code."""
        own_part = resumable_jsonl.part_path(self.output, self.process, self.processes)
        begun = resumable_jsonl.has_lines(self.output) or any(map(resumable_jsonl.has_lines, self._parts()))
        # Checked before anything is opened for writing: a file of another origin stays unchanged.
        saved_settings = resumable_jsonl.settings_of_lines(self.output) if begun else {}
        if step is None:
            step = saved_settings.get("step")
        if self.processes > 1 and self.output.exists():
            resumable_jsonl.claim(self.output, self._settings(step), begun=True)
            return self._finish()
        with contextlib.closing(ResumableLines(own_part)) as lines:
            total = self._lines_of(self.process)
            # These are lines of something else: this input cannot give so many.
            if lines.lines > total:
                raise SafetyError(f"{own_part}: found {lines.lines:,} lines, expected {total:,} at most; remove it")
            # Restoring is a collective operation: either all processes do it, or none.
            parts = self._parts()
            complete = (
                all(resumable_jsonl.done_path(part).exists() for part in parts) if parts else lines.lines == total
            )
            if complete:
                resumable_jsonl.claim(self.output, self._settings(step), begun=True)
            else:
                code = self._write(lines, total, step, stop, begun=begun)
                if code != EXIT_OK:
                    return code
        if self.processes == 1:
            return self._finish()
        resumable_jsonl.done_path(own_part).touch()
        return self._join(stop)

    def _write(self, lines: ResumableLines, total: int, step: int | None, stop: SignalStop, *, begun: bool) -> int:
        if step is not None and begun:
            resumable_jsonl.claim(self.output, self._settings(step), begun=True)
        generator, step = _restore(self.model, self.formats, self.settings, step)
        resumable_jsonl.claim(self.output, self._settings(step), begun=begun)
        _warn_if_longer_than_trained(self.model, self.formats, max(map(generator.check, self.requests)))
        size = _chunk_size(self.settings)
        lines_per_chunk = size * self.settings.num_samples
        with RowProgress(total, lines.lines, label="generate") as progress:
            # Chunks go to processes in turn, so that the parts have nearly equal lengths and are joined chunk by chunk.
            own_chunks = (chunk for chunk in _chunks(self.requests, size) if chunk[0] % self.processes == self.process)
            for position, (number, chunk) in enumerate(own_chunks):
                existing = lines.lines - position * lines_per_chunk
                if existing >= len(chunk) * self.settings.num_samples:
                    continue
                if stop.reason is not None:
                    say(f"{self.output}: stopped; run the same command again to resume", file=sys.stderr)
                    return EXIT_RESUMABLE
                # A chunk that is partly written is computed again as a whole, so that its batches are the same.
                chunk_lines = _lines(generator, chunk, number * size)
                lines.append(chunk_lines[existing:])
                progress.advance(len(chunk_lines) - existing)
        _print_speculation(generator)
        return EXIT_OK

    def _settings(self, step: int | None) -> dict[str, Any]:
        """Return everything that the lines depend on. The path of the model directory is not part of it."""
        digest = None
        if step is not None:
            digest = self.model.loaded.digest(step)
        return {
            "format": FORMAT_VERSION,
            "step": step,
            "checkpoint": digest,
            "input": {"rows": self.digest.rows, "sha256": self.digest.sha256},
            "processes": self.processes,
            "settings": dataclasses.asdict(self.settings),
        }

    def _parts(self) -> list[Path]:
        """Return the paths of all processes' parts; none for a single process, which writes the output itself."""
        if self.processes == 1:
            return []
        return [resumable_jsonl.part_path(self.output, index, self.processes) for index in range(self.processes)]

    def _lines_of(self, process: int) -> int:
        """Return the number of lines that a process writes in all."""
        size = _chunk_size(self.settings)
        chunks = range(process, -(-self.digest.rows // size), self.processes)
        rows = sum(min(size, self.digest.rows - chunk * size) for chunk in chunks)
        return rows * self.settings.num_samples

    def _join(self, stop: SignalStop) -> int:
        parts = self._parts()
        while not self.output.exists():
            waiting = [part for part in parts if not resumable_jsonl.done_path(part).exists()]
            if self.process == 0 and not waiting:
                self._require_complete(parts)
                resumable_jsonl.join(self.output, parts, _chunk_size(self.settings) * self.settings.num_samples)
                break
            if self.process != 0:
                return EXIT_OK
            if stop.reason is not None:
                say(f"{self.output}: stopped; run the same command again to resume", file=sys.stderr)
                return EXIT_RESUMABLE
            time.sleep(_POLL_SECONDS)
        return self._finish()

    def _require_complete(self, parts: Sequence[Path]) -> None:
        for index, part in enumerate(parts):
            found, expected = jsonl.count_lines(part), self._lines_of(index)
            if found != expected:
                resumable_jsonl.done_path(part).unlink()
                raise SafetyError(
                    f"{part}: found {found:,} lines, expected {expected:,}; run the same command again to complete them"
                )

    def _finish(self) -> int:
        if self.process == 0:
            for part in self._parts():
                part.unlink(missing_ok=True)
                resumable_jsonl.done_path(part).unlink(missing_ok=True)
            total = self.digest.rows * self.settings.num_samples
            say(f"{self.output}: {total:,} lines", file=sys.stderr)
        return EXIT_OK


def _restore(
    model: PromptedModel, formats: Formats, settings: GenerationConfig, step: int | None
) -> tuple[TextGenerator, int]:
    step, params = model.load(step)
    return TextGenerator(model, params, formats, settings), step


def _warn_if_longer_than_trained(model: PromptedModel, formats: Formats, longest: int) -> None:
    trained_length = model.longest_prompt(formats.plain)
    if trained_length is not None and longest > trained_length:
        subject = "a prompt with its masked positions" if formats.plain.is_masked_text else "a prompt"
        say(f"note: {subject} has {longest} tokens, more than the {trained_length} of training", file=sys.stderr)


def _print_speculation(generator: TextGenerator) -> None:
    tokens, passes = generator.speculation_stats
    if passes:
        line = f"speculation: {tokens:,} tokens in {passes:,} passes of the model, {tokens / passes:.2f} per pass"
        say(line, file=sys.stderr)


def _chunk_size(settings: GenerationConfig) -> int:
    """Return the number of prompts of a chunk."""
    return max(BATCHES_PER_CHUNK * settings.batch_size // settings.num_samples, 1)


def _chunks(requests: PromptReader, size: int) -> Iterator[tuple[int, list[PromptRequest]]]:
    """Yield (number, prompts) of the chunks."""
    source = iter(requests)
    for number in itertools.count():
        chunk = list(itertools.islice(source, size))
        if not chunk:
            return
        yield number, chunk


def _complete(generator: TextGenerator, requests: Sequence[PromptRequest], first: int) -> list[list[Completion]]:
    """Return the completions, or raise an error with advice where memory is too small."""
    try:
        return generator(requests, first)
    except jax.errors.JaxRuntimeError as error:
        memory_error = explain_memory(error, generator.settings.batch_size)
        if memory_error is None:
            raise
        raise memory_error from None


def _lines(generator: TextGenerator, requests: Sequence[PromptRequest], first: int) -> list[str]:
    """Return a JSON object for each completion.

    Each request gets `num_samples` lines. If a beam search finds fewer hypotheses, the remaining outputs are empty.
    """
    settings, lines = generator.settings, []
    for request, completions in zip(requests, _complete(generator, requests, first), strict=True):
        missing = [Completion("", ended_by="length")] * (settings.num_samples - len(completions))
        for sample, completion in enumerate([*completions, *missing]):
            fields: dict[str, Any] = {"prompt": request.prompt, **request.fields, "output": completion.text}
            if completion.spans is not None:
                fields["spans"] = list(completion.spans)
            if settings.num_samples > 1:
                fields["sample"] = sample
            if settings.return_scores:
                fields |= {
                    "ended_by": completion.ended_by,
                    "num_tokens": completion.tokens,
                    "log_likelihood": completion.log_likelihood,
                }
                if settings.beam is not None:
                    fields["score"] = completion.score
            lines.append(json.dumps(fields, ensure_ascii=False))
    return lines
