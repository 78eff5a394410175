"""From prompts to answers, a chunk of prompts at a time: what is asked of the model, and what it says, as text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import numpy.typing as npt

from t5x_like.config import ConfigError, DataError, Problem
from t5x_like.decoding import infilling
from t5x_like.decoding.beam import BeamSearch
from t5x_like.decoding.constraints import Constraints
from t5x_like.decoding.generate import Passes, beam_tokens, generate_tokens, speculative_tokens
from t5x_like.decoding.infilling import Gapped
from t5x_like.decoding.models import Formats, PromptedModel, ends_in_eos, open_model
from t5x_like.decoding.prompts import PromptFormat
from t5x_like.decoding.ready import ready_params
from t5x_like.decoding.requests import MOST_NEW_TOKENS, Request, is_text
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.scoring import score_tokens
from t5x_like.decoding.speculative import Speculation
from t5x_like.decoding.spelling import pieces, text_of
from t5x_like.decoding.stops import Stops, make_stops

Tree = Any
_QUERY_SEED = 0x9E3779B9
"""Between the seeds of a prompt's several queries."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides about the answers, beside the model and the prompts.

    Attributes:
      mode: Mode token; None for the default of `prompts.prompt_format`.
      max_new_tokens: Per answer, where a prompt has no number of its own.
      sampling: How tokens are chosen.
      seed: Of the draws, which depend on the prompt's place in the input and the sample's number too. A prompt with a
        seed of its own is drawn from that alone, wherever it stands.
      num_samples: Answers per prompt; of a beam search the best so many.
      beam: In place of choosing token by token.
      stop: Strings that end an answer, and are left out of it.
      choices: Texts of which an answer is one.
      allowed_characters: Of which the answers consist; None: of all.
      literal: `<mask>` and `<extra_id_N>` in a prompt are text.
      fill: Of a prompt with gaps, the answer is the whole text with its gaps filled.
      scores: Answers come with their log-likelihood and how they ended.
      cache_dtype: See `generate_tokens`.
      draft: Directory of a smaller model that proposes tokens (`speculative`).
      lookup: What followed the same tokens before is proposed.
      draft_tokens: Proposed at once.
      batch_size: Answers that are decoded at once.
    """

    mode: str | None = None
    max_new_tokens: int = 64
    sampling: Sampling = Sampling()
    seed: int = 0
    num_samples: int = 1
    beam: BeamSearch | None = None
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    allowed_characters: str | None = None
    literal: bool = False
    fill: bool = False
    scores: bool = False
    cache_dtype: str | None = None
    draft: str | None = None
    lookup: bool = False
    draft_tokens: int = 4
    batch_size: int = 32

    def __post_init__(self) -> None:
        problems = []
        if self.beam is None and self.sampling.greedy and self.num_samples > 1:
            fix = "greedy answers to a prompt are all the same: set a temperature or a beam size"
            problems.append(Problem("num_samples", str(self.num_samples), "1 at temperature 0", fix))
        if self.beam is not None and self.num_samples > self.beam.size:
            problems.append(Problem("num_samples", str(self.num_samples), f"at most the {self.beam.size} beams"))
        if self.beam is not None and not self.sampling.greedy:
            problems.append(Problem("temperature", repr(self.sampling.temperature), "0 beside a beam search"))
        if self.draft is not None and self.lookup:
            problems.append(Problem("lookup", "a draft model beside it", "one of the two"))
        if self.beam is not None and self.speculates:
            problems.append(Problem("draft", "a beam search beside it", "no draft or lookup: beams have no use for it"))
        if not 0 < self.max_new_tokens <= MOST_NEW_TOKENS:
            problems.append(Problem("max_new_tokens", str(self.max_new_tokens), f"from 1 to {MOST_NEW_TOKENS:,}"))
        given = {"stop": self.stop, "choice": self.choices or (), "allowed_characters": self.allowed_characters or ""}
        for name, texts in given.items():
            if not all(map(is_text, texts)):
                problems.append(Problem(name, "bytes that are no UTF-8", "text that UTF-8 can hold"))
        if self.choices is not None and self.allowed_characters is not None:
            problems.append(Problem("allowed_characters", repr(self.allowed_characters), "none beside choices"))
        if problems:
            raise ConfigError(problems)

    @property
    def speculates(self) -> bool:
        return self.draft is not None or self.lookup


@dataclasses.dataclass(frozen=True)
class Answer:
    """Attributes:
    text: The output.
    spans: What fills the gaps; None of a prompt without.
    ended_by: EOS, a stop string, or the limit; of several queries, the last one's.
    tokens: How many were made, without EOS.
    log_likelihood: Of these tokens, in nats, by the model as it is, without masks, temperature or EOS.
    score: Of a beam search.
    """

    text: str
    spans: tuple[str, ...] | None = None
    ended_by: Literal["eos", "stop", "length"] = "eos"
    tokens: int = 0
    log_likelihood: float | None = None
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class _Row:
    """One thing to decode."""

    ids: tuple[int, ...]
    form: PromptFormat
    number: int
    seed: int
    limit: int
    start: int


@dataclasses.dataclass(frozen=True)
class _Made:
    """What came of a row: tokens without EOS, their text as bytes up to a stop string (None: no such string)."""

    tokens: list[int]
    before_stop: bytes | None
    score: float | None


class Answering:
    """Answers prompts with a model's parameters.

    Attributes:
      passes: Of a speculation, so far.
    """

    def __init__(self, model: PromptedModel, params: Tree, formats: Formats, settings: Settings):
        """Raises ConfigError where the settings do not fit the vocabulary."""
        self.model, self.settings = model, settings
        self.params = ready_params(model.program, params)
        self.formats = dataclasses.replace(
            formats,
            plain=ends_in_eos(model.speller, formats.plain),
            gaps=None if formats.gaps is None else ends_in_eos(model.speller, formats.gaps),
        )
        config = model.program.run.model
        self.passes = Passes(0, 0)
        self._speculation = self._open_draft() if settings.speculates else None
        self._stops: Stops | None = None
        if settings.stop:
            table = pieces(model.speller, range(model.speller.vocabulary.vocab_size))[: config.vocab_size]
            self._stops = make_stops(settings.stop, table, config.vocab_size)

    def _open_draft(self) -> Speculation:
        settings = self.settings
        if settings.draft is None:
            return Speculation(settings.draft_tokens)
        draft = open_model(Path(settings.draft), self.model.program.mesh.devices.flatten().tolist())
        size = self.model.speller.vocabulary.vocab_size
        if draft.speller.vocabulary != self.model.speller.vocabulary or pieces(draft.speller, range(size)) != pieces(
            self.model.speller, range(size)
        ):
            fix = "a draft must have been trained with the model's tokenizer"
            raise ConfigError([Problem("draft", f"another tokenizer in {settings.draft}", "the model's own", fix)])
        return Speculation(settings.draft_tokens, (draft.program, draft.load(None)[1]))

    def check(self, request: Request) -> int:
        """The tokens of the longest prompt that the request makes.

        Raises:
          DataError: it cannot be asked, and why.
        """
        return max(len(query.ids) for query in self._queries(request)[2])

    def __call__(self, requests: Sequence[Request], first: int) -> list[list[Answer]]:
        """Answers to each request, `num_samples` of them or as many as a beam search has.

        Args:
          first: Place of the first request in the input.
        """
        asked = [self._queries(request) for request in requests]
        constraints = Constraints(self.model.program.run.model.eos_ids[0])
        samples = 1 if self.settings.beam is not None else self.settings.num_samples
        rows: list[_Row] = []
        for place, (request, (_, form, queries)) in enumerate(zip(requests, asked, strict=True)):
            choices = self.settings.choices if request.choices is None else request.choices
            for sample in range(samples):
                own = request.seed is not None
                number = sample if own else (first + place) * samples + sample
                for index, query in enumerate(queries):
                    start = (
                        constraints.forced(query.forced)
                        if choices is None
                        else constraints.choices([self.model.speller.encode(choice) for choice in choices])
                    )
                    seed = (request.seed if request.seed is not None else self.settings.seed) + index * _QUERY_SEED
                    limit = request.max_new_tokens or self.settings.max_new_tokens
                    rows.append(_Row(query.ids, form, number % 2**31, seed, limit, start))
        made = iter(self._decoded(rows, constraints))
        answers = []
        for request, (text, form, queries) in zip(requests, asked, strict=True):
            of_samples = [[next(made) for _ in queries] for _ in range(samples)]
            limit = request.max_new_tokens or self.settings.max_new_tokens
            one = functools.partial(self._answer, text, form, limit)
            # A beam search has several results for the one query of a request.
            answers.append([one(found) for results in of_samples for found in _transposed(results)])
        return self._scored(asked, answers) if self.settings.scores else [[a for a, _ in row] for row in answers]

    def _queries(self, request: Request) -> tuple[Gapped | None, PromptFormat, list[infilling.Query]]:
        speller, formats = self.model.speller, self.formats
        text = None if self.settings.literal else infilling.gapped(request.prompt)
        try:
            if text is not None:
                if formats.gaps is None:
                    mode = "" if self.settings.mode is None else f" under mode {self.settings.mode}"
                    raise DataError(
                        f"found a gap, but the model fills none{mode}; take it as text by --literal, or another --mode"
                    )
                queries = infilling.queries(text, formats.gaps, speller)
                if self.settings.beam is not None and len(queries) > 1:
                    raise DataError("found several gaps that are filled one by one, expected one with a beam search")
                return text, formats.gaps, queries
            encode = speller.encode_marked if formats.plain.sentinels and not self.settings.literal else speller.encode
            ids = formats.plain.ids(encode(request.prompt), speller.vocabulary)
        except DataError as error:
            raise DataError(f"{request.where}: {error}" if request.where else str(error)) from None
        if not ids and self.model.program.run.model.encoder is not None:
            ids = [self.model.program.run.model.eos_ids[0]]
        return None, formats.plain, [infilling.Query(tuple(ids))]

    def _decoded(self, rows: Sequence[_Row], constraints: Constraints) -> list[list[_Made]]:
        """What comes of each row: one result, or those of a beam search."""
        results: list[list[_Made]] = [[] for _ in rows]
        by_form: dict[PromptFormat, list[int]] = {}
        for index, row in enumerate(rows):
            by_form.setdefault(row.form, []).append(index)
        for form, indices in by_form.items():
            some = [rows[index] for index in indices]
            for index, made in zip(indices, self._of_form(some, form, constraints), strict=True):
                results[index] = made
        return results

    def _of_form(self, rows: Sequence[_Row], form: PromptFormat, constraints: Constraints) -> list[list[_Made]]:
        settings = self.settings
        constrained = any(row.start for row in rows)
        common: dict[str, Any] = {
            "allowed_V": self._allowed(form),
            "max_new_tokens": [row.limit for row in rows],
            "bidirectional": form.bidirectional,
            "sampling": settings.sampling,
            "stops": self._stops,
            "automaton": constraints.automaton() if constrained else None,
            "start_states": [row.start for row in rows] if constrained else None,
            "cache_dtype": settings.cache_dtype,
        }
        prompts = [row.ids for row in rows]
        if settings.beam is not None:
            beams = max(settings.batch_size // settings.beam.size, 1)
            found = beam_tokens(
                self.model.program, self.params, prompts, search=settings.beam, batch_size=beams, **common
            )
            return [[self._made(h.tokens, h.score) for h in row[: settings.num_samples]] for row in found]
        common |= {
            "seed": [row.seed for row in rows],
            "rows": [row.number for row in rows],
            "batch_size": settings.batch_size,
        }
        if self._speculation is None:
            tokens = generate_tokens(self.model.program, self.params, prompts, **common)
        else:
            tokens, passes = speculative_tokens(
                self.model.program, self.params, prompts, speculation=self._speculation, **common
            )
            self.passes = Passes(self.passes.tokens + passes.tokens, self.passes.passes + passes.passes)
        return [[self._made(row, None)] for row in tokens]

    @functools.lru_cache(maxsize=4)  # noqa: B019 - as long as the process lives anyway
    def _allowed(self, form: PromptFormat) -> npt.NDArray[np.bool_]:
        allowed_V = self.model.allowed(form)
        if self.settings.allowed_characters is None:
            return allowed_V
        characters = set(self.settings.allowed_characters)
        text = pieces(self.model.speller, range(self.model.speller.vocabulary.base_size))
        fits = np.zeros_like(allowed_V)
        for token, piece in enumerate(text[: len(fits)]):
            try:
                fits[token] = bool(piece) and set(piece.decode()) <= characters
            except UnicodeDecodeError:
                continue
        fits[list(self.model.program.run.model.eos_ids)] = True
        return allowed_V & fits

    def _made(self, tokens: list[int], score: float | None) -> _Made:
        if self._stops is None:
            return _Made(tokens, None, score)
        before, found = self._stops.cut(b"".join(pieces(self.model.speller, tokens)))
        return _Made(tokens, before if found else None, score)

    def _answer(
        self, text: Gapped | None, form: PromptFormat, limit: int, found: Sequence[_Made]
    ) -> tuple[Answer, list[list[int]]]:
        speller, last = self.model.speller, found[-1]
        ended_by: Literal["eos", "stop", "length"] = "length" if len(last.tokens) >= limit else "eos"
        if last.before_stop is not None:
            ended_by = "stop"
        output = "".join(text_of(made.tokens, made.before_stop, speller) for made in found)
        tokens = [made.tokens for made in found]
        filled: tuple[str, ...] | None = None
        if text is not None and form.gaps != "whole":
            filled = tuple(infilling.span_texts(infilling.spans(tokens, text, form, speller), speller))
            if self.settings.fill:
                output = infilling.filled(text, filled, speller)
        return Answer(output, filled, ended_by, sum(map(len, tokens)), None, last.score), tokens

    def _scored(self, asked: Sequence[Any], answers: Sequence[Sequence[tuple[Answer, list[list[int]]]]]) -> list[Any]:
        """The answers with the log-likelihood of their tokens."""
        by_form: dict[bool, list[tuple[int, int, tuple[int, ...], list[int]]]] = {}
        for place, (row, (_, form, queries)) in enumerate(zip(answers, asked, strict=True)):
            for number, (_, tokens) in enumerate(row):
                for query, of_query in zip(queries, tokens, strict=True):
                    by_form.setdefault(form.bidirectional, []).append((place, number, query.ids, of_query))
        sums = [[0.0] * len(row) for row in answers]
        for bidirectional, items in by_form.items():
            pairs = [(ids, tokens) for _, _, ids, tokens in items]
            scores = score_tokens(self.model.program, self.params, pairs, bidirectional=bidirectional)
            for (place, number, _, _), score in zip(items, scores, strict=True):
                sums[place][number] += score.sum
        return [
            [dataclasses.replace(a, log_likelihood=s) for (a, _), s in zip(row, of_row, strict=True)]
            for row, of_row in zip(answers, sums, strict=True)
        ]


def _transposed(results: Sequence[Sequence[_Made]]) -> list[list[_Made]]:
    """[query][result] -> [result][query]."""
    return [list(found) for found in zip(*results, strict=True)]


def explain_memory(error: Exception, rows: int) -> DataError | None:
    """What to say of an error that is one of too little memory."""
    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    return DataError(
        f"found too little memory for {rows} rows at once ({error}); lower --batch-size or --max-new-tokens, or "
        "shorten the prompts"
    )
