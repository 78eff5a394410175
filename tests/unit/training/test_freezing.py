"""Frozen parameters: nothing of the step touches them, and the others train as if those were constants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.config_examples import changed, example
from helpers.training_examples import batch_of, run_with

from t5x_like.config import AdafactorConfig, AdamWConfig, FreezeConfig
from t5x_like.config.validation import validate
from t5x_like.errors import ConfigError
from t5x_like.training.freezing import unfreeze_steps
from t5x_like.training.optimizers.make_optimizer import make_optimizer, state_logical_axes
from t5x_like.training.schedules import make_schedule
from t5x_like.training.train_step import init_state, make_train_step

AXES = {name: {"embedding": ("vocab", "embed")} for name in ("a", "b")}
OPTIMIZERS = [AdamWConfig(weight_decay=0.1), AdafactorConfig(min_dim_size_to_factor=1)]
FROZEN = (FreezeConfig(paths=("b/.*",)),)


def params_of(*names):
    tables = np.random.default_rng(0).standard_normal((2, 7, 7)).astype(np.float32)
    return {name: {"embedding": jnp.asarray(tables["ab".index(name)])} for name in names}


def apply(params, batch, rng):
    return sum(params[name]["embedding"] for name in "ab")[batch["decoder_input_tokens"]]


def trained(run, params, steps, apply=apply, first=0):
    """Return the states after each step, and the metrics of the last."""
    axes = {name: AXES[name] for name in params}
    optimizer = make_optimizer(run.training, axes)
    step = jax.jit(make_train_step(run, apply, optimizer, make_schedule(run.training)))
    state = init_state(params, optimizer, 0)
    states, metrics = [state], {}
    for number in range(first, first + steps):
        state, metrics = step(state, batch_of(number))
        states.append(state)
    return states, metrics


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["adamw", "adafactor"])
@pytest.mark.parametrize("parts", [1, 2])
def test_other_parameters_train_as_if_frozen_ones_were_constants(optimizer, parts):
    options = {"optimizer": optimizer, "max_gradient_norm": 0.01, "gradient_accumulation_steps": parts}
    found, metrics = trained(run_with(freeze=FROZEN, **options), params_of("a", "b"), 3)
    constant = params_of("b")
    expected, of_constant = trained(
        run_with(**options), params_of("a"), 3, lambda params, batch, rng: apply(params | constant, batch, rng)
    )
    equal(found[-1]["params"]["b"], constant["b"])
    equal(found[-1]["params"]["a"], expected[-1]["params"]["a"])
    # No state of the frozen, and a norm that they are no part of.
    equal(found[-1]["opt_state"]["from_step_0"], expected[-1]["opt_state"])
    equal(metrics["grad_norm"], of_constant["grad_norm"])
    assert not np.array_equal(found[-1]["params"]["a"]["embedding"], params_of("a")["a"]["embedding"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["adamw", "adafactor"])
def test_unfrozen_parameters_train_as_in_a_run_that_starts_with_them(optimizer):
    options = {"optimizer": optimizer}
    waiting, _ = trained(
        run_with(freeze=(FreezeConfig(paths=("b/.*",), until_step=2),), **options), params_of("a", "b"), 3
    )
    frozen, _ = trained(run_with(freeze=FROZEN, **options), params_of("a", "b"), 2)
    equal(waiting[2]["params"], frozen[2]["params"])
    equal(waiting[2]["opt_state"]["from_step_0"], frozen[2]["opt_state"]["from_step_0"])
    equal(waiting[2]["opt_state"]["from_step_2"], waiting[0]["opt_state"]["from_step_2"])
    # From there on, b trains like the parameters of a run whose first step this is.
    fresh, _ = trained(run_with(**options), waiting[2]["params"], 1, first=2)
    np.testing.assert_allclose(
        waiting[3]["params"]["b"]["embedding"], fresh[1]["params"]["b"]["embedding"], rtol=1e-6, atol=1e-7
    )
    assert not np.array_equal(waiting[3]["params"]["b"]["embedding"], waiting[2]["params"]["b"]["embedding"])


def test_optimizer_states_have_the_axes_of_their_parameters():
    run = run_with(freeze=(FreezeConfig(paths=("b/.*",), until_step=2),), optimizer=OPTIMIZERS[1])
    optimizer = make_optimizer(run.training, AXES)
    params = params_of("a", "b")
    state = jax.eval_shape(optimizer.init, params)
    axes = state_logical_axes(state, params, AXES)
    assert axes["from_step_2"]["second_moment"]["b"]["embedding"] == {"v_row": ("embed",), "v_col": ("vocab",)}


def test_first_matching_entry_applies_and_unmatched_patterns_are_refused():
    paths = ["encoder/layers/mlp/wo/kernel", "decoder/layers/mlp/wo/kernel", "token_embedder/embedding"]
    warm_up = (FreezeConfig(paths=("encoder/.*",)), FreezeConfig(paths=(".*/wo/kernel",), until_step=5))
    assert list(unfreeze_steps(warm_up, paths).values()) == [None, 5, 0]
    with pytest.raises(
        ConfigError, match=r"training.freeze.0.paths.1: found 'encodr/\.\*', which matches no parameter"
    ):
        unfreeze_steps((FreezeConfig(paths=("encoder/.*", "encodr/.*")),), paths)
    # The whole path must match, not a part of it.
    with pytest.raises(ConfigError, match="matches no parameter"):
        unfreeze_steps((FreezeConfig(paths=("encoder",)),), paths)
    with pytest.raises(ConfigError, match="some that train"):
        unfreeze_steps((FreezeConfig(paths=(".*",)),), paths)
    assert set(unfreeze_steps((FreezeConfig(paths=(".*",), until_step=1),), paths).values()) == {1}


@pytest.mark.parametrize(
    "entry", [FreezeConfig(paths=()), FreezeConfig(paths=("(",)), FreezeConfig(paths=("a",), until_step=0)]
)
def test_invalid_freeze_entries_are_refused(entry):
    run = changed(example(), "training.freeze", (entry,))
    assert [problem.where.startswith("training.freeze.0") for problem in validate(run)] == [True]
    assert validate(dataclasses.replace(run, training=dataclasses.replace(run.training, freeze=FROZEN))) == []
