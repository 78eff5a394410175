"""`t5x-like generate`: prompts from the command line, a file or standard input."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from t5x_like.config import EXIT_OK, ConfigError, DataError, Problem
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.decoding.generate import generate_tokens
from t5x_like.decoding.prompts import PromptFormat, longest_prompt, prompt_format
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.trained import Trained, open_trained
from t5x_like.monitoring.text import visible
from t5x_like.run_directory import read_config

ROWS_AT_ONCE = 32
"""Rows that are decoded together; their lines are written when all of them are done."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and the JSON object that it came in."""

    prompt: str
    fields: dict[str, Any]


def generate_command(
    run_dir: Path,
    *,
    prompt: str | None = None,
    input_path: Path | None = None,
    mode: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    num_samples: int = 1,
    step: int | None = None,
) -> int:
    """Continues prompts with the run in `run_dir`.

    A single `prompt` is answered by text on standard output. Prompts from `input_path`, or else standard input, are
    answered by one JSON object per line: the fields that came in and `output`; with more than one sample also `sample`.
    All input is read and checked before the model is restored.

    Args:
      run_dir: Directory of a run.
      mode: Mode token; None for the default of `prompts.prompt_format`. Where a mode's targets are spans,
        `<extra_id_0>`, `<extra_id_1>`, ... in a prompt mark the gaps.
      max_new_tokens: Limit per answer.
      seed: Of the draws, which depend on the row's place in the input and the sample's number too.
      num_samples: Answers per prompt.
      step: Checkpoint; None for the newest.

    Returns:
      The exit code.

    Raises:
      UserError: the input, the settings or the run cannot be used.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if sampling.greedy and num_samples > 1:
        fix = "greedy answers to a prompt are all the same: set a temperature"
        raise ConfigError([Problem("num_samples", str(num_samples), "1 at temperature 0", fix)])
    prompt_form = prompt_format(read_config(run_dir).data, mode)
    requests = [_checked(Request(prompt, {}), "--prompt")] if prompt is not None else read_requests(input_path)

    trained = open_trained(run_dir)
    tokenizer = trained.store.tokenizer
    prompts = [_ids(request.prompt, prompt_form, tokenizer) for request in requests]
    longest, trained_on = max(map(len, prompts)), longest_prompt(trained.run.data, prompt_form)
    if longest > trained_on:
        print(f"note: a prompt of {longest} tokens, longer than the {trained_on} of training", file=sys.stderr)
    answers = _answers(
        trained,
        prompts,
        prompt_form,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        seed=seed,
        num_samples=num_samples,
        step=step,
    )
    for row, tokens in enumerate(answers):
        index, sample = divmod(row, num_samples)
        output = tokenizer.decode(tokens)
        if prompt is not None:
            print(visible(output) if sys.stdout.isatty() else output)
            continue
        fields = {"prompt": requests[index].prompt, **requests[index].fields, "output": output}
        if num_samples > 1:
            fields["sample"] = sample
        print(json.dumps(fields, ensure_ascii=False), flush=True)
    return EXIT_OK


def _ids(text: str, prompt_form: PromptFormat, tokenizer: Tokenizer) -> list[int]:
    encoded = tokenizer.encode_marked(text) if prompt_form.sentinels else tokenizer.encode(text)
    return prompt_form.ids(encoded, tokenizer.vocabulary)


def _answers(
    trained: Trained,
    prompts: Sequence[Sequence[int]],
    prompt_form: PromptFormat,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    seed: int,
    num_samples: int,
    step: int | None,
) -> Iterator[list[int]]:
    """New tokens of every prompt's every sample, in order."""
    _, params = trained.params(step)
    allowed_V = prompt_form.allowed(trained.store.vocabulary, trained.run.model.vocab_size)
    rows = [prompt for prompt in prompts for _ in range(num_samples)]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        try:
            answers = generate_tokens(
                trained.program,
                params,
                some,
                allowed_V=allowed_V,
                max_new_tokens=max_new_tokens,
                bidirectional=prompt_form.bidirectional,
                sampling=sampling,
                seed=seed,
                rows=range(start, start + len(some)),
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DataError(
                f"found too little memory for {len(some)} rows of up to {max(map(len, some))} tokens and "
                f"{max_new_tokens} new ones ({error}); lower --max-new-tokens, or shorten the prompts"
            ) from None
        yield from answers


def read_requests(path: Path | None) -> list[Request]:
    """The prompts of a file, or of standard input for None.

    Lines of JSON objects with a "prompt" where the name ends in .jsonl or the first line begins with "{"; otherwise
    each line is a prompt. Blank lines are left out.

    Raises:
      DataError: unreadable, no UTF-8, no prompts at all, or a line that is no such object; the line is named.
    """
    name = "standard input" if path is None else str(path)
    try:
        if path is None:
            text = _standard_input().read()
        else:
            text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{name}: unreadable ({error.strerror}), expected a file of prompts") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: found a byte at {error.start} that is no UTF-8, expected UTF-8 text") from None
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{name}: found no prompt; give --prompt TEXT, or lines of text or JSON")
    if (path is not None and path.suffix == ".jsonl") or lines[0][1].lstrip().startswith("{"):
        return [_request(line, f"{name}, line {number}") for number, line in lines]
    return [Request(line, {}) for _, line in lines]


def _standard_input() -> TextIO:
    if sys.stdin.isatty():
        print("reading prompts from the terminal, one per line; Ctrl-D ends them", file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    return sys.stdin


def _request(line: str, where: str) -> Request:
    expected = 'expected a JSON object with a text "prompt"'
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: found no JSON ({error}), {expected}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        found = (
            f"fields {', '.join(map(repr, fields)) or 'none'}" if isinstance(fields, dict) else type(fields).__name__
        )
        raise DataError(f"{where}: found {found}, {expected}")
    return _checked(Request(fields["prompt"], fields), where)


def _checked(request: Request, where: str) -> Request:
    """Lone surrogates can be spelled by JSON, and stand for bytes of an argument that are no UTF-8."""
    if any("\ud800" <= character <= "\udfff" for character in request.prompt):
        raise DataError(f"{where}: found half of a surrogate pair in the prompt, expected text that UTF-8 can hold")
    return request
