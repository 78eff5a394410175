"""The mixture of experts against a truth written as loops, with and without a limit of tokens per expert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_examples import EXAMPLES, parameters, stack, tokens

from t5x_like.config import Experts
from t5x_like.models.build import abstract, merge
from t5x_like.models.experts import MixtureOfExperts, Routing, load_balancing_loss

ROWS, LENGTH, D, COUNT = 2, 10, 32, 4


def mixture(**changes):
    config = stack(experts=Experts(num_experts=COUNT, **changes))
    return MixtureOfExperts(config, rngs=nnx.Rngs(params=0))


def states():
    return np.random.default_rng(0).normal(size=(ROWS, LENGTH, D)).astype(np.float32)


def truth(module, x, valid, room):
    """Each token of each row in turn: first choices of all tokens, then second ones."""
    kernels = {name: np.asarray(getattr(module, name).kernel[...], np.float64) for name in ("wi_0", "wi_1", "wo")}
    out = np.zeros(x.shape)
    for row in range(ROWS):
        scores = x[row].astype(np.float64) @ np.asarray(module.router.kernel[...], np.float64)
        probability = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
        order = np.argsort(-probability, axis=-1)[:, :2]
        taken = np.zeros(COUNT, int)
        for choice in range(2):
            for cell in range(LENGTH):
                expert = order[cell, choice]
                if not valid[row, cell] and room < LENGTH:
                    continue
                taken[expert] += 1
                if taken[expert] > room:
                    continue
                gate, value = (x[row, cell] @ kernels[name][expert] for name in ("wi_0", "wi_1"))
                hidden = np.asarray(jax.nn.gelu(jnp.asarray(gate), approximate=True)) * value
                weight = probability[cell, expert] / probability[cell, order[cell]].sum()
                out[row, cell] += weight * (hidden @ kernels["wo"][expert])
    return out


@pytest.mark.parametrize("capacity,room", [(None, LENGTH), (2.0, LENGTH), (0.8, 4), (0.2, 1)])
def test_the_mixture_is_its_definition(capacity, room):
    module, x = mixture(capacity_factor=capacity), states()
    valid = np.ones((ROWS, LENGTH), bool)
    valid[1, 6:] = False
    found, _ = module(jnp.asarray(x), valid=jnp.asarray(valid))
    expected = truth(module, x, valid, room)
    np.testing.assert_allclose(found[valid], expected[valid], rtol=0, atol=2e-5)


def test_padding_takes_no_room_and_is_not_counted():
    module, x = mixture(capacity_factor=0.5), states()
    valid = np.ones((ROWS, LENGTH), bool)
    valid[:, 6:] = False
    changed = np.where(valid[..., None], x, 7.0).astype(np.float32)
    found, routing = module(jnp.asarray(x), valid=jnp.asarray(valid))
    other, other_routing = module(jnp.asarray(changed), valid=jnp.asarray(valid))
    np.testing.assert_array_equal(found[:, :6], other[:, :6])
    jax.tree.map(np.testing.assert_array_equal, routing, other_routing)
    assert routing.tokens == 12 and routing.chosen.sum() == 24
    np.testing.assert_allclose(routing.probability.sum(), 12, rtol=1e-6)


def test_even_routing_has_the_least_balancing_loss():
    even = Routing(jnp.full((3, COUNT), 5.0), jnp.full((3, COUNT), 2.5), jnp.full(3, 10.0))
    assert load_balancing_loss(even) == 2.0
    chosen = jnp.array([[10.0, 10.0, 0.0, 0.0]] * 3)
    assert load_balancing_loss(even._replace(chosen=chosen, probability=chosen / 2)) == 4.0


def test_the_model_hands_the_loss_to_the_step_once_for_all_layers():
    config = EXAMPLES["experts"]
    batch = {"decoder_input_tokens": np.pad(tokens(0, 2, 9), ((0, 0), (0, 3)))}
    output = merge(abstract(config).graphdef, parameters(config)).output(batch)
    loss = output.losses["load_balancing/decoder"]
    assert loss.weight == 18 and loss.coefficient == 0.001
    assert 1.9 < loss.sum / loss.weight < 3


def test_experts_have_gradients_with_and_without_a_limit():
    x = jnp.asarray(states())
    for capacity in (None, 2.0):
        graphdef, params = nnx.split(mixture(capacity_factor=capacity))
        grads = jax.grad(lambda p, g=graphdef: jnp.sum(nnx.merge(g, p)(x, valid=None)[0] ** 2))(params)
        leaves = jax.tree.leaves(grads)
        if capacity is None:
            expected = leaves
    for ours, theirs in zip(leaves, expected, strict=True):
        assert np.abs(ours).max() > 0
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_the_stack_refuses_what_experts_cannot_do():
    from t5x_like.config import ModelConfig
    from t5x_like.config.sections import model_problems

    wrong = stack(experts=Experts(num_experts=2, experts_per_token=3), use_bias=True)
    found = [str(problem) for problem in model_problems(ModelConfig(encoder=None, decoder=wrong, vocab_size=8))]
    assert any("experts_per_token" in line for line in found) and any("biases" in line for line in found)
    assert not [
        *model_problems(ModelConfig(encoder=None, decoder=dataclasses.replace(wrong, experts=None), vocab_size=8))
    ]
