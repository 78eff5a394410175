"""What a training step reads: cells, raw tokens and tokens of the loss, by denoiser. From the configuration alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from t5x_like.config import RunConfig, batch_spec
from t5x_like.config.batch import MAIN, rows_per_sub_batch, sub_batch_of
from t5x_like.config.data import CorpusShare, DataConfig
from t5x_like.config.objectives import Labelled, Objective
from t5x_like.config.rates import Phase, pattern, phases, row_loss_tokens, row_tokens


@dataclasses.dataclass(frozen=True)
class DenoiserTokens:
    """An objective's part of a step, on average over a period of the mixture.

    Attributes:
      rows: Of a step, over all corpora.
      raw_tokens: Of the text that these rows were made from, at most: documents that do not fill their rows have fewer.
      loss_tokens: That are scored, sentinels and EOS among them; at most, likewise.
    """

    name: str
    sub_batch: str
    rows: float
    raw_tokens: float
    loss_tokens: float


def tokens_per_step(run: RunConfig) -> int:
    """Cells of a global batch, padding included: inputs of the encoder and of the decoder."""
    return sum(
        math.prod(array.shape)
        for features in batch_spec(run).values()
        for name, array in features.items()
        if name.endswith("_input_tokens")
    )


def stream_cells(run: RunConfig) -> dict[str, int]:
    """Cells of a global batch by stack: encoder and decoder, as far as they are there."""
    cells: dict[str, int] = {}
    for features in batch_spec(run).values():
        for name, array in features.items():
            if name.endswith("_input_tokens"):
                stack = "decoder" if name.startswith("decoder") else "encoder"
                cells[stack] = cells.get(stack, 0) + math.prod(array.shape)
    return cells


def denoiser_tokens(run: RunConfig) -> list[DenoiserTokens]:
    """The objectives of the first phase, in the order of `data.objectives`; none where seqio is read live.

    Corpora share the rows by their configured rates; where `data.sampling` goes by size, which is known from the stores
    only, by equal rates.
    """
    data = run.data
    if data.seqio is not None:
        return []
    rows_of = rows_per_sub_batch(data, run.training.batch_size)
    by_name: dict[str, DenoiserTokens] = {}
    for name, objective, rows in _rows(data, phases(data)[0], rows_of):
        raw, loss = row_tokens(objective, data) * rows, _row_loss(objective, data) * rows
        old = by_name.get(objective.name, DenoiserTokens(objective.name, name, 0.0, 0.0, 0.0))
        by_name[objective.name] = DenoiserTokens(
            objective.name, name, old.rows + rows, old.raw_tokens + raw, old.loss_tokens + loss
        )
    return [by_name[objective.name] for objective in data.objectives if objective.name in by_name]


def _row_loss(objective: Objective, data: DataConfig) -> float:
    """Scored tokens of a row; of a head that labels each token, as many as the row has cells."""
    if isinstance(objective, Labelled) and objective.kind == "token_classification":
        return float(row_tokens(objective, data))
    return row_loss_tokens(objective, data)


def _rows(data: DataConfig, phase: Phase, rows_of: dict[str, int]) -> Iterator[tuple[str, Objective, float]]:
    """(sub-batch, objective, mean rows of a step) for each corpus and objective."""
    total = sum(phase.corpora.values())
    for share in data.sources:
        part = phase.corpora[share.name] / total
        objectives = data.objectives_of(share)
        counts = _counts(data, share, objectives, phase)
        places = [sub_batch_of(objective, data) if len(rows_of) > 1 else MAIN for objective in objectives]
        for objective, count, place in zip(objectives, counts, places, strict=True):
            beside = sum(other for other, there in zip(counts, places, strict=True) if there == place)
            yield place, objective, rows_of[place] * part * count / beside


def _counts(data: DataConfig, share: CorpusShare, objectives: tuple[Objective, ...], phase: Phase) -> tuple[float, ...]:
    """Rows of each objective, in proportion: the slots of a superblock, or the rates where rows are whole examples."""
    if data.examples_of(share) == "windows":
        return tuple(float(count) for count in pattern(objectives, data, phase.objectives))
    return tuple(phase.objectives[objective.name] for objective in objectives)
