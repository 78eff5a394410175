"""Shares of a mixture by example, by raw token and by loss token, which differ from each other."""

from __future__ import annotations

import dataclasses

import numpy as np

from t5x_like.config.mixture_schedule import row_loss_tokens, row_tokens
from t5x_like.data.stream.packing import PackedRows
from t5x_like.data.stream.preference_rows import PackedPreferenceRows
from t5x_like.data.stream.row_stream import TrainingStream


@dataclasses.dataclass(frozen=True)
class MixtureShare:
    """Share of a (corpus, objective) pair in the mixture.

    Attributes:
      corpus, name: Names of the corpus and of the objective.
      sub_batch: Sub-batch of its rows.
      tokens, loss_tokens: Mean raw tokens and mean loss tokens of a row.
      by_example, by_token, by_loss_token: Its shares.
    """

    corpus: str
    name: str
    sub_batch: str
    tokens: float
    loss_tokens: float
    by_example: float
    by_token: float
    by_loss_token: float


def mixture_shares(stream: TrainingStream) -> list[MixtureShare]:
    """Return the shares of the mixture in the first phase.

    By example, every row counts as one, and a packed row is divided among its examples. Packed rows are counted
    in the packing plan: the objectives of their documents are drawn by the rates, and long documents are cut.
    """
    pairs: list[tuple[str, str, str, float]] = []
    sizes: list[tuple[float, float]] = []
    for corpus, objective, share in stream.mixture_shares():
        source = next(source for source in stream.sources if source.name == corpus)
        if not isinstance(source.reader, PackedRows):
            pairs.append((corpus, objective.name, stream.sub_batch_of(corpus, objective), share))
            pairs_per_row = source.reader.pairs_per_row if isinstance(source.reader, PackedPreferenceRows) else 1
            loss_tokens = row_loss_tokens(objective, stream.data) * pairs_per_row
            sizes.append((row_tokens(objective, stream.data), loss_tokens))
            continue
        for packed_objective in source.objectives:
            row_share = source.reader.row_share(packed_objective)
            tokens, loss = source.reader.row_means(packed_objective)
            sub_batch = stream.sub_batch_of(corpus, packed_objective)
            pairs.append((corpus, packed_objective.name, sub_batch, share * row_share))
            # `row_means` are means over all rows; here they are per row of this objective.
            sizes.append((tokens / row_share, loss / row_share) if row_share else (0.0, 0.0))
    tokens_K, loss_K = np.array(sizes, np.float64).reshape(-1, 2).T
    examples_K = np.array([share for *_, share in pairs])
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
        MixtureShare(corpus, name, sub_batch, *numbers)
        for (corpus, name, sub_batch, _), numbers in zip(pairs, columns.T.tolist(), strict=True)
    ]
