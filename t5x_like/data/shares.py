"""The mixture three times: by example, by raw token and by token of the loss, which are not the same."""

from __future__ import annotations

import dataclasses

import numpy as np

from t5x_like.config.rates import row_loss_tokens, row_tokens
from t5x_like.data.packing import Packed
from t5x_like.data.stream import Stream


@dataclasses.dataclass(frozen=True)
class Share:
    """A corpus's and objective's part of the mixture. `tokens` (raw) and `loss_tokens` are per row: means."""

    corpus: str
    name: str
    sub_batch: str
    tokens: float
    loss_tokens: float
    by_example: float
    by_token: float
    by_loss_token: float


def mixture_shares(stream: Stream) -> list[Share]:
    """The mixture of the first phase.

    By example, every row counts as one; a packed row is divided among its examples. Packed rows are those of the plan,
    whose documents are drawn by the rates of the objectives, and long ones cut.
    """
    found: list[tuple[str, str, str, float]] = []
    sizes: list[tuple[float, float]] = []
    for corpus, objective, share in stream.shares():
        source = next(source for source in stream.sources if source.name == corpus)
        if not isinstance(source.reader, Packed):
            found.append((corpus, objective.name, stream.sub_batch_of(corpus, objective), share))
            sizes.append((row_tokens(objective, stream.data), row_loss_tokens(objective, stream.data)))
            continue
        for one in source.objectives:
            part = source.reader.row_share(one)
            tokens, loss = source.reader.row_means(one)
            found.append((corpus, one.name, stream.sub_batch_of(corpus, one), share * part))
            sizes.append((tokens / part, loss / part) if part else (0.0, 0.0))
    tokens_K, loss_K = np.array(sizes, np.float64).reshape(-1, 2).T
    examples_K = np.array([share for *_, share in found])
    columns = np.stack(
        [
            tokens_K,
            loss_K,
            examples_K,
            examples_K * tokens_K / (examples_K @ tokens_K),
            examples_K * loss_K / (examples_K @ loss_K),
        ]
    )
    return [
        Share(corpus, name, sub_batch, *numbers)
        for (corpus, name, sub_batch, _), numbers in zip(found, columns.T.tolist(), strict=True)
    ]
