"""Least time and memory of inference: caches of every preset, FLOPs beside the counter of training, and a decoder timed
on this CPU beside the bound from its measured bandwidth."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import math
import os
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.planning_runs import small_run

from t5x_like.config.recipes import load_recipe
from t5x_like.errors import ConfigError
from t5x_like.hardware.topologies import CPU, Topology, parse_topology
from t5x_like.models import inference_layout
from t5x_like.models.factory import abstract_model, bind_params
from t5x_like.models.flops import forward_flops_by_part
from t5x_like.models.model import Model
from t5x_like.models.presets.by_name import PRESETS, preset, sizes
from t5x_like.planning.account.model_sections import common_objectives
from t5x_like.planning.estimate import flops, serving_formulas
from t5x_like.planning.estimate.inference import (
    Inference,
    decoding_kernels,
    expected_experts,
    read_features,
    reading_flops,
    require_speeds,
)
from t5x_like.planning.estimate.kv_cache_bytes import attended_tokens, cache_bytes
from t5x_like.planning.estimate.parameters import model_parts, total
from t5x_like.planning.estimate.tokens import denoiser_tokens, objective_costs

A100 = parse_topology("a100:1")
REFERENCES = [f"{name}:{size}" if size else name for name in PRESETS for size in sizes(name) or ("",)]
DECODERS = ["llama_3:1b", "gemma_2:2b", "gemma_3:1b", "modernbert_decoder", "mixtral_8x7b", "gpt_2"]
PAIRS = ["t5_1_1:base", "t5gemma:2b-2b", "t5gemma_2:1b-1b", "bart"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_cache_bytes_of_every_preset_equal_the_allocated_cache(dtype: str) -> None:
    assert len(REFERENCES) > 80
    for reference in REFERENCES:
        config = preset(reference)
        if config.decoder is None:
            continue
        # `init_cache` reads the configuration only, so that models of any size need not be built.
        described = types.SimpleNamespace(config=config, dtype=jnp.dtype(config.dtype))
        source = 300 if config.encoder is not None else 0
        cache = jax.eval_shape(
            lambda: Model.init_cache(described, 2, 5000, encoder_length=source, dtype=jnp.dtype(dtype))  # noqa: B023
        )
        allocated = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        assert cache_bytes(config, rows=2, length=5000, encoder_length=source, dtype=dtype) == allocated, reference


@pytest.mark.parametrize("reference", [*DECODERS, *PAIRS])
def test_reading_and_steps_are_the_flops_of_one_forward_pass(reference: str) -> None:
    """Decoding a text token by token costs what the training counter counts for it at once, without unread heads."""
    model = preset(reference)
    prompt, answer = (70, 6) if model.encoder is None else (50, 9)
    inference = Inference(model, A100, prompt, answer)
    target = prompt + answer - 1 if model.encoder is None else answer
    parts = forward_flops_by_part(model, read_features(model, rows=1, source=prompt, target=target))
    unread = 0 if model.encoder is not None else parts["head"] * (prompt - 1) / target
    assert inference.request_flops() == pytest.approx(sum(parts.values()) - unread, rel=1e-12)


@pytest.mark.parametrize("reference", ["gemma_2:2b", "gemma_3:1b", "modernbert_decoder"])
def test_a_step_beyond_the_window_attends_to_the_window(reference: str) -> None:
    model = preset(reference)
    assert model.decoder is not None and model.decoder.sliding_window is not None
    length = model.decoder.sliding_window[0] + 500
    more = reading_flops(model, rows=1, length=length) - reading_flops(model, rows=1, length=length - 1)
    head = forward_flops_by_part(model, read_features(model, rows=1, source=0, target=1))["head"]
    assert flops.decode_flops(model, rows=1, length=length) == pytest.approx(more + head, rel=1e-9)
    layers = model.decoder.num_layers
    local = model.decoder.layer_kinds.count("local")
    window = model.decoder.sliding_window[0] + 1
    assert attended_tokens(model.decoder, length) == (layers - local) * length + local * window


def test_kernels_of_a_step_are_the_parameters_that_it_multiplies_by() -> None:
    parts = model_parts(preset("llama_3:8b"))
    table_and_norms = parts["embedding"].count + parts["decoder norms"].count
    assert decoding_kernels(preset("llama_3:8b")) == total(parts).count - table_and_norms
    experts = model_parts(preset("mixtral_8x7b"))
    table_and_norms = experts["embedding"].count + experts["decoder norms"].count
    assert decoding_kernels(preset("mixtral_8x7b")) == total(experts).active - table_and_norms
    pair = model_parts(preset("t5_1_1:small"))
    mine = sum(pair[name].count for name in ("decoder attention", "decoder MLP", "head"))
    assert decoding_kernels(preset("t5_1_1:small")) == mine + pair["decoder cross-attention"].count / 2


def test_bounds_of_llama_on_an_a100() -> None:
    small = Inference(preset("llama_3:8b"), A100, prompt=512, answer=128)
    # 7.5 billion weights without the table of embeddings, two bytes each, at 2.039 TB/s.
    assert small.seconds(small.step(513)) == pytest.approx(7.39e-3, rel=0.01)
    assert small.seconds(small.read()) == pytest.approx(23.1e-3, rel=0.01)
    assert small.bound(small.read()) == "compute" and small.bound(small.step(513)) == "memory"
    assert small.critical_rows == pytest.approx(153, rel=0.01)
    large = Inference(preset("llama_3:70b"), A100, prompt=512, answer=128)
    assert large.largest_batch(total(model_parts(large.model)).count) == 0
    eight = dataclasses.replace(large, machine=parse_topology("a100:8"))
    rows = eight.largest_batch(total(model_parts(large.model)).count)
    used = 2 * 70_553_706_496 + rows * eight.row_cache_bytes
    assert 0 < eight.memory_bytes - used < eight.row_cache_bytes
    # The whole cache is read beside the weights: a batch gives fewer tokens per second than rows times those of one.
    many = dataclasses.replace(small, rows=64)
    assert small.tokens_per_second() < many.tokens_per_second() < 64 * small.tokens_per_second()


def test_machines_of_unknown_speed_and_encoders_are_refused() -> None:
    with pytest.raises(ConfigError, match="--machine: found cpu:2, expected an accelerator"):
        require_speeds(parse_topology("cpu:2"))
    with pytest.raises(ValueError, match="without a decoder"):
        Inference(preset("bert"), A100, prompt=8, answer=8).step(9)


def test_experts_that_tokens_use_together() -> None:
    decoder = preset("mixtral_8x7b").decoder
    assert decoder is not None and decoder.experts is not None
    pairs = list(itertools.combinations(range(8), 2))
    for tokens in (1, 2, 3):
        choices = list(itertools.product(pairs, repeat=tokens))
        mean = sum(len({expert for pair in choice for expert in pair}) for choice in choices) / len(choices)
        assert expected_experts(decoder, tokens) == pytest.approx(mean)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_expected_tokens_equal_the_enumeration_of_outcomes(acceptance: float, length: int) -> None:
    mean = 0.0
    for accepted in itertools.product((True, False), repeat=length):
        probability = math.prod(acceptance if each else 1 - acceptance for each in accepted)
        # Tokens up to the first rejection, and one that is drawn in its place or after the draft.
        mean += probability * (len(list(itertools.takewhile(bool, accepted))) + 1)
    assert serving_formulas.expected_tokens(acceptance, length) == pytest.approx(mean)
    if acceptance < 1:
        closed = (1 - acceptance ** (length + 1)) / (1 - acceptance)
        assert serving_formulas.expected_tokens(acceptance, length) == pytest.approx(closed)
        cost = 0.1
        speed = closed / (length * cost + 1)
        assert serving_formulas.speculative_speedup(acceptance, length, cost) == pytest.approx(speed)
        assert serving_formulas.best_draft(acceptance, cost).speedup >= speed - 1e-12


def test_best_drafts() -> None:
    best = serving_formulas.best_draft(0.75, 0.114)
    assert (best.length, round(best.speedup, 2)) == (4, 2.10)
    best = serving_formulas.best_draft(0.65, 0.33)
    assert (best.length, round(best.speedup, 2)) == (2, 1.25)
    assert serving_formulas.best_draft(0.2, 0.5) == serving_formulas.BestDraft(0, 1.0)
    # A check that costs as much as its tokens, as in a large batch, leaves nothing to gain.
    assert serving_formulas.best_draft(0.75, 0.114, lambda length: length + 1.0).length == 0


def test_tokens_of_dialogues_and_the_other_formulas() -> None:
    read, again, history = 0, 0, 0
    for _ in range(7):
        read += 30
        again += history + 30
        history += 30 + 12
    assert serving_formulas.dialogue_tokens(7, 30, 12) == serving_formulas.DialogueTokens(read, again)
    # Without answers: m n (n + 1) / 2 against m n.
    assert serving_formulas.dialogue_tokens(10, 200, 0) == serving_formulas.DialogueTokens(2_000, 11_000)
    assert serving_formulas.implied_tokens_per_second(64, 128, 0.165) == pytest.approx(49_648, rel=1e-4)
    assert serving_formulas.break_even_tokens(1.4e12) == pytest.approx(4.2e12)
    layers = serving_formulas.layers_of_size(7e9, 128)
    assert 12 * layers * (128 * layers) ** 2 == pytest.approx(7e9)
    assert [serving_formulas.layers_by_the_short_formula(size) for size in (1e8, 7e9, 1.8e12)] == [0, 0, 0]


@pytest.mark.parametrize("recipe", ["t5", "ul2", "bert", "decoders"])
def test_costs_of_objectives_sum_to_those_of_a_step(recipe: str) -> None:
    run = load_recipe(recipe)
    rows = {each.name: each for each in denoiser_tokens(run)}
    costs = objective_costs(run.model, run.data)
    assert [cost.name for cost in costs] == list(rows)
    step = sum(cost.flops * rows[cost.name].rows for cost in costs)
    assert step == pytest.approx(flops.training_flops(run), rel=1e-9)
    for cost in costs:
        assert cost.loss_tokens * rows[cost.name].rows == pytest.approx(rows[cost.name].loss_tokens)


def test_a_prefix_lm_learns_from_half_as_many_tokens_as_a_causal_lm() -> None:
    model = preset("llama_3:1b")
    costs = [cost for data in common_objectives(model, 512, 512) for cost in objective_costs(model, data)]
    by_name = {cost.name: cost for cost in costs}
    causal, prefix = by_name["causal LM"], by_name["prefix LM, uniform split"]
    parts = forward_flops_by_part(model, read_features(model, rows=1, source=0, target=1024))
    assert causal.flops == 3 * sum(parts.values())
    # A prefix of s tokens adds s (s - 1) / 2 pairs: on average a third of the causal pairs.
    assert prefix.flops - causal.flops == pytest.approx(3 * parts["decoder scores"] / 3, rel=0.01)
    assert causal.loss_tokens == 1024
    assert prefix.loss_tokens / causal.loss_tokens == pytest.approx(0.5, abs=0.01)


def _best_bandwidth(bytes_read: int) -> float:
    """Return the most bytes per second at which threads of this process read as much memory, twice in a row."""
    best, times = 0.0, 2
    cores = os.cpu_count() or 1

    def read(part: np.ndarray) -> None:
        for _ in range(times):
            part @ part

    for threads in {1, 2, -(-cores // 2), cores}:
        parts = np.array_split(np.ones(bytes_read // 4, np.float32), threads)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            # Many short measurements: other work on the machine disturbs some of them.
            for _ in range(12):
                start = time.perf_counter()
                list(pool.map(read, parts))
                best = max(best, times * bytes_read / (time.perf_counter() - start))
    return best


def test_no_decoding_step_is_faster_than_the_bound_of_the_measured_bandwidth() -> None:
    config = small_run("llama_3", width=512, layers=3, attention="reference", dtype="float32").model
    spec = abstract_model(config)
    graphdef, shapes, _ = inference_layout.abstract_layout(spec.graphdef, spec.params, fuse=True)
    # Written and not zeros: pages of zeros may share their memory.
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes)
    cache = bind_params(graphdef, params).init_cache(1, 64)
    step = jax.jit(lambda params, tokens, cache: bind_params(graphdef, params).decode(tokens, cache))
    tokens = jnp.zeros((1, 1), jnp.int32)
    jax.block_until_ready(step(params, tokens, cache))
    weights = int(decoding_kernels(config) * 4)
    bandwidth, fastest = 0.0, math.inf
    # Other work on the machine makes its memory look slower than it is, so up to 15 rounds are measured.
    for _ in range(15):
        bandwidth = max(bandwidth, _best_bandwidth(weights))
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(step(params, tokens, cache))
            fastest = min(fastest, time.perf_counter() - start)
        if fastest >= weights / bandwidth:
            break
    # The peak of this CPU is not known: only the memory bounds.
    measured = dataclasses.replace(CPU, flops_per_second=1e30, hbm_bytes_per_second=bandwidth)
    inference = Inference(config, Topology(measured, (1,)), prompt=0, answer=1, dtype="float32", cache_dtype="float32")
    least = inference.seconds(inference.step(1))
    assert least == pytest.approx(weights / bandwidth, rel=0.01)
    assert fastest >= least
