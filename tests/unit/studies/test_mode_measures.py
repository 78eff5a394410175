"""Losses under other mode tokens: rows differ in the token only, and columns follow the embeddings of the tokens."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.data_examples import data_config, text_store

from t5x_like.config import (
    EvaluationConfig,
    ModelConfig,
    PrefixLM,
    RunConfig,
    SpanCorruption,
    StackConfig,
    TrainingConfig,
)
from t5x_like.config.objectives import MODES, Mode
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.heldout import objective_batches
from t5x_like.errors import ConfigError
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.program import build_program
from t5x_like.studies import mode_measures
from t5x_like.studies.mode_measures import measure_modes, under_mode

MIXTURE = (
    SpanCorruption(name="spans", mode="R"),
    SpanCorruption(name="half", mode="X", noise_density=0.5),
    PrefixLM(name="prefix", mode="S"),
)
KINDS: tuple[Mode, ...] = ("R", "X", "S")
DATA = data_config("prefix_lm", MIXTURE)
ROWS = 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    held_out = ["a dog ran to the cat; " * 9, "größer ✓ " * 9, *["so it ends."] * 9]
    return text_store(tmp_path_factory.mktemp("store") / "texts", ["the cat sat on the mat. " * 60], held_out)


def test_rows_under_two_modes_differ_in_the_token_only(store: Store) -> None:
    tokens = {mode: store.vocabulary.mode_id(mode) for mode in MODES}
    for number, kind in enumerate(KINDS):
        batches = {}
        for mode in MODES:
            data = under_mode(DATA, mode)
            (share,) = data.sources
            batches[mode] = [*objective_batches(store, data, share, ROWS, data.mixture[number], 2)]
        own = [*objective_batches(store, DATA, DATA.sources[0], ROWS, MIXTURE[number], 2)]
        jax.tree.map(np.testing.assert_array_equal, batches[kind], own)
        for mode in MODES:
            for found, expected in zip(batches[mode], own, strict=True):
                read = found["main"]["decoder_input_tokens"]
                # Rows that only complete a batch have no token.
                assert ((read == tokens[mode]).any(axis=1) == read.any(axis=1)).all() and read.any()
                renamed = {
                    name: np.where(values == tokens[mode], tokens[kind], values)
                    for name, values in found["main"].items()
                }
                jax.tree.map(np.testing.assert_array_equal, renamed, expected["main"])


class OpenedRun:
    """A model with random parameters, as `open_model` returns it, the embeddings of whose mode tokens can be chosen."""

    def __init__(self, store: Store):
        stack = StackConfig(
            num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64, positions="rope"
        )
        self.run = RunConfig(
            name="modes",
            model=ModelConfig(encoder=None, decoder=stack, vocab_size=352),
            data=DATA,
            training=TrainingConfig(num_train_steps=1, global_batch_size=ROWS),
            evaluation=EvaluationConfig(num_batches=2),
        )
        self.model, self.stores = self.run.model, (store,)
        self.program = build_program(self.run, jax.devices()[:1])
        self.mode_ids = [store.vocabulary.mode_id(mode) for mode in MODES]
        rng = np.random.default_rng(0)
        self._values = jax.tree.map(
            lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), self.program.spec.params
        )
        self.order = [0, 1, 2]

    def params(self) -> tuple[int, Any]:
        """Return the step and the parameters; mode token number i has the embedding that number `order[i]` had."""
        values = jax.tree.map(np.copy, self._values)
        table = values["token_embedder"]["embedding"]
        table[self.mode_ids] = table[self.mode_ids][self.order]
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.program.abstract_params)
        return 0, jax.device_put(values, shardings)


def checkpoint(folder: Path, step: int = 0) -> EvaluatedCheckpoint:
    return EvaluatedCheckpoint("run", folder, step, {}, {}, {}, {}, [], (), {})


@pytest.mark.slow
def test_columns_of_the_matrix_follow_the_embeddings_of_the_tokens(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = OpenedRun(store)
    for name, value in (("open_model", lambda *_: opened), ("PROMPTS", 4), ("PROMPT", 12), ("NEW", 8)):
        monkeypatch.setattr(mode_measures, name, value)
    found = measure_modes(checkpoint(tmp_path), KINDS)
    matrix = np.array([[found[f"{kind}_under_{mode}"] for mode in MODES] for kind in MODES])
    costs = matrix - np.diag(matrix)[:, None]
    others = costs[~np.eye(3, dtype=bool)].reshape(3, 2)
    assert found["least_cost"] == others.min() and (others != 0).all()
    assert [found[f"largest_cost_{kind}"] for kind in MODES] == others.max(axis=1).tolist()
    assert all(0 <= found[f"stop_rate_under_{mode}"] <= 1 for mode in MODES)
    assert all(0 <= found[f"new_tokens_under_{mode}"] <= 8 for mode in MODES)

    # The first checkpoint is not measured again; the second one has two tokens exchanged, the third has equal tokens.
    opened.order = [1, 0, 2]
    assert measure_modes(checkpoint(tmp_path), KINDS) == found
    exchanged = measure_modes(checkpoint(tmp_path, step=1), KINDS)
    for kind in MODES:
        for mode, other in zip("RSX", "SRX", strict=True):
            assert exchanged[f"{kind}_under_{mode}"] == pytest.approx(found[f"{kind}_under_{other}"], rel=1e-6)
    assert exchanged["new_tokens_under_R"] == found["new_tokens_under_S"]
    opened.order = [0, 0, 0]
    equal = measure_modes(checkpoint(tmp_path, step=2), KINDS)
    assert [equal[f"largest_cost_{kind}"] for kind in MODES] == [0, 0, 0] and equal["least_cost"] == 0


@pytest.mark.parametrize(
    ("mixture", "kinds", "expected"),
    [
        ((*MIXTURE[:2], PrefixLM(name="prefix")), KINDS, "data.mixture: found no mode in prefix"),
        (MIXTURE, ("R", "X"), "kinds: found R, X, expected one for each of the 3 objectives"),
        (MIXTURE, ("R", "X", "X"), "kinds: found R, X, X, expected .* each of R, S, X"),
    ],
)
def test_a_mixture_without_a_kind_for_each_denoiser_is_refused(
    mixture: Any, kinds: Any, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = types.SimpleNamespace(run=types.SimpleNamespace(data=data_config("prefix_lm", mixture)))
    monkeypatch.setattr(mode_measures, "open_model", lambda *_: opened)
    with pytest.raises(ConfigError, match=expected):
        measure_modes(checkpoint(tmp_path), kinds)
