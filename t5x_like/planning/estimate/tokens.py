"""Tokens of a training step by denoiser: token positions, raw tokens and loss tokens, from the configuration alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator

from t5x_like.config import RunConfig, batch_spec
from t5x_like.config.batch_spec import MAIN, row_shapes, rows_per_sub_batch, sub_batch_of, sub_batch_spec
from t5x_like.config.data import CorpusShareConfig, DataConfig
from t5x_like.config.mixture_schedule import Phase, phases, row_loss_tokens, row_tokens, rows_per_block
from t5x_like.config.model import ModelConfig
from t5x_like.config.objectives import Objective
from t5x_like.models.flops import forward_flops


@dataclasses.dataclass(frozen=True)
class DenoiserTokens:
    """Share of one objective in a step, averaged over a period of the mixture.

    Attributes:
      rows: Rows per step, over all corpora.
      raw_tokens: Tokens of the text that these rows were made from; an upper bound, because documents that do not fill
        their rows have fewer.
      loss_tokens: Target tokens with a loss, including sentinels and EOS; an upper bound likewise.
    """

    name: str
    sub_batch: str
    rows: float
    raw_tokens: float
    loss_tokens: float


def tokens_per_step(run: RunConfig) -> int:
    """Return the token positions of a global batch, padding included: inputs of the encoder and of the decoder."""
    return sum(
        math.prod(array.shape)
        for features in batch_spec(run).values()
        for name, array in features.items()
        if name.endswith("_input_tokens")
    )


def token_positions(run: RunConfig) -> dict[str, int]:
    """Return the token positions of a global batch for each stack (encoder, decoder) that the model has."""
    positions: dict[str, int] = {}
    for features in batch_spec(run).values():
        for name, array in features.items():
            if name.endswith("_input_tokens"):
                stack = "decoder" if "decoder" in name else "encoder"
                positions[stack] = positions.get(stack, 0) + math.prod(array.shape)
    return positions


def denoiser_tokens(run: RunConfig) -> list[DenoiserTokens]:
    """Return the objectives of the first phase, in the order of `data.objectives`; an empty list for live seqio data.

    Corpora share the rows by their configured rates. If `data.corpus_mixing` depends on corpus sizes, which only the
    stores know, equal rates are assumed.
    """
    data = run.data
    if data.seqio is not None:
        return []
    rows_of = rows_per_sub_batch(data, run.training.global_batch_size)
    by_name: dict[str, DenoiserTokens] = {}
    for name, objective, rows in _rows(data, phases(data)[0], rows_of):
        raw, loss = row_tokens(objective, data) * rows, row_loss_tokens(objective, data) * rows
        old = by_name.get(objective.name, DenoiserTokens(objective.name, name, 0.0, 0.0, 0.0))
        by_name[objective.name] = DenoiserTokens(
            objective.name, name, old.rows + rows, old.raw_tokens + raw, old.loss_tokens + loss
        )
    return [by_name[objective.name] for objective in data.objectives if objective.name in by_name]


def _rows(
    data: DataConfig, phase: Phase, rows_of: dict[str, int], corpora: Collection[str] | None = None
) -> Iterator[tuple[str, Objective, float]]:
    """Yield (sub-batch, objective, mean rows per step) for each objective of each corpus, or of the named corpora."""
    total = sum(phase.corpora.values())
    for share in data.sources:
        if corpora is not None and share.name not in corpora:
            continue
        corpus_fraction = phase.corpora[share.name] / total
        objectives = data.objectives_of(share)
        counts = _counts(data, share, objectives, phase)
        sub_batches = [sub_batch_of(objective, data) if len(rows_of) > 1 else MAIN for objective in objectives]
        for objective, count, sub_batch in zip(objectives, counts, sub_batches, strict=True):
            # The rows of a sub-batch are shared by the objectives that go into it.
            in_sub_batch = sum(n for n, other in zip(counts, sub_batches, strict=True) if other == sub_batch)
            yield sub_batch, objective, rows_of[sub_batch] * corpus_fraction * count / in_sub_batch


def _counts(
    data: DataConfig, share: CorpusShareConfig, objectives: tuple[Objective, ...], phase: Phase
) -> tuple[float, ...]:
    """Return the relative rows of each objective: those of a block, or the rates of whole examples."""
    if data.examples_of(share) == "windows":
        return tuple(float(count) for count in rows_per_block(objectives, data, phase.objectives))
    return tuple(phase.objectives[objective.name] for objective in objectives)


def prefix_lengths(run: RunConfig) -> list[tuple[int, float]]:
    """Return the lengths of the bidirectional parts of a decoder's rows (the prefix of a prefix LM, the block of block
    diffusion), each with its mean number in a row.

    Empty for other rows, for live seqio data, and for rows of documents, whose inputs depend on the text. Labelled
    texts are bidirectional as a whole, and count as long as their rows.
    """
    data = run.data
    if not data.has_bidirectional_decoder or data.seqio is not None:
        return []
    if data.labelled is not None:
        return [(data.row_length, 1.0)]
    batch = run.training.global_batch_size
    found = []
    windows = {share.name for share in data.sources if data.examples_of(share) == "windows"}
    for _, objective, rows in _rows(data, phases(data)[0], rows_per_sub_batch(data, batch), windows):
        found += _prefixes(objective, data, rows / batch)
    return found


def _prefixes(objective: Objective, data: DataConfig, share: float) -> list[tuple[int, float]]:
    """Return the prefixes of a window of an objective, in a share of the rows."""
    window = objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
    each = share * objective.windows_per_row
    return [(length, each * likely) for length, likely in objective.prefix_lengths(window)] if window else []


@dataclasses.dataclass(frozen=True)
class ObjectiveCost:
    """Tokens and model FLOPs of a row of an objective.

    Attributes:
      raw_tokens: Tokens of the text that the row was made from; an upper bound as in `DenoiserTokens`.
      loss_tokens: Mean number of target tokens with a loss.
      flops: Model FLOPs of training on the row: three times the forward pass.
    """

    name: str
    raw_tokens: float
    loss_tokens: float
    flops: float


def objective_costs(model: ModelConfig, data: DataConfig) -> list[ObjectiveCost]:
    """Return the costs of the objectives of `data`, each in rows of its own sub-batch.

    Objectives whose rows are too short for any text are left out, and so are those without a loss on tokens: of a task
    head, and of preference pairs. Live seqio data have none.
    """
    if data.seqio is not None or model.task_head is not None or data.preference is not None:
        return []
    shapes = row_shapes(data)
    costs = []
    for objective in data.objectives:
        raw = row_tokens(objective, data)
        if not raw:
            continue
        shape = shapes[sub_batch_of(objective, data) if len(shapes) > 1 else MAIN]
        prefixes = _prefixes(objective, data, 1.0) if data.has_bidirectional_decoder else []
        forward = forward_flops(model, sub_batch_spec(data, shape, rows=1), prefixes=prefixes)
        costs.append(ObjectiveCost(objective.name, raw, row_loss_tokens(objective, data), 3.0 * forward))
    return costs
