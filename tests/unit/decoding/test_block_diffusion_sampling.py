"""Block diffusion: the loss against the exact likelihood of a tiny model, and the sampler against its distribution."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.config_examples import example
from helpers.model_examples import forward, model, parameters
from scipy import stats

from t5x_like.config import BlockDiffusion, ModelConfig
from t5x_like.data.objectives.block_diffusion import mask_blocks
from t5x_like.data.stream.feature_converters import convert
from t5x_like.data.tokenizers.vocabulary import Vocabulary
from t5x_like.decoding.diffusion_sampling import MaskedText, _block_logits, _read_before, unmask_tokens
from t5x_like.decoding.inference_params import decoding_model, inference_params
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.unmasking_schedule import DiffusionSampling
from t5x_like.errors import ConfigError, DataError
from t5x_like.program import Program, build_program
from t5x_like.training.losses import batch_metrics

VOCABULARY = Vocabulary(base_size=4, num_sentinels=1)
V, N, BLOCK, MASK = VOCABULARY.vocab_size, 3, 2, VOCABULARY.mask_id
TEXTS = np.array([*itertools.product(range(V), repeat=N)], np.int32)
BLOCKS = ((0, 2), (2, 1))
"""First token and size of each block of a text."""
SAMPLES = 2048


def config_of() -> ModelConfig:
    """Return a model whose positions differ before any token is known, and that takes no id for padding."""
    return dataclasses.replace(model("encoder_decoder", "learned", pad_token_id=None), vocab_size=V)


@functools.cache
def loud_parameters() -> Any:
    """Return parameters whose predictions are far from uniform and depend on the tokens."""
    draw = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + draw.normal(0.0, 0.3, leaf.shape).astype(np.float32), parameters(config_of())
    )


def subsets(size: int) -> list[tuple[int, ...]]:
    return [subset for k in range(1, size + 1) for subset in itertools.combinations(range(size), k)]


def features_of(texts: np.ndarray, start: int, size: int, masked: tuple[int, ...]) -> dict[str, Any]:
    """Return rows of one block of each text, without padding in the encoder."""
    mask = np.zeros((len(texts), size), np.bool_)
    mask[:, list(masked)] = True
    starts = np.full(len(texts), start)
    return convert(
        mask_blocks(texts[:, : start + size], starts, mask, VOCABULARY), "encoder_decoder", start + 1, BLOCK + 1
    )


@functools.cache
def log_probabilities(start: int, size: int, masked: tuple[int, ...], allowed: int = V) -> np.ndarray:
    """Return log p of each token below `allowed` at each position of the block of each text: [texts, size, allowed]."""
    batch = features_of(TEXTS, start, size, masked)
    inputs = {name: values for name, values in batch.items() if "target" not in name and "weights" not in name}
    logits = np.asarray(forward(config_of())(loud_parameters(), inputs), np.float64)[:, 1 : size + 1, :allowed]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def of_orders(start: int, size: int, allowed: int = V) -> np.ndarray:
    """Return log p of the block of each text in each order of its tokens: [orders, texts]."""
    found = []
    for order in itertools.permutations(range(size)):
        total = np.zeros(len(TEXTS))
        for number, position in enumerate(order):
            table = log_probabilities(start, size, tuple(sorted(order[number:])), allowed)[:, position]
            token = np.minimum(TEXTS[:, start + position], allowed - 1)
            total += np.take_along_axis(table, token[:, None], axis=-1)[:, 0]
        found.append(total)
    return np.stack(found)


def joint(allowed: int = V) -> np.ndarray:
    """Return p of each text of the allowed tokens: blocks one after the other, the mean over orders in each."""
    p = np.prod([np.exp(of_orders(start, size, allowed)).mean(axis=0) for start, size in BLOCKS], axis=0)
    return np.where((TEXTS < allowed).all(axis=1), p, 0.0)


def test_the_losses_of_the_blocks_bound_the_negative_log_likelihood() -> None:
    p = joint()
    assert p.sum() == pytest.approx(1.0, rel=1e-4)
    bound = -sum(of_orders(start, size).mean(axis=0) for start, size in BLOCKS)
    assert (bound >= -np.log(p) - 1e-9).all() and (bound > -np.log(p) + 1e-6).any()

    # The losses of training, averaged over k and all subsets of k tokens and summed over the blocks, are this number.
    for text in np.random.default_rng(0).choice(len(TEXTS), 4, replace=False):
        expected = 0.0
        for start, size in BLOCKS:
            for masked in subsets(size):
                batch = {"main": features_of(TEXTS[text : text + 1], start, size, masked)}
                metrics, _ = batch_metrics(
                    lambda params, features, key: forward(config_of())(params, features),
                    loud_parameters(),
                    batch,
                    None,
                    z_loss=0.0,
                    label_smoothing=0.0,
                    denoisers=(),
                )
                assert float(metrics["loss"].weight) == pytest.approx(size, rel=1e-6)
                expected += float(metrics["loss"].sum) / size / math.comb(size, len(masked))
        assert expected == pytest.approx(bound[text], rel=1e-4)


@functools.cache
def program_of() -> tuple[Program, Any]:
    run = example("encoder_decoder")
    data = dataclasses.replace(run.data, mixture=(BlockDiffusion(block_length=BLOCK),))
    run = dataclasses.replace(run, model=config_of(), data=dataclasses.replace(data, inputs_length=16))
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, targets_length=16))
    return build_program(run, jax.devices()[:1]), loud_parameters()


def sampled(text: MaskedText, count: int, **options: Any) -> list[list[int]]:
    program, params = program_of()
    return unmask_tokens(
        program,
        params,
        [text] * count,
        allowed_V=np.arange(V) < VOCABULARY.base_size,
        diffusion=options.pop("diffusion", DiffusionSampling("random", block_length=BLOCK)),
        sampling=Sampling(temperature=1.0),
        batch_size=512,
        ends_at_eos=False,
        **options,
    )


def p_value(found: list[list[int]], p: np.ndarray) -> float:
    """Return the p-value of a chi-square test, with texts of fewer than 5 expected samples taken together."""
    counts = np.zeros(len(p))
    for text in found:
        counts[int(np.ravel_multi_index(tuple(text), (V,) * N))] += 1
    rare = p * len(found) < 5
    observed, predicted = np.append(counts[~rare], counts[rare].sum()), np.append(p[~rare], p[rare].sum())
    keep = predicted > 0
    assert observed[~keep].sum() == 0
    return float(stats.chisquare(observed[keep], predicted[keep] / predicted[keep].sum() * observed.sum()).pvalue)


@pytest.mark.slow
def test_samples_follow_the_distribution_of_the_model() -> None:
    p = joint(VOCABULARY.base_size)
    assert p.sum() == pytest.approx(1.0, rel=1e-4)
    found = sampled(MaskedText([MASK] * N, range(N)), SAMPLES)
    assert p_value(found, p) > 1e-3
    # The test notices blocks of one token, whose distribution is another one.
    assert (
        p_value(sampled(MaskedText([MASK] * N, range(N)), SAMPLES, diffusion=DiffusionSampling(block_length=1)), p)
        < 1e-6
    )

    # After a first token, the rest of the text is one block.
    first = 3
    given = np.where(TEXTS[:, 0] == first, np.exp(of_orders(1, 2, VOCABULARY.base_size)).mean(axis=0), 0.0)
    given = np.where((TEXTS < VOCABULARY.base_size).all(axis=1), given, 0.0)
    assert given.sum() == pytest.approx(1.0, rel=1e-4)
    rest = sampled(MaskedText([first, MASK, MASK], (1, 2)), SAMPLES)
    assert p_value([[first, *new] for new in rest], given) > 1e-3


@pytest.mark.parametrize("cross_attention", ["separate", "merged"])
def test_a_pass_of_the_sampler_has_the_logits_of_training(cross_attention: Literal["separate", "merged"]) -> None:
    program, _ = program_of()
    config = program.run.model
    assert config.decoder is not None
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, cross_attention=cross_attention))
    program = build_program(dataclasses.replace(program.run, model=config), jax.devices()[:1])
    params = parameters(config)
    start, masked = 1, (0,)
    batch = features_of(TEXTS, start, BLOCK, masked)
    inputs = {name: values for name, values in batch.items() if "target" not in name and "weights" not in name}
    expected = np.asarray(forward(config)(params, inputs))[:, 1:]
    tokens = TEXTS.copy()
    tokens[:, start : start + BLOCK] = batch["decoder_input_tokens"][:, 1:]
    rows = len(tokens)

    @jax.jit
    def logits(params: Any) -> jax.Array:
        found = decoding_model(program, inference_params(program, params))
        cache = _read_before(found, jnp.asarray(tokens), jnp.full(rows, start), BLOCK)
        return _block_logits(found, jnp.asarray(tokens[:, start:]), jnp.full(rows, BLOCK), cache)

    with program.mesh_context():
        found = np.asarray(logits(params))
    assert found == pytest.approx(expected, abs=1e-4)
    # The last token of the block reaches the prediction of the first one.
    last = np.array(tokens[:, -1] == tokens[0, -1])
    same = np.array((tokens[:, :-1] == tokens[0, :-1]).all(axis=1))
    assert np.ptp(found[same & ~last, 0], axis=0).max() > 1e-3


def test_relative_positions_tell_the_tokens_of_a_masked_block_apart() -> None:
    """Only the distance to the start token differs, since all tokens of such a block are the mask token."""
    config = dataclasses.replace(model("encoder_decoder", "rope", pad_token_id=None), vocab_size=V)
    batch = features_of(TEXTS[:1], 1, BLOCK, (0, 1))
    inputs = {name: values for name, values in batch.items() if "target" not in name and "weights" not in name}
    _, first, second = np.asarray(forward(config)(parameters(config), inputs))[0]
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.slow
def test_a_text_does_not_depend_on_the_texts_beside_it() -> None:
    program, params = program_of()
    texts = [
        MaskedText([*[2, 3, 2, 3][:given], *[MASK] * new], range(given, given + new))
        for given, new in ((0, 5), (4, 1), (3, 4))
    ]
    call = functools.partial(
        unmask_tokens,
        program,
        params,
        allowed_V=np.arange(V) < VOCABULARY.base_size,
        diffusion=DiffusionSampling(block_length=BLOCK),
        sampling=Sampling(temperature=1.0),
        ends_at_eos=False,
    )
    together = call(texts)
    assert [len(new) for new in together] == [5, 1, 4]
    assert together == [call([text], rows=[row])[0] for row, text in enumerate(texts)]


def test_what_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(DataError, match="text 0: found tokens after a masked position"):
        sampled(MaskedText([MASK, 2], [0]), 1)
    program, params = program_of()
    other = dataclasses.replace(program.run, data=example("encoder_decoder").data)
    other_program = build_program(other, jax.devices()[:1])
    with pytest.raises(ConfigError, match="found an encoder and a decoder"):
        unmask_tokens(other_program, params, [MaskedText([MASK], [0])], allowed_V=np.ones(V, bool))
