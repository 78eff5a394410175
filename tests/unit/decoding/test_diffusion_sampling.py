"""The sampler of masked diffusion: the model's joint distribution by enumeration, its schedules, and what it keeps."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from helpers.config_examples import example
from helpers.model_examples import forward, model, parameters
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from t5x_like.config import ModelConfig, ShardingConfig
from t5x_like.config.layouts import Layout
from t5x_like.data.objectives.masked_diffusion import mask_positions
from t5x_like.data.stream.feature_converters import convert
from t5x_like.data.tokenizers.vocabulary import Vocabulary
from t5x_like.decoding.diffusion_sampling import MaskedText, _unmask, unmask_tokens
from t5x_like.decoding.log_likelihood import require_masked_model
from t5x_like.decoding.request_scheduler import SlotLimits
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.slot_requests import Request
from t5x_like.decoding.stop_strings import StopStrings, compile_stop_strings
from t5x_like.decoding.unmasking_schedule import DiffusionSampling
from t5x_like.decoding.unmasking_scheduler import UnmaskingScheduler
from t5x_like.errors import ConfigError, DataError
from t5x_like.program import Program, build_program

VOCABULARY = Vocabulary(base_size=5, num_sentinels=1)
V, N, MASK = VOCABULARY.vocab_size, 3, VOCABULARY.mask_id
ALLOWED = np.arange(V) < VOCABULARY.base_size
TEXTS = np.array([*itertools.product(range(VOCABULARY.base_size), repeat=N)], np.int32)
SAMPLES = 2048
TEMPERATURE = Sampling(temperature=1.0)


def config_of(layout: Layout) -> ModelConfig:
    """Return a model whose positions differ before any token is known, and that takes no id for padding."""
    config = model("encoder" if layout == "encoder" else "prefix_lm", "learned", pad_token_id=None)
    return dataclasses.replace(config, vocab_size=V)


def loud_parameters(config: ModelConfig) -> Any:
    """Return parameters whose predictions are far from uniform and depend on the tokens."""
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + draw.normal(0.0, 0.3, leaf.shape).astype(np.float32), parameters(config))


@functools.cache
def program_of(layout: Layout, devices: int = 1) -> tuple[Program, Any]:
    run = dataclasses.replace(example(layout), model=config_of(layout))
    return build_program(run, jax.devices()[:devices]), loud_parameters(run.model)


def log_probabilities(layout: Layout, known: Sequence[int]) -> np.ndarray:
    """Return log p of the allowed tokens at each position of each text, given its tokens at `known`: [texts, N, V]."""
    masked = np.ones(TEXTS.shape, np.bool_)
    masked[:, list(known)] = False
    if not masked.any():
        raise ValueError("nothing is masked")
    batch = convert(mask_positions(TEXTS, masked, VOCABULARY), layout, N, 0)
    inputs = {name: values for name, values in batch.items() if "target" not in name and "weights" not in name}
    config = config_of(layout)
    logits = np.asarray(forward(config)(loud_parameters(config), inputs), np.float64)[..., : VOCABULARY.base_size]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def joint(layout: Layout, choose: Any) -> np.ndarray:
    """Return p of each text where `choose(known, log_p [N, V])` gives the probability of each next position."""
    tables = {
        known: log_probabilities(layout, known) for size in range(N) for known in itertools.combinations(range(N), size)
    }
    result = np.zeros(len(TEXTS))
    for index, text in enumerate(TEXTS):
        mass = {(): 1.0}
        for _ in range(N):
            following: dict[tuple[int, ...], float] = {}
            for known, probability in mass.items():
                table = tables[known][index]
                for position, share in choose(known, table).items():
                    new = tuple(sorted((*known, position)))
                    following[new] = following.get(new, 0.0) + probability * share * np.exp(
                        table[position, text[position]]
                    )
            mass = following
        result[index] = mass[tuple(range(N))]
    return result


def any_position(known: tuple[int, ...], table: np.ndarray) -> dict[int, float]:
    left = [position for position in range(N) if position not in known]
    return dict.fromkeys(left, 1 / len(left))


def most_confident(known: tuple[int, ...], table: np.ndarray) -> dict[int, float]:
    left = [position for position in range(N) if position not in known]
    return {max(left, key=lambda position: table[position].max()): 1.0}


def first_position(known: tuple[int, ...], table: np.ndarray) -> dict[int, float]:
    return {len(known): 1.0}


def p_value(found: Sequence[Sequence[int]], expected: np.ndarray) -> float:
    """Return the p-value of a chi-square test, with texts of fewer than 5 expected samples taken together."""
    counts = np.zeros(len(TEXTS))
    for text in found:
        counts[int(np.ravel_multi_index(tuple(text), (VOCABULARY.base_size,) * N))] += 1
    rare = expected * len(found) < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    predicted = np.append(expected[~rare], expected[rare].sum()) * len(found)
    keep = predicted > 0
    return float(stats.chisquare(observed[keep], predicted[keep] * observed.sum() / predicted[keep].sum()).pvalue)


@pytest.mark.parametrize(
    ("layout", "diffusion", "choose"),
    [
        ("encoder", DiffusionSampling("random"), any_position),
        pytest.param("prefix_lm", DiffusionSampling("random"), any_position, marks=pytest.mark.slow),
        pytest.param("encoder", DiffusionSampling("confidence"), most_confident, marks=pytest.mark.slow),
        pytest.param(
            "prefix_lm", DiffusionSampling("confidence", block_length=1), first_position, marks=pytest.mark.slow
        ),
    ],
)
def test_texts_have_the_probabilities_of_the_model(layout: Layout, diffusion: DiffusionSampling, choose: Any) -> None:
    program, params = program_of(layout)
    expected = joint(layout, choose)
    assert expected.sum() == pytest.approx(1.0, rel=1e-4)
    found = unmask_tokens(
        program,
        params,
        [MaskedText([MASK] * N, range(N))] * SAMPLES,
        allowed_V=ALLOWED,
        diffusion=diffusion,
        sampling=TEMPERATURE,
        batch_size=512,
        ends_at_eos=False,
    )
    assert p_value(found, expected) > 1e-3
    # The test tells distributions apart that differ as those of two orders do.
    assert p_value(found, joint(layout, first_position if choose is any_position else any_position)) < 1e-6


@pytest.mark.slow
def test_tokens_of_one_pass_are_drawn_independently() -> None:
    program, params = program_of("encoder")
    table = log_probabilities("encoder", ())[0]
    expected = np.exp(sum(table[position, TEXTS[:, position]] for position in range(N)))
    found = unmask_tokens(
        program,
        params,
        [MaskedText([MASK] * N, range(N))] * SAMPLES,
        allowed_V=ALLOWED,
        diffusion=DiffusionSampling("random", steps=1),
        sampling=TEMPERATURE,
        batch_size=512,
        ends_at_eos=False,
    )
    assert p_value(found, expected) > 1e-3


def texts_with_gaps(*sizes: tuple[int, int]) -> list[MaskedText]:
    """Return texts of (length, number of masked positions)."""
    draw = np.random.default_rng(0)
    texts = []
    for length, count in sizes:
        positions = sorted(draw.choice(length, count, replace=False).tolist())
        tokens = draw.integers(2, VOCABULARY.base_size, length)
        tokens[positions] = MASK
        texts.append(MaskedText(tokens.tolist(), positions))
    return texts


@pytest.mark.parametrize(
    ("layout", "diffusion", "sizes"),
    [
        ("encoder", DiffusionSampling(), ((8, 4), (12, 4), (14, 3))),
        pytest.param(
            "prefix_lm",
            DiffusionSampling("random", steps=3, block_length=4),
            ((3, 1), (9, 4), (14, 7)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_text_does_not_depend_on_the_texts_beside_it(
    layout: Layout, diffusion: DiffusionSampling, sizes: tuple[tuple[int, int], ...]
) -> None:
    program, params = program_of(layout)
    texts = texts_with_gaps(*sizes)
    call = functools.partial(
        unmask_tokens,
        program,
        params,
        allowed_V=ALLOWED,
        diffusion=diffusion,
        sampling=TEMPERATURE,
        seed=7,
        ends_at_eos=False,
    )
    together = call(texts)
    assert [len(new) for new in together] == [len(text.positions) for text in texts]
    assert together == [call([text], rows=[row])[0] for row, text in enumerate(texts)]
    assert together != call(texts, rows=range(9, 12))


def test_greedy_filling_is_deterministic_and_keeps_what_is_given() -> None:
    program, params = program_of("encoder")
    texts = texts_with_gaps((9, 4), (9, 8))
    found = [unmask_tokens(program, params, texts, allowed_V=ALLOWED, seed=seed, ends_at_eos=False) for seed in (0, 1)]
    assert found[0] == found[1]
    for text, new in zip(texts, found[0], strict=True):
        # As by a plain loop that unmasks the most probable token of all masked positions.
        config, tokens = config_of("encoder"), np.array([text.tokens], np.int32)
        left = list(text.positions)
        while left:
            logits = np.asarray(forward(config)(loud_parameters(config), {"encoder_input_tokens": tokens}), np.float64)
            logits = np.where(ALLOWED, logits[0], -np.inf)
            best = np.exp(logits.max(axis=-1)) / np.exp(logits).sum(axis=-1)
            position = max(left, key=lambda position: best[position])
            tokens[0, position] = logits[position].argmax()
            left.remove(position)
        assert [int(tokens[0, position]) for position in text.positions] == new
        given = [position for position in range(len(text.tokens)) if position not in text.positions]
        assert all(tokens[0, position] == text.tokens[position] for position in given)


@pytest.mark.slow
def test_a_text_ends_at_eos_or_a_stop_string() -> None:
    program, params = program_of("encoder")
    texts = [MaskedText([2, 3, *[MASK] * 12], range(2, 14))] * 40
    call = functools.partial(unmask_tokens, program, params, texts, allowed_V=ALLOWED, sampling=TEMPERATURE)
    blocks = DiffusionSampling("random", block_length=4)
    whole = call(diffusion=blocks, ends_at_eos=False)
    cut = call(diffusion=blocks)
    eos = VOCABULARY.eos_id
    assert cut == [new[: new.index(eos)] if eos in new else new for new in whole]
    assert any(len(new) < 12 for new in cut)
    pieces = [b"", b"", b"a", b"b", b"c"]
    stops: StopStrings = compile_stop_strings(["ab"], pieces, V)
    stopped = call(diffusion=blocks, stops=stops)
    for new, until in zip(cut, stopped, strict=True):
        text = b"".join(pieces[token] for token in until)
        assert new[: len(until)] == until
        assert text.endswith(b"ab") or until == new
        assert text.find(b"ab") in (-1, len(text) - 2)


@given(st.integers(1, 60), st.one_of(st.none(), st.integers(1, 80)), st.one_of(st.none(), st.integers(1, 70)))
def test_every_position_is_unmasked_once(count: int, steps: int | None, block_length: int | None) -> None:
    passes = DiffusionSampling(steps=steps, block_length=block_length).passes(count)
    assert sum(map(sum, passes)) == count and all(one > 0 for block in passes for one in block)
    assert [sum(block) for block in passes[:-1]] == [min(block_length or count, count)] * (len(passes) - 1)
    number = sum(map(len, passes))
    if steps is None or steps >= count:
        assert number == count
    else:
        # Each block has its share, rounded up.
        assert min(steps, count) <= number <= steps + len(passes) - 1 or number == len(passes)
    assert all(max(block) - min(block) <= 1 for block in passes)


def test_what_cannot_be_sampled_is_refused() -> None:
    program, params = program_of("encoder")
    with pytest.raises(ConfigError, match="repetition_penalty"):
        unmask_tokens(program, params, [], allowed_V=ALLOWED, sampling=Sampling(repetition_penalty=1.2))
    with pytest.raises(ConfigError, match="num_steps and block_length: found 0, expected 1 or more"):
        DiffusionSampling(steps=0, block_length=0)
    with pytest.raises(ConfigError, match="an encoder and a decoder"):
        require_masked_model(model("encoder_decoder", "rope"))
    broken = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), params)
    with pytest.raises(DataError, match="prompt 0: found logits of its new token 0 that are not finite"):
        unmask_tokens(program, broken, [MaskedText([2, MASK], [1])], allowed_V=ALLOWED)


@pytest.mark.slow
def test_texts_are_independent_of_the_mesh() -> None:
    """Over eight devices that split rows, parameters, heads and the vocabulary."""
    of_model = dataclasses.replace(model("encoder", "learned"), vocab_size=64)
    run = dataclasses.replace(example("encoder"), model=of_model)
    program, params = build_program(run, jax.devices()[:1]), loud_parameters(run.model)
    split = build_program(dataclasses.replace(run, sharding=ShardingConfig(data=2, fsdp=2, tensor=2)), jax.devices())
    placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, split.abstract_params)
    texts = [
        text._replace(tokens=[60 if token == MASK else token for token in text.tokens])
        for text in texts_with_gaps((3, 1), (9, 4), (14, 7))
    ]
    settings: dict[str, Any] = {
        "allowed_V": np.arange(64) < 60,
        "sampling": Sampling(temperature=1.1, top_k=30, top_p=0.9, min_p=0.01),
        "diffusion": DiffusionSampling(steps=3, block_length=4),
        "seed": 3,
    }
    drawn = [unmask_tokens(*one, texts, **settings) for one in ((program, params), (split, placed))]
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_requests_in_slots_get_the_tokens_that_they_get_alone() -> None:
    """In any order of arrival, with settings of their own, and without a new program."""
    program, params = program_of("encoder")
    diffusion = DiffusionSampling("random", steps=8, block_length=3)
    scheduler = UnmaskingScheduler(
        program,
        params,
        allowed_V=ALLOWED,
        mask_id=MASK,
        diffusion=diffusion,
        config=SlotLimits(slots=3, max_prompt_length=14, max_new_tokens=12),
    )
    scheduler.warm_up()
    programs = _unmask._cache_size()
    draw = random.Random(3)
    requests, results = [], []
    for row in range(11):
        result: dict[str, Any] = {"tokens": [], "finish": None}

        def take(tokens: list[int], finish: str | None, result: dict[str, Any] = result) -> None:
            assert result["finish"] is None, "tokens after the end"
            result["tokens"] += tokens
            result["finish"] = finish

        sampling = draw.choice([Sampling(), TEMPERATURE, Sampling(temperature=0.8, top_k=2), Sampling(1.2, top_p=0.9)])
        prompt = [draw.randrange(2, 5) for _ in range(draw.choice([1, 2, 9]))]
        suffix = [2, 3] if row % 3 == 0 else []
        requests.append(Request(prompt, draw.randrange(1, 13), sampling, take, seed=5, row=row, suffix=suffix))
        results.append(result)
    pending, cancelled = list(requests), requests[4]
    while pending or scheduler.num_waiting or scheduler.num_active:
        for _ in range(min(draw.randrange(3), len(pending))):
            scheduler.submit(pending.pop(0))
        if cancelled not in pending:
            scheduler.cancel(cancelled)
        scheduler.run_once()
    assert _unmask._cache_size() == programs, "a program was compiled"
    assert results[4]["finish"] == "cancelled"
    for row, (request, result) in enumerate(zip(requests, results, strict=True)):
        if request is cancelled:
            continue
        start, count = len(request.prompt), request.max_new_tokens
        text = MaskedText([*request.prompt, *[MASK] * count, *request.suffix], range(start, start + count))
        (alone,) = unmask_tokens(
            program,
            params,
            [text],
            allowed_V=ALLOWED & (np.arange(V) != VOCABULARY.eos_id) if request.suffix else ALLOWED,
            diffusion=diffusion,
            sampling=request.sampling,
            seed=5,
            rows=[row],
        )
        assert result["tokens"] == alone
        assert result["finish"] == ("length" if len(alone) == count else "stop")
    with pytest.raises(ValueError, match="a prompt of 15 tokens, expected 1 to 14"):
        scheduler.submit(Request([2] * 13, 1, Sampling(), lambda tokens, finish: None, suffix=[2, 3]))
