"""Batches of seqio's feature converters, packed or not, feed the models unchanged."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("seqio")

from helpers.model_examples import logits, model  # noqa: E402
from helpers.seqio_examples import live_config  # noqa: E402

from t5x_like.config.batch_spec import row_shapes, sub_batch_spec  # noqa: E402
from t5x_like.config.objectives import Layout  # noqa: E402
from t5x_like.data.seqio_.live_dataset import LiveBatches  # noqa: E402
from t5x_like.training.losses import targets_and_weights  # noqa: E402

pytestmark = pytest.mark.slow

ROWS = 4
ARCHITECTURES = {"causal_lm": "decoder"}


def losses_of_examples(features: dict[str, Any], layout: Layout) -> list[float]:
    """Return the summed loss of each example of a batch, by segment where rows are packed."""
    config = dataclasses.replace(model(ARCHITECTURES.get(layout, layout), "rope"), vocab_size=512)
    scores = logits(config, features)
    targets, weights = targets_and_weights(features)
    likely = np.asarray(jax.nn.log_softmax(scores))
    loss = -np.take_along_axis(likely, targets[..., None], axis=-1)[..., 0] * np.asarray(weights)
    stack = "encoder" if layout == "encoder" else "decoder"
    segments = features.get(f"{stack}_segment_ids", (targets > 0).astype(np.int32))
    return [
        float(row[ids == segment].sum())
        for row, ids in zip(loss, segments, strict=True)
        for segment in range(1, ids.max() + 1)
    ]


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("encoder_decoder", "numbers"),
        ("prefix_lm", "numbers"),
        ("causal_lm", "numbers"),
        ("causal_lm", "text_alone"),
        ("encoder", "masked_numbers"),
    ],
)
def test_packed_rows_have_the_losses_of_separate_examples(layout: Layout, name: str) -> None:
    """In the order of the examples: seqio packs them one after the other."""
    found = {}
    for pack in (True, False):
        data = live_config(name, layout, pack=pack, shuffle=False, num_epochs=None)
        batches = LiveBatches(data, ROWS)
        losses: list[float] = []
        while len(losses) < 3 * ROWS:
            features = next(batches)["main"]
            wanted = {name: spec.shape for name, spec in sub_batch_spec(data, row_shapes(data)["main"], ROWS).items()}
            assert {name: values.shape for name, values in features.items()} == wanted
            assert {values.dtype for values in features.values()} == {np.dtype(np.int32)}
            losses += losses_of_examples(features, layout)
        found[pack] = losses[: 3 * ROWS]
    assert np.ptp(found[False]) > 1.0
    np.testing.assert_allclose(found[True], found[False], rtol=1e-4)
