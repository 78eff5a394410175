"""The preference loss and its gradient equal the published formula, computed here one answer at a time, on a mesh, also
where several pairs share a row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parallel_programs import ROWS, batch_for, random_like, run_for, start
from jax import Array

from t5x_like.config import (
    CorpusConfig,
    LoraConfig,
    Preference,
    RunConfig,
    ShardingConfig,
    TokenizerConfig,
    batch_spec,
)
from t5x_like.config.validation import validate
from t5x_like.data.store.prepare import prepare
from t5x_like.data.stream import reference_log_probs
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.monitoring.metrics import compute
from t5x_like.program import Program, build_program
from t5x_like.utils.type_aliases import PyTree

Pairs = Mapping[str, np.ndarray]
MESH = ShardingConfig(data=2, fsdp=2, tensor=2)
BETA = 0.3
REFERENCES = ("chosen_reference", "rejected_reference")


def run_of_pairs(
    architecture: str, label_smoothing: float, *, lora: bool, parts: int = 1, pairs_per_row: int = 1
) -> RunConfig:
    run = run_for(architecture, MESH, gradient_accumulation_steps=parts)
    stacks = {name: dataclasses.replace(stack, dropout_rate=0.0) for name, stack in run.model.stacks.items()}
    objective = Preference(beta=BETA, label_smoothing=label_smoothing, pairs_per_row=pairs_per_row)
    data = dataclasses.replace(run.data, mixture=(objective,))
    adapters = LoraConfig(base="base", rank=4, paths=(".*attention/(query|value)/kernel", ".*mlp/wo/kernel"))
    training = dataclasses.replace(run.training, lora=adapters if lora else None)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **stacks), data=data, training=training)


def random_pairs(run: RunConfig, architecture: str) -> Pairs:
    """Return random answers to random prompts, of which the last row only completes the batch."""
    plain = run_for(architecture, MESH)
    chosen, other = (batch_for(plain, seed)["main"] for seed in (0, 1))
    random = np.random.default_rng(2)
    pairs = dict(chosen)
    pairs |= {f"rejected_{name}": values for name, values in other.items() if name.startswith("decoder")}
    pairs |= {name: random.normal(-60.0, 3.0, ROWS).astype(np.float32) for name in REFERENCES}
    for name in ("decoder_loss_weights", "rejected_decoder_loss_weights"):
        pairs[name] = pairs[name].copy()
        pairs[name][-1] = 0
    for name in REFERENCES:
        pairs[name][-1] = np.nan
    assert {name: (x.shape, str(x.dtype)) for name, x in pairs.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in batch_spec(run)["main"].items()
    }
    return pairs


def log_prob(program: Program, params: PyTree, pairs: Pairs, prefix: str) -> Array:
    """Return [rows]: the sum of log p over the scored tokens of one answer, by a pass of its own."""
    answer = {name: x for name, x in pairs.items() if name.startswith("encoder")}
    answer |= {name.removeprefix(prefix): x for name, x in pairs.items() if name.startswith(f"{prefix}decoder")}
    log_p = jax.nn.log_softmax(program.model(params)(answer).astype(jnp.float32))
    of_targets = jnp.take_along_axis(log_p, jnp.asarray(answer["decoder_target_tokens"])[..., None], -1)[..., 0]
    return jnp.sum(of_targets * answer["decoder_loss_weights"], axis=1)


def expected_loss(program: Program, params: PyTree, pairs: Pairs, label_smoothing: float) -> tuple[Array, Array]:
    """Return the mean loss of Rafailov et al. 2023 (with label smoothing, of Mitchell 2023), and the log ratios."""
    ratios = jnp.stack(
        [
            log_prob(program, params, pairs, prefix) - pairs[reference]
            for prefix, reference in zip(("", "rejected_"), REFERENCES, strict=True)
        ]
    )
    h = BETA * (ratios[0] - ratios[1])
    # log(sigmoid(h)) is -log(1 + exp(-h)).
    losses = (1 - label_smoothing) * jnp.logaddexp(0.0, -h) + label_smoothing * jnp.logaddexp(0.0, h)
    return jnp.mean(losses), ratios


CASES = {
    "encoder_decoder": ("encoder_decoder", 0.0, False, 1),
    "decoder lora": ("decoder", 0.1, True, 1),
    "encoder_decoder lora": ("encoder_decoder", 0.2, True, 2),
    "prefix_lm": ("prefix_lm", 0.1, False, 2),
    "decoder": ("decoder", 0.0, False, 1),
}


EXTENDED = [pytest.mark.slow, pytest.mark.extended]


@pytest.mark.parametrize(
    "case",
    [
        "encoder_decoder",
        pytest.param("decoder lora", marks=pytest.mark.slow),
        *(pytest.param(case, marks=EXTENDED) for case in ("encoder_decoder lora", "prefix_lm", "decoder")),
    ],
)
def test_loss_gradient_and_metrics_equal_the_published_formula(case: str) -> None:
    """Adam's first moment after one step is a tenth of the gradient."""
    architecture, label_smoothing, lora, parts = CASES[case]
    run = run_of_pairs(architecture, label_smoothing, lora=lora, parts=parts)
    pairs = random_pairs(run, architecture)
    check(run, pairs, {name: x[:-1] for name, x in pairs.items()}, label_smoothing)


PACKED_CASES = {
    "encoder_decoder": ("encoder_decoder", False, 1),
    "decoder lora": ("decoder", True, 2),
    "prefix_lm": ("prefix_lm", False, 1),
    "decoder": ("decoder", False, 2),
    "encoder_decoder lora": ("encoder_decoder", True, 2),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("encoder_decoder", marks=pytest.mark.slow),
        pytest.param("decoder lora", marks=pytest.mark.slow),
        *(pytest.param(case, marks=EXTENDED) for case in ("prefix_lm", "decoder", "encoder_decoder lora")),
    ],
)
def test_packed_pairs_have_the_loss_and_gradient_of_the_same_pairs_alone(case: str, tmp_path: Path) -> None:
    architecture, lora, parts = PACKED_CASES[case]
    run = run_of_pairs(architecture, 0.1, lora=lora, parts=parts, pairs_per_row=3)
    run, packed, alone = packed_pairs(run, tmp_path)
    segments = packed["decoder_segment_ids"].max(1)
    assert segments.max() == 3 and 0 in segments and 0 < np.median(segments)
    check(run, packed, alone, 0.1)


def packed_pairs(run: RunConfig, folder: Path) -> tuple[RunConfig, Pairs, Pairs]:
    """Return the run with rows for an epoch of pairs of random texts, these rows, and the same pairs one per row."""
    random = np.random.default_rng(0)

    def text(longest: int) -> str:
        return "".join(random.choice(list("abcdefgh"), random.integers(1, longest)))

    lines = [{"prompt": text(6), "chosen": f"a{text(9)}", "rejected": f"b{text(9)}"} for _ in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = CorpusConfig(
        files=(str(folder / "pairs.jsonl"),), inputs_field="prompt", text_field="chosen", rejected_field="rejected"
    )
    tokenizer = TokenizerConfig(kind="bytes", num_sentinels=0)
    data = dataclasses.replace(run.data, corpus=corpus, tokenizer=tokenizer, store_dir=str(folder / "stores"))
    stores = prepare(data, report=lambda line: None)
    values = reference_log_probs.missing_values(data, stores)
    for array in values.values():
        array[:] = random.normal(-60.0, 3.0, array.shape)
    reference_log_probs.attach(values, data, stores)
    packed = TrainingStream(stores, data, 1)
    count = packed.rows_per_epoch["files"]
    features = packed.get_rows(np.arange(count))
    # Rows without pairs complete the batch. They have no reference.
    rows = -(-(count + 1) // 8) * 8
    features = {
        name: np.concatenate([x, np.zeros((rows - count, *x.shape[1:]), x.dtype)]) for name, x in features.items()
    }
    for name in REFERENCES:
        features[name][count:] = np.nan
    run = dataclasses.replace(run, data=data, training=dataclasses.replace(run.training, global_batch_size=rows))
    assert not validate(run)
    assert {name: (x.shape, str(x.dtype)) for name, x in features.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in batch_spec(run)["main"].items()
    }
    assert data.preference is not None
    single = dataclasses.replace(data, mixture=(dataclasses.replace(data.preference, pairs_per_row=1),))
    alone = TrainingStream(stores, single, 1)
    return run, features, alone.get_rows(np.arange(alone.rows_per_epoch["files"]))


def check(run: RunConfig, batch: Pairs, pairs: Pairs, label_smoothing: float) -> None:
    """Assert that a step on `batch` has the loss, the gradient and the metrics of `pairs`, one per row."""
    program = build_program(run, jax.devices()[:8])
    trained, base = random_like(program.abstract_params, 0), random_like(program.abstract_base_params, 1)
    state = start(program, {"params": trained, "base": base})

    def loss(params: PyTree) -> tuple[Array, Array]:
        whole = params if program.lora is None else program.lora.joined(base, params)
        return expected_loss(program, whole, pairs, label_smoothing)

    (expected, ratios), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
    after, metrics = program.train_step(state, program.shard_batch({"main": batch}))
    found = {name: compute(jax.device_get(mean)) for name, mean in metrics.items()}
    assert found["loss"] == pytest.approx(float(expected), rel=1e-4) == found["loss/dpo"]
    # Some gradients are small beside others of the tree, whose rounding they have.
    atol = 1e-5 * max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient))
    moment = after["opt_state"].mu
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.1 * b, rtol=1e-3, atol=atol), moment, gradient)
    rewards = BETA * np.asarray(ratios)
    assert 0 < found["preference_accuracy"] < 1
    assert found["preference_accuracy"] == pytest.approx(np.mean(rewards[0] > rewards[1]))
    assert found["chosen_reward"] == pytest.approx(rewards[0].mean(), rel=1e-4)
    assert found["rejected_reward"] == pytest.approx(rewards[1].mean(), rel=1e-4)
    assert found["preference_margin"] == pytest.approx((rewards[0] - rewards[1]).mean(), rel=1e-3)
    tokens = sum(pairs[f"{prefix}decoder_loss_weights"].sum() for prefix in ("", "rejected_"))
    assert found["kl_to_reference"] == pytest.approx(-float(ratios.sum()) / tokens, rel=1e-4)
    assert found["loss_tokens"] == len(pairs["chosen_reference"])
