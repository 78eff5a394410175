"""Counts of a plan without devices: parameters, caches, tokens, and the compute-optimal model of a budget."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers.planning_runs import FAMILIES, small_run

from t5x_like.config import DataConfig, RunConfig, ShardingConfig, ul2
from t5x_like.config.batch_spec import rows_per_sub_batch
from t5x_like.config.recipes import load_recipe
from t5x_like.hardware.fake_devices import fake_devices
from t5x_like.hardware.topologies import parse_topology
from t5x_like.models import presets
from t5x_like.models.model import Model
from t5x_like.planning.estimate import flops
from t5x_like.planning.estimate.kv_cache_bytes import cache_bytes, cache_per_token
from t5x_like.planning.estimate.parameters import cross_attention_share, model_parts, parameter_parts, total
from t5x_like.planning.estimate.scaling_laws import BESIROGLU, HOFFMANN, compute_optimal, tokens_for
from t5x_like.planning.estimate.tokens import denoiser_tokens, token_positions, tokens_per_step
from t5x_like.planning.sharding_table import activation_shardings, parameter_shardings
from t5x_like.program import Program, build_program


def fake_program(run: RunConfig, topology: str = "v5e:2x2") -> Program:
    return build_program(run, fake_devices(parse_topology(topology)))


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_sum_to_all_parameters_and_name_the_stacks(family: str) -> None:
    run = small_run(family)
    program = fake_program(run)
    parts = parameter_parts(program)
    assert total(parts).count == sum(leaf.size for leaf in jax.tree.leaves(program.spec.params))
    assert total(parts).bytes_per_device == sum(row.bytes_per_device for row in parameter_shardings(program))
    has_cross = run.model.architecture == "encoder_decoder"
    assert (cross_attention_share(parts) > 0) == has_cross == ("decoder cross-attention" in parts)


def test_padding_of_the_vocabulary_is_executed_and_not_used() -> None:
    plain = small_run("llama_3")
    ids = plain.model.vocab_size - 3
    runs = [
        dataclasses.replace(plain, model=dataclasses.replace(plain.model, vocab_size=ids, pad_vocab_to_multiple_of=one))
        for one in (1, plain.model.vocab_size)
    ]
    whole, padded = (model_parts(run.model) for run in runs)
    padding = padded.pop("vocabulary padding")
    assert padded == whole
    rows = 1 if plain.model.tie_embeddings else 2
    assert (padding.count, padding.active) == (3 * rows * plain.model.lm_head_width, 0)
    assert flops.training_flops(runs[0]) == flops.training_flops(runs[1])
    # As many as with a token for each row.
    assert flops.executed_flops(runs[1]) == flops.executed_flops(plain) > flops.executed_flops(runs[0])


def test_active_parameters_are_those_of_the_chosen_experts() -> None:
    parts = parameter_parts(fake_program(small_run("mixtral", rows=4)))
    assert parts["decoder experts"].active * 2 == parts["decoder experts"].count
    assert parts["decoder attention"].active == parts["decoder attention"].count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("bert", "modernbert")])
def test_cache_bytes_equal_the_allocated_cache(family: str, dtype: str) -> None:
    config = small_run(family).model
    model = nnx.eval_shape(lambda: Model(config, nnx.Rngs(params=0)))
    source = 24 if config.encoder is not None else 0

    def allocated(length: int, step: int) -> int:
        cache = jax.eval_shape(
            lambda: model.init_cache(3, length, encoder_length=source, widest_step=step, dtype=jnp.dtype(dtype))
        )
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    for length, step in ((8, 1), (100, 1), (100, 5)):
        counted = cache_bytes(config, rows=3, length=length, encoder_length=source, widest_step=step, dtype=dtype)
        assert counted == allocated(length, step)
    per = cache_per_token(config, dtype)
    assert allocated(101, 1) - allocated(100, 1) == 3 * per.per_token


@pytest.mark.parametrize(
    ("config", "per_token", "per_source_token"),
    [
        (presets.llama_3("70b"), 327_680, 0),
        (presets.llama_3("8b"), 131_072, 0),
        (dataclasses.replace(presets.t5_1_1("xxl"), dtype="bfloat16"), 393_216, 393_216),
        (dataclasses.replace(presets.ul2_20b(), dtype="bfloat16"), 524_288, 524_288),
    ],
)
def test_cache_of_known_models(config, per_token: int, per_source_token: int) -> None:
    found = cache_per_token(config)
    assert (found.per_token, found.window, found.per_source_token) == (per_token, 0, per_source_token)


def test_local_layers_cache_their_window_only() -> None:
    config = presets.gemma_2("2b")
    found = cache_per_token(config)
    everywhere = 2 * 26 * 4 * 256 * 2
    assert found.per_token == everywhere // 2
    assert found.window == everywhere // 2 * (config.decoder.sliding_window[0] + 1)


@pytest.mark.parametrize(
    ("flops", "fit", "billions", "ratio", "loss"),
    [
        (1e18, HOFFMANN, 0.0806, 26, 3.535),
        (1e18, BESIROGLU, 0.0805, 26, 3.490),
        (1e20, HOFFMANN, 0.645, 40, 2.600),
        (1e20, BESIROGLU, 0.853, 23, 2.553),
        (5.76e23, HOFFMANN, 32, 93, 1.931),
        (5.76e23, BESIROGLU, 72, 18, 1.974),
    ],
)
def test_compute_optimal_by_both_fits(flops: float, fit, billions: float, ratio: float, loss: float) -> None:
    optimum = compute_optimal(flops, fit)
    assert optimum.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert optimum.tokens_per_parameter == pytest.approx(ratio, rel=0.03)
    assert optimum.loss == pytest.approx(loss, abs=5e-4)
    assert 6 * optimum.parameters * optimum.tokens == pytest.approx(flops)
    # The optimum is a minimum: slightly more parameters and fewer tokens, or the opposite, have a larger loss.
    for factor in (0.9, 1.1):
        assert fit.loss(optimum.parameters * factor, optimum.tokens / factor) > optimum.loss
    assert tokens_for(optimum.parameters, fit) == pytest.approx(optimum.tokens)


def test_rows_of_all_denoisers_sum_to_the_rows_of_a_step() -> None:
    run = load_recipe("configs/runs/ul2.py")
    found = denoiser_tokens(run)
    assert [each.name for each in found] == [objective.name for objective in run.data.mixture]
    by_sub_batch = rows_per_sub_batch(run.data, run.training.global_batch_size)
    for name, rows in by_sub_batch.items():
        assert sum(each.rows for each in found if each.sub_batch == name) == pytest.approx(rows)
    assert sum(each.rows for each in found) == pytest.approx(run.training.global_batch_size)
    positions = token_positions(run)
    assert tokens_per_step(run) == sum(positions.values())
    # Every loss token has a position in the decoder.
    assert 0.8 * positions["decoder"] < sum(each.loss_tokens for each in found) < positions["decoder"]


def test_loss_tokens_of_span_corruption_are_its_noise_and_sentinels() -> None:
    run = load_recipe("configs/runs/t5.py")
    (found,) = denoiser_tokens(run)
    # T5: 568 raw tokens become 512 inputs and 114 targets, all of which have a loss.
    assert found.rows == run.training.global_batch_size
    assert (found.raw_tokens, found.loss_tokens) == (568 * found.rows, 114 * found.rows)


def test_rows_are_shared_by_corpora_in_proportion_to_their_rates() -> None:
    data: DataConfig = small_run("llama_3").data
    from t5x_like.config import CausalLM, CorpusShareConfig
    from t5x_like.config.corpus import CorpusConfig

    shares = (
        CorpusShareConfig(name="a", corpus=CorpusConfig(files=("a",)), rate=3.0, mixture=(CausalLM(name="x"),)),
        CorpusShareConfig(name="b", corpus=CorpusConfig(files=("b",)), rate=1.0, mixture=(CausalLM(name="y"),)),
    )
    run = small_run("llama_3")
    run = dataclasses.replace(run, data=dataclasses.replace(data, corpora=shares, mixture=()))
    assert {each.name: each.rows for each in denoiser_tokens(run)} == {"x": 6, "y": 2}


def test_activation_table_lists_the_arrays_that_the_model_constrains() -> None:
    run = dataclasses.replace(small_run("t5_1_1", rows=16), sharding=ShardingConfig(tensor=2))
    rows = activation_shardings(fake_program(run, "v5e:2x4"))
    logits = next(row for row in rows if row.name.startswith("LMHead"))
    assert logits.axes == "batch, length, vocab"
    assert logits.spec == "(fsdp, -, tensor)"
    assert logits.bytes_per_device == math.prod(logits.shape) * 4 // 8
    assert {row.name.split(".")[0] for row in rows} >= {"Attention", "Block", "Mlp", "LMHead"}


def test_ul2_has_seven_denoisers() -> None:
    run = dataclasses.replace(load_recipe("configs/runs/smoke.py"))
    assert len(denoiser_tokens(run)) == len(ul2()) == 7
