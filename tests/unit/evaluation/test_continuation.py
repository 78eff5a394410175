"""One continuation for all architectures: the same windows and tokens, exact scores, and refusals of short rows."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pytest
from helpers.data_examples import data_config, text_store

from t5x_like.config import (
    CausalLM,
    DataConfig,
    EvaluationConfig,
    MaskedDiffusion,
    ModelConfig,
    PrefixLM,
    RunConfig,
    SpanCorruption,
    StackConfig,
    TrainingConfig,
)
from t5x_like.config.continuation import continuation_positions, continuation_problems
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.continuation import continuation_batches, require_windows
from t5x_like.errors import DataError
from t5x_like.evaluation.heldout_loss import evaluate_held_out, held_out_rows
from t5x_like.evaluation.per_example_loss import held_out_draws
from t5x_like.program import Program, build_program

GIVEN, SCORED, WINDOWS = 12, 9, 10
VOCABULARY = 336
ARMS: dict[str, DataConfig] = {
    "encoder_decoder": data_config(),
    "merged": dataclasses.replace(data_config(), inputs_length=40),
    "prefix_lm": data_config("prefix_lm", (PrefixLM(name="S", mode="S"),)),
    "causal_lm": dataclasses.replace(data_config("causal_lm", (CausalLM(),)), inputs_length=30),
    "causal_lm with prefix": data_config("causal_lm", (PrefixLM(name="p"),)),
    "spans only": data_config(mixture=(SpanCorruption(name="t5"),)),
    "encoder": data_config("encoder", (MaskedDiffusion(),)),
    "bidirectional stream": data_config("prefix_lm", (MaskedDiffusion(),)),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    held_out = ["a dog ran to the cat; " * 9, "größer ✓ " * 9, *["so it ends."] * 9]
    return text_store(tmp_path_factory.mktemp("store") / "texts", ["the cat sat on the mat. " * 60], held_out)


@functools.cache
def program_of(arm: str) -> Program:
    data = ARMS[arm]
    stack = StackConfig(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64, positions="rope")
    cross: Literal["separate", "merged"] = "merged" if arm == "merged" else "separate"
    model = ModelConfig(
        encoder=stack if data.layout in ("encoder_decoder", "encoder") else None,
        decoder=None if data.layout == "encoder" else dataclasses.replace(stack, cross_attention=cross),
        vocab_size=VOCABULARY,
    )
    evaluation = EvaluationConfig(continuation=(GIVEN, SCORED), continuation_windows=WINDOWS)
    training = TrainingConfig(num_train_steps=1, global_batch_size=4)
    return build_program(
        RunConfig(name=arm.replace(" ", "-"), model=model, data=data, training=training, evaluation=evaluation),
        jax.devices()[:1],
    )


def params_of(program: Program, head: float = 0.3) -> Any:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), program.spec.params)
    params["head"]["kernel"] *= head / 0.3
    return jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_params))


def continuation_rows(program: Program, params: Any, store: Store) -> list[dict[str, Any]]:
    rows = held_out_rows(program, params, [store], num_batches=1)
    return [row for row in rows if row["objective"] == "continuation"]


@pytest.mark.parametrize("arm", ARMS)
def test_every_architecture_scores_the_same_raw_tokens(store: Store, arm: str) -> None:
    """The rows of the model are read: the scored tokens are predicted after the same text."""
    data, split, length = ARMS[arm], store.split("validation"), GIVEN + SCORED
    text = split.tokens(0, split.num_tokens)
    stack, mask, pairs = data.target_stack, store.vocabulary.mask_id, []
    for found in continuation_batches(store, data, 4, GIVEN, SCORED, WINDOWS):
        for row, number in enumerate(found.window_N.tolist()):
            window = text[number * length : (number + 1) * length].tolist()
            for batch in found.batches:
                features = {name: values[row] for name, values in batch["main"].items() if values.ndim == 2}
                is_scored = features[f"{stack}_loss_weights"] > 0
                targets, inputs = features[f"{stack}_target_tokens"], features[f"{stack}_input_tokens"]
                if len(found.batches) == 1:
                    assert targets[is_scored].tolist() == window[GIVEN:]
                    given = features["encoder_input_tokens"] if data.layout == "encoder_decoder" else inputs
                    first = given.tolist().index(window[0])
                    assert given[first : first + GIVEN].tolist() == window[:GIVEN]
                else:
                    # In place, or one position later in a stream that predicts the next token.
                    later = int(data.layout == "prefix_lm")
                    read = np.where(is_scored, mask, targets)[: length - later].tolist()
                    assert inputs[later:length].tolist() == read and targets[:length].tolist() == window
                    assert not is_scored[:GIVEN].any() and is_scored.any()
            pairs.append((number, tuple(found.tokens_NxT[row].tolist())))
            assert found.tokens_NxT[row].tolist() == window[GIVEN:]
    # Another batch size leaves the windows and their order as they are.
    wanted = continuation_batches(store, ARMS["causal_lm"], 3, GIVEN, SCORED, WINDOWS)
    assert pairs == [pair for one in wanted for pair in zip(one.window_N, map(tuple, one.tokens_NxT), strict=True)]
    assert len(set(pairs)) == WINDOWS


@pytest.mark.parametrize("arm", ARMS)
def test_uniform_model_has_exactly_log_v_per_token(store: Store, arm: str) -> None:
    program = program_of(arm)
    params = params_of(program, head=0.0)
    result = evaluate_held_out(program, params, [store], step=0, num_batches=1)["continuation"]
    assert result["loss_per_token"] / math.log(2) == pytest.approx(math.log2(VOCABULARY), rel=1e-5)
    assert (result["given"], result["scored"], result["windows"]) == (GIVEN, SCORED, WINDOWS)
    assert result["is_bound"] == (arm in ("encoder", "bidirectional stream"))
    rows = continuation_rows(program, params, store)
    assert [row["loss"] for row in rows] == pytest.approx([SCORED * math.log(VOCABULARY)] * WINDOWS, rel=1e-5)
    digests = [
        one
        for found in continuation_batches(store, ARMS["causal_lm"], 4, GIVEN, SCORED, WINDOWS)
        for one in found.digests
    ]
    assert [row["digest"] for row in rows] == digests
    assert set(held_out_draws(rows)) == {"continuation_bits_per_byte"}


def test_score_of_a_causal_decoder_is_that_of_a_plain_loop(store: Store) -> None:
    program = program_of("causal_lm")
    params, text = params_of(program), store.split("validation")
    length, losses, num_bytes = GIVEN + SCORED, [], 0
    rows = continuation_rows(program, params, store)
    logits_of = jax.jit(lambda tokens: program.model(params)({"decoder_input_tokens": tokens}))
    for row in rows:
        window = text.tokens(row["window"] * length, (row["window"] + 1) * length).astype(np.int32)
        loss = 0.0
        for place in range(GIVEN, length):
            # The start token, all tokens before this one, and padding.
            read = np.zeros((1, length), np.int32)
            read[0, 1 : place + 1] = window[:place]
            logits = np.asarray(logits_of(read)[0, place], np.float64)
            loss += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[window[place]]
        losses.append(loss)
        num_bytes += len(store.tokenizer.to_bytes(window[GIVEN:].tolist()))
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)
    result = evaluate_held_out(program, params, [store], step=0, num_batches=1)["continuation"]
    assert result["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / num_bytes, rel=1e-4)


@pytest.mark.parametrize(
    ("arm", "positions"),
    [
        ("encoder_decoder", {"encoder": GIVEN + 2, "decoder": SCORED}),
        ("prefix_lm", {"decoder": GIVEN + SCORED + 2}),
        ("causal_lm", {"decoder": GIVEN + SCORED}),
        ("encoder", {"encoder": GIVEN + SCORED}),
    ],
)
def test_rows_that_are_too_short_are_refused(store: Store, arm: str, positions: dict[str, int]) -> None:
    assert continuation_positions(ARMS[arm], GIVEN, SCORED) == positions
    fields = {"encoder": "inputs_length", "decoder": "targets_length"}
    exact = {"inputs_length": 0, "targets_length": 0} | {fields[stack]: size for stack, size in positions.items()}
    run = program_of(arm).run
    fitting = dataclasses.replace(run, data=dataclasses.replace(run.data, **exact))
    assert not [*continuation_problems(fitting)]
    assert next(iter(continuation_batches(store, fitting.data, 4, GIVEN, SCORED, WINDOWS))).tokens_NxT.size
    for field in (fields[stack] for stack in positions):
        short = dataclasses.replace(fitting.data, **{field: exact[field] - 1})
        (problem,) = continuation_problems(dataclasses.replace(run, data=short))
        assert "12 given and 9 scored tokens" in problem.found and "raise data." in problem.fix
        with pytest.raises(ValueError, match="does not fit"):
            next(iter(continuation_batches(store, short, 4, GIVEN, SCORED, WINDOWS)))


def test_windows_of_several_corpora_are_drawn_together() -> None:
    """Their bits per byte are one score, whose differences need an interval."""
    rows: list[dict[str, Any]] = [
        {"objective": f"{corpus}/continuation", "loss": 1.0 + number, "tokens": 9.0, "bytes": 10 + 2 * number}
        for corpus in "ab"
        for number in range(5)
    ]
    draws = held_out_draws(rows)
    together = held_out_draws([{**row, "objective": "continuation"} for row in rows])
    name = "continuation_bits_per_byte"
    assert set(draws) == {f"a/{name}", f"b/{name}", name} and set(together) == {name}
    np.testing.assert_array_equal(draws[name], together[name])


def test_a_split_shorter_than_a_window_is_refused(store: Store, tmp_path: Path) -> None:
    require_windows((store,), (GIVEN, SCORED))
    short = text_store(tmp_path / "short", ["x"], ["only this"])
    with pytest.raises(DataError, match="expected at least 21"):
        next(iter(continuation_batches(short, ARMS["causal_lm"], 4, GIVEN, SCORED, WINDOWS)))
    # `train` asks before its first step.
    with pytest.raises(DataError, match="expected at least 21"):
        require_windows((store, short), (GIVEN, SCORED))
