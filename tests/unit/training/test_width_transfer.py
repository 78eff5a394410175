"""Width transfer (muP): a coordinate check, and what it refuses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.planning_runs import small_run

from t5x_like.config import AdafactorConfig, AdamWConfig, RunConfig, ScheduleConfig, StackConfig
from t5x_like.config.width_transfer import width_transfer
from t5x_like.errors import ConfigError
from t5x_like.models.factory import abstract_model, bind_params, init_params
from t5x_like.training.optimizers.make_optimizer import make_optimizer
from t5x_like.training.schedules import make_schedule
from t5x_like.training.train_step import init_state, make_train_step

VOCABULARY, BASE, WIDE = 64, 64, 256


def run_of(width: int, transfer: bool) -> RunConfig:
    """Return a run of a decoder of this width, with heads of 16."""
    run = small_run("llama_3")
    stack = StackConfig(
        num_layers=2,
        d_model=width,
        num_heads=width // 16,
        num_kv_heads=width // 16,
        head_dim=16,
        d_ff=2 * width,
        positions="rope",
    )
    model = dataclasses.replace(
        run.model,
        decoder=stack,
        vocab_size=VOCABULARY,
        tie_embeddings=False,
        embedding_stddev=1.0,
        dtype="float32",
        remat="none",
    )
    training = dataclasses.replace(
        run.training,
        optimizer=AdamWConfig(weight_decay=0.0),
        schedule=ScheduleConfig(kind="constant", learning_rate=0.01, warmup_steps=0),
        max_gradient_norm=None,
    )
    run = dataclasses.replace(run, model=model, training=training)
    return width_transfer(run, BASE) if transfer else run


def change_of_logits(run: RunConfig) -> float:
    """Return the root mean square by which three steps on a batch change its logits."""
    spec = abstract_model(run.model)
    optimizer = make_optimizer(run.training, spec.logical_axes)
    tokens = jax.random.randint(jax.random.key(1), (4, 17), 1, VOCABULARY)
    sub_batch = {
        "decoder_input_tokens": tokens[:, :-1],
        "decoder_target_tokens": tokens[:, 1:],
        "decoder_loss_weights": jnp.ones((4, 16), jnp.int32),
    }

    def apply(params, batch, rng):
        return bind_params(spec.graphdef, params).output(batch, dropout_rng=rng)

    step = make_train_step(run, apply, optimizer, make_schedule(run.training))

    @jax.jit
    def compute(key):
        state = init_state(init_params(run.model, key), optimizer, 0)
        first = apply(state["params"], sub_batch, None).logits
        state = jax.lax.fori_loop(0, 3, lambda _, state: step(state, {"main": sub_batch})[0], state)
        return jnp.sqrt(jnp.mean(jnp.square(apply(state["params"], sub_batch, None).logits - first)))

    return float(np.mean([compute(jax.random.key(seed)) for seed in range(3)]))


@pytest.mark.slow
def test_steps_change_the_logits_alike_at_two_widths_with_transfer_and_more_at_the_larger_one_without() -> None:
    at_base = change_of_logits(run_of(BASE, True))
    with_transfer, without = (change_of_logits(run_of(WIDE, transfer)) / at_base for transfer in (True, False))
    assert 0.6 < with_transfer < 1.3, with_transfer
    assert without > 1.5 and without > 2 * with_transfer, without


def test_transfer_changes_nothing_at_the_base_width() -> None:
    run, transferred = run_of(BASE, False), run_of(BASE, True)
    assert transferred.model == run.model
    assert [group.factor for group in transferred.training.learning_rate_groups] == [1.0]


def test_transfer_refuses_what_it_has_no_rule_for() -> None:
    run = run_of(BASE, False)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, tie_embeddings=True),
        training=dataclasses.replace(run.training, optimizer=AdafactorConfig()),
    )
    with pytest.raises(ConfigError, match="adamw without rms_scaled(.|\n)*tie_embeddings"):
        width_transfer(run, BASE)
