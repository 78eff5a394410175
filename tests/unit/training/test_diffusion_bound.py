"""The loss of masked diffusion against the exact likelihood of a tiny model, by enumeration of masks and orders."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_examples import forward, model, parameters

from t5x_like.config import ModelConfig
from t5x_like.config.layouts import Layout
from t5x_like.data.objectives.masked_diffusion import mask_positions
from t5x_like.data.stream.feature_converters import convert
from t5x_like.data.tokenizers.vocabulary import Vocabulary
from t5x_like.training.losses import batch_metrics

VOCABULARY = Vocabulary(base_size=5, num_sentinels=1)
V, N = VOCABULARY.vocab_size, 3
SUBSETS = [subset for k in range(1, N + 1) for subset in itertools.combinations(range(N), k)]
TEXTS = np.array([*itertools.product(range(V), repeat=N)], np.int32)


def config_of(layout: Layout) -> ModelConfig:
    """Return a model that takes no id for padding, so that any text of the vocabulary can be enumerated."""
    config = model("encoder" if layout == "encoder" else "prefix_lm", "rope", pad_token_id=None)
    return dataclasses.replace(config, vocab_size=V)


def features_of(texts: np.ndarray, subset: tuple[int, ...], layout: Layout) -> Mapping[str, np.ndarray]:
    masked = np.zeros(texts.shape, np.bool_)
    masked[:, subset] = True
    return convert(mask_positions(texts, masked, VOCABULARY), layout, N, 0)


def log_probabilities(layout: Layout) -> dict[tuple[int, ...], np.ndarray]:
    """Return log p of each token of each text given the tokens outside of each subset: subset -> [texts, N]."""
    config, found = config_of(layout), {}
    for subset in SUBSETS:
        batch = features_of(TEXTS, subset, layout)
        inputs = {name: values for name, values in batch.items() if "target" not in name and "weights" not in name}
        logits = np.asarray(forward(config)(parameters(config), inputs), np.float64)
        log_z = np.log(np.exp(logits).sum(axis=-1))
        found[subset] = np.take_along_axis(logits, TEXTS[:, :, None], axis=-1)[..., 0] - log_z
    return found


@pytest.mark.parametrize("layout", ["encoder", "prefix_lm"])
def test_the_mean_loss_is_the_bound_and_never_below_the_negative_log_likelihood(layout: Layout) -> None:
    config, table = config_of(layout), log_probabilities(layout)
    # The model's own joint: the mean over the orders of generation, each with one token after the other.
    orders = [*itertools.permutations(range(N))]
    of_orders = np.stack([sum(table[tuple(sorted(order[i:]))][:, order[i]] for i in range(N)) for order in orders])
    joint = np.exp(of_orders).mean(axis=0)
    assert joint.sum() == pytest.approx(1.0, rel=1e-4)
    # Jensen's bound of the joint is the mean over orders of -log p.
    bound = -of_orders.mean(axis=0)
    assert (bound >= -np.log(joint) - 1e-9).all() and (bound > -np.log(joint) + 1e-6).any()

    # The loss of training, averaged over k and over all subsets of k tokens, is the same number.
    random = np.random.default_rng(0)
    for text in random.choice(len(TEXTS), 4, replace=False):
        expected = 0.0
        for subset in SUBSETS:
            batch = {"main": features_of(TEXTS[text : text + 1], subset, layout)}
            metrics, _ = batch_metrics(
                lambda params, features, key: forward(config)(params, features),
                parameters(config),
                batch,  # type: ignore[arg-type]
                None,
                z_loss=0.0,
                label_smoothing=0.0,
                denoisers=(),
            )
            assert float(metrics["loss"].weight) == pytest.approx(N, rel=1e-6)
            expected += float(metrics["loss"].sum) / N / math.comb(N, len(subset))
        assert expected == pytest.approx(bound[text], rel=1e-4)


def test_the_entropy_of_a_markov_chain_is_reached_by_its_own_conditionals_and_beaten_by_no_others() -> None:
    random = np.random.default_rng(0)
    first, then = random.dirichlet(np.ones(V)), random.dirichlet(np.ones(V), V)
    joint = first[:, None, None] * then[:, :, None] * then[None]
    probability = joint[tuple(TEXTS.T)]
    entropy = -float((probability * np.log(probability)).sum())

    def conditionals(subset: tuple[int, ...]) -> np.ndarray:
        """Return log p of each token at each masked position given those outside of the subset, [texts, N, V]."""
        found = np.zeros((len(TEXTS), N, V))
        for position in subset:
            marginal = joint.sum(axis=tuple(set(subset) - {position}), keepdims=True)
            conditional = np.broadcast_to(marginal / marginal.sum(axis=position, keepdims=True), joint.shape)
            others = [TEXTS[:, other] for other in range(N) if other != position]
            found[:, position] = np.log(np.moveaxis(conditional, position, -1)[tuple(others)])
        return found

    def mean_loss(subset: tuple[int, ...], noise: float) -> float:
        """Return the mean training loss of texts that are drawn from the chain."""
        logits = jnp.asarray(conditionals(subset) + noise * random.normal(size=(len(TEXTS), N, V)), jnp.float32)
        features = {
            name: jnp.asarray(values * probability[:, None] if "weights" in name else values)
            for name, values in features_of(TEXTS, subset, "encoder").items()
        }
        metrics, _ = batch_metrics(
            lambda params, features, key: logits,
            {},
            {"main": features},
            None,
            z_loss=0.0,
            label_smoothing=0.0,
            denoisers=(),
        )
        return float(metrics["loss"].sum) / N

    def bound(noise: float) -> float:
        """Return the mean over numbers of masked tokens and subsets, with noise on the logits."""
        return sum(mean_loss(subset, noise) / math.comb(N, len(subset)) for subset in SUBSETS)

    assert bound(0.0) == pytest.approx(entropy, rel=1e-4)
    assert all(bound(noise) > entropy * (1 + 1e-3) for noise in (0.2, 1.0, 3.0))
