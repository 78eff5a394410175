"""Mixture of experts, compared with a loop over all experts on all tokens; load statistics."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.model_examples import EXAMPLES, parameters, stack, tokens

from t5x_like.config import MoEConfig
from t5x_like.models.factory import abstract_model, bind_params
from t5x_like.models.moe import MixtureOfExperts, Routing, load_balancing_loss, router_losses

ROWS, LENGTH, D, COUNT = 2, 10, 32, 4


def mixture(**changes):
    config = stack(experts=MoEConfig(num_experts=COUNT, **changes))
    return MixtureOfExperts(config, rngs=nnx.Rngs(params=0))


def states():
    return np.random.default_rng(0).normal(size=(ROWS, LENGTH, D)).astype(np.float32)


def dense(module, x, experts):
    """Return the output by the definition: a loop over all experts, each on all tokens, multiplied by its weight."""
    logits = x @ module.router.kernel[...]
    scores = jax.nn.softmax(logits) if experts.scoring == "softmax" else jax.nn.sigmoid(logits)
    # The bias decides which experts are chosen, and not their weights.
    biased = scores if experts.bias_update_rate is None else scores + module.router_bias[...]
    kept = biased >= jnp.sort(biased, axis=-1)[..., -experts.experts_per_token, None]
    weights = jnp.where(kept, scores, 0.0)
    if experts.normalize_weights:
        weights = weights / weights.sum(-1, keepdims=True)
    out = 0.0
    for number in range(COUNT):
        wi_0, wi_1, wo = (getattr(module, name).kernel[number] for name in ("wi_0", "wi_1", "wo"))
        expert = (jax.nn.gelu(x @ wi_0, approximate=True) * (x @ wi_1)) @ wo
        out = out + experts.weight_scale * weights[..., number, None] * expert
    return out + module.shared(x, dropout_rng=None) if experts.num_shared_experts else out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "experts_per_token": 3,
            "scoring": "sigmoid",
            "num_shared_experts": 2,
            "weight_scale": 2.5,
            "bias_update_rate": 0.001,
        },
        {"experts_per_token": 1, "normalize_weights": False},
    ],
)
def test_outputs_and_gradients_are_those_of_a_loop_over_all_experts(changes):
    graphdef, params = nnx.split(mixture(**changes))
    # Larger kernels of the router, so that some experts get most tokens and some few.
    params["router"]["kernel"][...] *= 5.0
    if "router_bias" in params:
        params["router_bias"][...] = jnp.array([0.5, 0.0, -0.3, 0.1])
    x = jnp.asarray(states())
    experts = MoEConfig(num_experts=COUNT, **changes)

    def both(function):
        value = lambda p, x: (jnp.sum(jnp.sin(out := function(nnx.merge(graphdef, p), x))), out)  # noqa: E731
        (_, out), grads = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(params, x)
        return out, grads

    found = both(lambda module, x: module(x, valid=None)[0])
    expected = both(lambda module, x: dense(module, x, experts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), found, expected)


def test_padding_is_not_computed_and_not_counted():
    module, x = mixture(), states()
    valid = np.ones((ROWS, LENGTH), bool)
    valid[:, 6:] = False
    changed = np.where(valid[..., None], x, 7.0).astype(np.float32)
    found, routing = module(jnp.asarray(x), valid=jnp.asarray(valid))
    other, other_routing = module(jnp.asarray(changed), valid=jnp.asarray(valid))
    np.testing.assert_array_equal(found[:, :6], other[:, :6])
    np.testing.assert_array_equal(found[:, 6:], 0.0)
    jax.tree.map(np.testing.assert_array_equal, routing, other_routing)
    assert routing.tokens == 12 and routing.tokens_per_expert.sum() == 24
    np.testing.assert_allclose(routing.probability.sum(), 12, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("segments", [None, [[1, 1, 1, 2, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3, 3, 3]]])
def test_experts_take_the_first_tokens_of_a_text_up_to_their_capacity(segments):
    experts = MoEConfig(num_experts=3, experts_per_token=2, capacity=2)
    module = MixtureOfExperts(stack(experts=experts), rngs=nnx.Rngs(0))
    chosen = np.random.default_rng(0).integers(0, 3, (2, 8, 2)).astype(np.int32)
    found = module._within_capacity(chosen, 2, None if segments is None else jnp.array(segments))
    for row, tokens_of_row in enumerate(chosen):
        taken = collections.Counter()
        for place, choices in enumerate(tokens_of_row):
            for choice, expert in enumerate(choices):
                text = 0 if segments is None else segments[row][place]
                taken[text, expert] += 1
                assert found[row, place, choice] == (expert if taken[text, expert] <= 2 else 3)
    unlimited = MixtureOfExperts(stack(experts=dataclasses.replace(experts, capacity=None)), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 6, 32))
    np.testing.assert_array_equal(module(x[:, :1], valid=None)[0], unlimited(x[:, :1], valid=None)[0])
    assert not np.array_equal(module(x, valid=None)[0], unlimited(x, valid=None)[0])


def test_uniform_routing_minimizes_the_balancing_loss():
    even = Routing(jnp.full((3, COUNT), 5.0), jnp.full((3, COUNT), 2.5), jnp.zeros(3), jnp.full(3, 10.0))
    assert load_balancing_loss(even) == 2.0
    chosen = jnp.array([[10.0, 10.0, 0.0, 0.0]] * 3)
    assert load_balancing_loss(even._replace(tokens_per_expert=chosen, probability=chosen / 2)) == 4.0


def test_model_returns_router_losses_and_loads_of_all_layers():
    config = EXAMPLES["experts"]
    batch = {"decoder_input_tokens": np.pad(tokens(0, 2, 9), ((0, 0), (0, 3)))}
    output = bind_params(abstract_model(config).graphdef, parameters(config)).output(batch)
    loss = output.losses["moe/aux_loss/decoder"]
    assert loss.weight == 18 and loss.coefficient == 0.001
    means = {name.split("/")[1]: loss.sum / loss.weight for name, loss in output.losses.items()}
    assert 1.9 < means["aux_loss"] < 3 and means["z_loss"] > 0
    experts = config.decoder.experts
    assert 1.0 <= means["max_load"] <= experts.num_experts / experts.experts_per_token
    assert 0.0 <= means["unused_experts"] < 1.0
    assert output.losses["moe/max_load/decoder"].coefficient == output.losses["moe/z_loss/decoder"].coefficient == 0.0


def test_loads_are_a_multiple_of_the_mean_and_the_fraction_without_tokens():
    counts = jnp.array([[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    routing = Routing(counts, counts / 2, jnp.array([8.0, 16.0]), jnp.full(2, 4.0))
    losses = router_losses("decoder", MoEConfig(num_experts=4, router_z_loss_weight=0.5), routing)
    means = {name: float(loss.sum / loss.weight) for name, loss in losses.items()}
    assert means["moe/max_load/decoder"] == 2.0 and means["moe/unused_experts/decoder"] == 0.25
    assert means["moe/z_loss/decoder"] == 3.0 and losses["moe/z_loss/decoder"].coefficient == 0.5


def test_unsupported_expert_configurations_are_refused():
    from t5x_like.config import ModelConfig
    from t5x_like.config.validation.model import model_problems

    wrong = stack(experts=MoEConfig(num_experts=2, experts_per_token=3), use_bias=True)
    found = [str(problem) for problem in model_problems(ModelConfig(encoder=None, decoder=wrong, vocab_size=8))]
    assert any("experts_per_token" in line for line in found) and any("biases" in line for line in found)
    biased = ModelConfig(encoder=None, decoder=stack(experts=MoEConfig(num_experts=2), mlp_bias=True), vocab_size=8)
    assert any("biases" in str(problem) for problem in model_problems(biased))
    assert not [
        *model_problems(ModelConfig(encoder=None, decoder=dataclasses.replace(wrong, experts=None), vocab_size=8))
    ]
