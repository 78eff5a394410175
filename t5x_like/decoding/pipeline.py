"""Text generation pipeline: converts prompts to token ids, decodes them, and converts the results to text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import numpy.typing as npt

from t5x_like.data.objectives.prompts import PromptFormat
from t5x_like.data.tokenizers.tokenizer import pieces, text_of
from t5x_like.decoding import infill_prompts
from t5x_like.decoding.constrained import Constraints
from t5x_like.decoding.diffusion_sampling import unmask_tokens
from t5x_like.decoding.engine import SpeculationStats, beam_tokens, generate_tokens, speculative_tokens
from t5x_like.decoding.generation_config import GenerationConfig
from t5x_like.decoding.inference_params import inference_params
from t5x_like.decoding.infill_prompts import GappedText
from t5x_like.decoding.log_likelihood import score_tokens
from t5x_like.decoding.masked_prompts import masked_text
from t5x_like.decoding.prompt_reader import PromptRequest
from t5x_like.decoding.prompted_model import Formats, PromptedModel, ends_in_eos, open_prompted
from t5x_like.decoding.speculative import Speculation
from t5x_like.decoding.stop_strings import StopStrings, compile_stop_strings, cut_at_stop
from t5x_like.decoding.unmasking_schedule import DiffusionSampling
from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.utils.type_aliases import PyTree

_QUERY_SEED = 0x9E3779B9
"""Difference of the seeds of a prompt's successive queries."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """Completion of one prompt.

    Attributes:
      text: Output text.
      spans: Texts that fill the gaps; None for a prompt without gaps.
      ended_by: EOS, a stop string, or the length limit; of several queries, that of the last one.
      tokens: Number of new tokens, without EOS.
      log_likelihood: Log-likelihood of these tokens in nats, by the unmodified model: without masks, temperature or
        EOS.
      score: Score of a beam search.
    """

    text: str
    spans: tuple[str, ...] | None = None
    ended_by: Literal["eos", "stop", "length"] = "eos"
    tokens: int = 0
    log_likelihood: float | None = None
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class _Row:
    """Decoding task for one row of a batch.

    Attributes:
      ids: Prompt.
      form: Format of the prompt.
      number: Row number of the draws.
      seed: Seed of the draws.
      limit: Largest number of new tokens.
      start: Initial state of the constraint.
      has_gaps: The prompt is a text with gaps.
    """

    ids: tuple[int, ...]
    form: PromptFormat
    number: int
    seed: int
    limit: int
    start: int
    has_gaps: bool


@dataclasses.dataclass(frozen=True)
class _DecodedRow:
    """Result of one row.

    Attributes:
      tokens: New tokens without EOS.
      before_stop: Text as bytes before a stop string; None if there is no stop string.
      score: Score of a beam search.
    """

    tokens: list[int]
    before_stop: bytes | None
    score: float | None


class TextGenerator:
    """Generator of completions with a model's parameters.

    Attributes:
      speculation_stats: Counts of speculative decoding so far.
    """

    def __init__(self, model: PromptedModel, params: PyTree, formats: Formats, settings: GenerationConfig):
        """Prepare parameters, draft and stop strings.

        Raises:
          ConfigError: the settings do not fit the vocabulary.
        """
        self.model, self.settings = model, settings
        self.params = inference_params(model.program, params)
        self.formats = dataclasses.replace(
            formats,
            plain=ends_in_eos(model.tokenizer, formats.plain),
            gaps=None if formats.gaps is None else ends_in_eos(model.tokenizer, formats.gaps),
        )
        config = model.program.run.model
        self.speculation_stats = SpeculationStats(0, 0)
        self._speculation = self._open_draft() if settings.speculates else None
        self._stops: StopStrings | None = None
        if settings.stop:
            table = pieces(model.tokenizer, range(model.tokenizer.vocabulary.vocab_size))[: config.vocab_size]
            self._stops = compile_stop_strings(settings.stop, table, config.vocab_size)

    def _open_draft(self) -> Speculation:
        settings = self.settings
        if settings.draft_model is None:
            return Speculation(settings.num_draft_tokens)
        devices = self.model.program.mesh.devices.flatten().tolist()
        draft = open_prompted(settings.draft_model, devices=devices)
        size = self.model.tokenizer.vocabulary.vocab_size
        # The layout of the ids alone does not show whether equal ids stand for equal text.
        if draft.tokenizer.vocabulary != self.model.tokenizer.vocabulary or pieces(
            draft.tokenizer, range(size)
        ) != pieces(self.model.tokenizer, range(size)):
            fix = "use a draft that was trained with the model's tokenizer"
            raise ConfigError(
                [ConfigProblem("draft_model", f"another tokenizer in {settings.draft_model}", "the model's own", fix)]
            )
        return Speculation(settings.num_draft_tokens, (draft.program, draft.load()[1]))

    def check(self, request: PromptRequest) -> int:
        """Return the number of tokens of the request's longest prompt, with the positions that are to be filled.

        Raises:
          DataError: the prompt cannot be used; the message says why.
        """
        text, _, queries = self._queries(request)
        is_continued = self.settings.diffusion is not None and text is None
        added = (request.max_new_tokens or self.settings.max_new_tokens) if is_continued else 0
        return max(len(query.ids) for query in queries) + added

    def __call__(self, requests: Sequence[PromptRequest], first: int) -> list[list[Completion]]:
        """Return the completions of each request: `num_samples`, or as many as a beam search finds.

        Args:
          first: Index of the first request in the input.
        """
        prepared = [self._queries(request) for request in requests]
        # One automaton for the whole call, so that all batches share tables of one shape and thus one program.
        constraints = Constraints(self.model.program.run.model.eos_ids[0])
        # One beam search gives all samples of a prompt; independent draws need a row each.
        samples = 1 if self.settings.beam is not None else self.settings.num_samples
        rows: list[_Row] = []
        for position, (request, (text, form, queries)) in enumerate(zip(requests, prepared, strict=True)):
            choices = self.settings.choices if request.choices is None else request.choices
            for sample in range(samples):
                # The row number of the draws: with a seed of its own, a prompt's draws do not depend on its position.
                number = sample if request.seed is not None else (first + position) * samples + sample
                for index, query in enumerate(queries):
                    start = (
                        constraints.forced(query.forced)
                        if choices is None
                        else constraints.choices([self.model.tokenizer.encode(choice) for choice in choices])
                    )
                    seed = (request.seed if request.seed is not None else self.settings.seed) + index * _QUERY_SEED
                    limit = request.max_new_tokens or self.settings.max_new_tokens
                    rows.append(_Row(query.ids, form, number % 2**31, seed, limit, start, text is not None))
        decoded = iter(self._decode(rows, constraints))
        completions = []
        for request, (text, form, queries) in zip(requests, prepared, strict=True):
            by_sample = [[next(decoded) for _ in queries] for _ in range(samples)]
            limit = request.max_new_tokens or self.settings.max_new_tokens
            complete = functools.partial(self._completion, text, form, limit)
            # A beam search has several results for the single query of a request.
            completions.append([complete(result) for results in by_sample for result in _transpose(results)])
        if self.settings.return_scores:
            return self._with_log_likelihoods(prepared, completions)
        return [[completion for completion, _ in of_request] for of_request in completions]

    def _queries(self, request: PromptRequest) -> tuple[GappedText | None, PromptFormat, list[infill_prompts.Query]]:
        """Return the text with gaps (None without), the format, and the prompts that the request needs.

        Raises:
          DataError: the prompt cannot be used.
        """
        tokenizer, formats = self.model.tokenizer, self.formats
        if self.settings.diffusion is not None and request.choices is not None:
            raise DataError(f"{request.where}: found choices, expected none for a model that fills masked positions")
        text = None if self.settings.raw_text else infill_prompts.split_at_gaps(request.prompt)
        try:
            if text is not None:
                if formats.gaps is None:
                    mode = "" if self.settings.mode is None else f" under mode {self.settings.mode}"
                    raise DataError(
                        f"found a gap, but the model was not trained to fill gaps{mode}; use --raw-text to read it as "
                        "text, or another --mode"
                    )
                queries = infill_prompts.queries(text, formats.gaps, tokenizer)
                if self.settings.beam is not None and len(queries) > 1:
                    raise DataError(
                        "found several gaps that are filled one at a time, expected a single gap with a beam search"
                    )
                return text, formats.gaps, queries
            encode = (
                tokenizer.encode_marked if formats.plain.sentinels and not self.settings.raw_text else tokenizer.encode
            )
            ids = formats.plain.ids(encode(request.prompt), tokenizer.vocabulary)
        except DataError as error:
            raise DataError(f"{request.where}: {error}" if request.where else str(error)) from None
        if not ids and self.model.program.run.model.encoder is not None and not formats.plain.is_masked_text:
            # An encoder cannot read an empty row.
            ids = [self.model.program.run.model.eos_ids[0]]
        return None, formats.plain, [infill_prompts.Query(tuple(ids))]

    def _decode(self, rows: Sequence[_Row], constraints: Constraints) -> list[list[_DecodedRow]]:
        """Return the results of each row: one, or those of a beam search. Rows of one format are decoded together."""
        results: list[list[_DecodedRow]] = [[] for _ in rows]
        by_form: dict[PromptFormat, list[int]] = {}
        for index, row in enumerate(rows):
            by_form.setdefault(row.form, []).append(index)
        for form, indices in by_form.items():
            decoded = self._decode_form([rows[index] for index in indices], form, constraints)
            for index, of_row in zip(indices, decoded, strict=True):
                results[index] = of_row
        return results

    def _unmask(
        self, rows: Sequence[_Row], form: PromptFormat, diffusion: DiffusionSampling
    ) -> list[list[_DecodedRow]]:
        """Return the one result of each row: the tokens of its gaps, or those of `limit` positions after the prompt."""
        results: list[list[_DecodedRow]] = [[] for _ in rows]
        for has_gaps in (False, True):
            indices = [index for index, row in enumerate(rows) if row.has_gaps == has_gaps]
            tokens = unmask_tokens(
                self.model.program,
                self.params,
                [
                    masked_text(self.model.loaded, rows[index].ids, 0 if has_gaps else rows[index].limit)
                    for index in indices
                ],
                # A gap has a given number of tokens, none of which can end the text.
                allowed_V=self._allowed(form) & ~self.model.is_eos_V if has_gaps else self._allowed(form),
                diffusion=diffusion,
                sampling=self.settings.sampling,
                seed=[rows[index].seed for index in indices],
                rows=[rows[index].number for index in indices],
                batch_size=self.settings.batch_size,
                ends_at_eos=not has_gaps,
                stops=self._stops,
            )
            for index, new in zip(indices, tokens, strict=True):
                # Whole blocks can have more tokens than are wanted.
                results[index] = [self._cut(new if has_gaps else new[: rows[index].limit], None)]
        return results

    def _decode_form(
        self, rows: Sequence[_Row], form: PromptFormat, constraints: Constraints
    ) -> list[list[_DecodedRow]]:
        settings = self.settings
        if settings.diffusion is not None:
            return self._unmask(rows, form, settings.diffusion)
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
            # Each prompt has `beam.size` rows in the cache.
            prompts_at_once = max(settings.batch_size // settings.beam.size, 1)
            hypotheses = beam_tokens(
                self.model.program, self.params, prompts, search=settings.beam, batch_size=prompts_at_once, **common
            )
            return [[self._cut(h.tokens, h.score) for h in row[: settings.num_samples]] for row in hypotheses]
        common |= {
            "seed": [row.seed for row in rows],
            "rows": [row.number for row in rows],
            "batch_size": settings.batch_size,
        }
        if self._speculation is None:
            tokens = generate_tokens(self.model.program, self.params, prompts, **common)
        else:
            tokens, stats = speculative_tokens(
                self.model.program, self.params, prompts, speculation=self._speculation, **common
            )
            total = self.speculation_stats
            self.speculation_stats = SpeculationStats(total.tokens + stats.tokens, total.passes + stats.passes)
        return [[self._cut(row, None)] for row in tokens]

    @functools.lru_cache(maxsize=4)  # noqa: B019 - as long as the process lives anyway
    def _allowed(self, form: PromptFormat) -> npt.NDArray[np.bool_]:
        """Return bool [V], the tokens that the format and the allowed characters permit."""
        allowed_V = self.model.allowed(form)
        if self.settings.allowed_characters is None:
            return allowed_V
        characters = set(self.settings.allowed_characters)
        table = pieces(self.model.tokenizer, range(self.model.tokenizer.vocabulary.base_size))
        fits = np.zeros_like(allowed_V)
        for token, piece in enumerate(table[: len(fits)]):
            try:
                # A piece that ends inside a character cannot be decoded and is left out, so the output is always valid
                # text.
                fits[token] = bool(piece) and set(piece.decode()) <= characters
            except UnicodeDecodeError:
                continue
        # Without EOS no answer could end before the limit.
        fits[list(self.model.program.run.model.eos_ids)] = True
        return allowed_V & fits

    def _cut(self, tokens: list[int], score: float | None) -> _DecodedRow:
        """Find the stop string that ended the row, and cut its text before it."""
        if self._stops is None:
            return _DecodedRow(tokens, None, score)
        before, stopped = cut_at_stop(b"".join(pieces(self.model.tokenizer, tokens)), self._stops.strings)
        return _DecodedRow(tokens, before if stopped else None, score)

    def _completion(
        self, text: GappedText | None, form: PromptFormat, limit: int, results: Sequence[_DecodedRow]
    ) -> tuple[Completion, list[list[int]]]:
        """Return the completion that the results of a request's queries give, and the tokens of each query."""
        tokenizer, last = self.model.tokenizer, results[-1]
        ended_by: Literal["eos", "stop", "length"] = "length" if len(last.tokens) >= limit else "eos"
        if last.before_stop is not None:
            ended_by = "stop"
        output = "".join(text_of(result.tokens, result.before_stop, tokenizer) for result in results)
        tokens = [result.tokens for result in results]
        spans: tuple[str, ...] | None = None
        if text is not None and form.infill is not None and not form.infill.answer_is_whole_text:
            spans = tuple(infill_prompts.span_texts(infill_prompts.spans(tokens, text, form, tokenizer), tokenizer))
            if self.settings.return_filled:
                output = infill_prompts.filled(text, spans, tokenizer)
        return Completion(output, spans, ended_by, sum(map(len, tokens)), None, last.score), tokens

    def _with_log_likelihoods(
        self,
        prepared: Sequence[tuple[GappedText | None, PromptFormat, list[infill_prompts.Query]]],
        completions: Sequence[Sequence[tuple[Completion, list[list[int]]]]],
    ) -> list[list[Completion]]:
        """Return the completions of each request with the log-likelihood of their tokens."""
        # (request, completion, prompt, tokens) of all queries, by the direction of attention in the prompt.
        items_by_direction: dict[bool, list[tuple[int, int, tuple[int, ...], list[int]]]] = {}
        for request, (of_request, (_, form, queries)) in enumerate(zip(completions, prepared, strict=True)):
            for number, (_, tokens_of_queries) in enumerate(of_request):
                for query, tokens in zip(queries, tokens_of_queries, strict=True):
                    items = items_by_direction.setdefault(form.bidirectional, [])
                    items.append((request, number, query.ids, tokens))
        sums = [[0.0] * len(of_request) for of_request in completions]
        for bidirectional, items in items_by_direction.items():
            pairs = [(ids, tokens) for _, _, ids, tokens in items]
            scores = score_tokens(self.model.program, self.params, pairs, bidirectional=bidirectional)
            for (request, number, _, _), score in zip(items, scores, strict=True):
                sums[request][number] += score.sum
        return [
            [
                dataclasses.replace(completion, log_likelihood=log_likelihood)
                for (completion, _), log_likelihood in zip(of_request, of_sums, strict=True)
            ]
            for of_request, of_sums in zip(completions, sums, strict=True)
        ]


def _transpose(results: Sequence[Sequence[_DecodedRow]]) -> list[list[_DecodedRow]]:
    """Return [query][result] as [result][query]."""
    return [list(of_queries) for of_queries in zip(*results, strict=True)]


def explain_memory(error: Exception, rows: int) -> DataError | None:
    """Return an error with advice if `error` reports too little memory, else None."""
    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    return DataError(
        f"found too little memory for {rows} rows at once ({error}); lower --batch-size or --max-new-tokens, or "
        "shorten the prompts"
    )
