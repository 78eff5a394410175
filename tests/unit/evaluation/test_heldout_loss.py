"""Held-out scores: a uniform model against the exact values, and baselines against direct computation."""

import collections
import copy
import dataclasses
import functools
import json
import lzma
import math
import zlib

import jax
import numpy as np
import pytest
from helpers.data_examples import data_config, text_store

from t5x_like.config import ModelConfig, RunConfig, ShardingConfig, StackConfig, TrainingConfig
from t5x_like.data.store.token_store import Split, Store
from t5x_like.data.stream import heldout
from t5x_like.evaluation import compression_baselines, results_store
from t5x_like.evaluation.console_tables import result_tables
from t5x_like.evaluation.decoded_samples import decode_samples
from t5x_like.evaluation.heldout_loss import evaluate_held_out, held_out_rows
from t5x_like.evaluation.per_example_loss import held_out_intervals
from t5x_like.program import Program, build_program
from t5x_like.utils.jsonl import read_records

VOCABULARY = 336
TRAIN = ["the cat sat on the mat. " * 60, "naïve café, größer: ✓ " * 20]
HELD_OUT = ["a dog ran to the cat; " * 30, "größer ✓ " * 30, *["so it ends."] * 40]
LAYOUTS = ["encoder_decoder", "prefix_lm", "causal_lm", "encoder"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return text_store(tmp_path_factory.mktemp("store") / "texts", TRAIN, HELD_OUT)


@functools.cache
def program_for(layout: str, fsdp: int = 1, tensor: int = 1) -> Program:
    stack = StackConfig(num_layers=2, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64)
    run = RunConfig(
        name="tiny",
        model=ModelConfig(
            encoder=stack if layout in ("encoder_decoder", "encoder") else None,
            decoder=None if layout == "encoder" else stack,
            vocab_size=VOCABULARY,
        ),
        data=data_config(layout),
        training=TrainingConfig(num_train_steps=1, global_batch_size=8),
        sharding=ShardingConfig(fsdp=fsdp, tensor=tensor),
    )
    return build_program(run, jax.devices()[: fsdp * tensor])


def random_params(program: Program, head: float = 0.3):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), program.spec.params)
    params["head"]["kernel"] *= head / 0.3
    return params


def placed(program: Program, params):
    return jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_params))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uniform_model_has_the_exact_loss(store, layout):
    """Uniform logits: ln V per token, and log2 V times tokens over bytes per byte."""
    program = program_for(layout)
    result = evaluate_held_out(
        program, placed(program, random_params(program, head=0.0)), [store], step=5, num_batches=3
    )
    assert result["step"] == 5
    data = program.run.data
    for objective in data.mixture:
        batches = list(heldout.objective_batches(store, data, data.sources[0], 8, objective, 3))
        weights = next(name for name in batches[0]["main"] if name.endswith("loss_weights"))
        scores = result["objectives"][objective.name]
        assert scores["tokens"] == sum(batch["main"][weights].sum() for batch in batches) > 0
        assert scores["loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-5)
    if layout == "encoder":
        windows = list(heldout.bound_batches(store, data, 8, 3))
        texts = [text for window in windows for text in window.texts]
        num_tokens, num_bytes = sum(window.tokens_NxT.size for window in windows), sum(map(len, texts))
        assert num_tokens == 24 * len(texts) > num_bytes > 200
        assert result["prefix_lm"] is None and result["baselines"]["gzip_bits_per_byte"] > 0
        assert result["diffusion_bound"] == {
            "loss_per_token": pytest.approx(math.log(VOCABULARY), rel=1e-5),
            "bits_per_byte": pytest.approx(math.log2(VOCABULARY) * num_tokens / num_bytes, rel=1e-5),
            "bytes": num_bytes,
        }
        # The title and the row name it a bound, and `compare` does not take it for exact bits per byte.
        cells = [cell for table in result_tables(result) for column in table.columns for cell in column.cells]
        assert any("upper bound" in cell for cell in cells)
        assert {"bits_per_byte_bound"} == {name for name in results_store.scalars(result) if "bits" in name}
        return
    scored = list(heldout.prefix_lm_batches(store, program.run.data, 8, 3))
    num_tokens, num_bytes = sum(len(batch.tokens) for batch in scored), sum(len(batch.text) for batch in scored)
    assert num_tokens > num_bytes > 500  # EOS has no byte
    assert result["prefix_lm"] == {
        "loss_per_token": pytest.approx(math.log(VOCABULARY), rel=1e-5),
        "bits_per_byte": pytest.approx(math.log2(VOCABULARY) * num_tokens / num_bytes, rel=1e-5),
        "bytes": num_bytes,
    }
    assert program.eval_step._cache_size() == 1, "all batches must have the shapes of training"


def test_metrics_of_the_model_are_among_the_scores(store):
    """A discriminator that knows nothing pays ln 2 per token and calls none replaced; a generator with flat logits
    hits one token in V."""
    run = program_for("encoder").run
    model = dataclasses.replace(run.model, generator=dataclasses.replace(run.model.encoder, d_model=16))
    program = build_program(dataclasses.replace(run, model=model), jax.devices()[:1])
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), program.spec.params)
    result = evaluate_held_out(program, placed(program, params), [store], step=5, num_batches=3)
    (scores,) = result["objectives"].values()
    assert scores["loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-5)
    assert scores["discriminator/loss"] == pytest.approx(math.log(2), rel=1e-5)
    data = program.run.data
    batches = heldout.objective_batches(store, data, data.sources[0], 8, data.mixture[0], 3)
    present = sum((batch["main"]["encoder_input_tokens"] != 0).sum() for batch in batches)
    assert 0.9 * scores["tokens"] <= scores["discriminator/replaced"] * present <= scores["tokens"]
    assert scores["discriminator/accuracy"] == pytest.approx(1 - scores["discriminator/replaced"], rel=1e-6)
    assert scores["discriminator/recall"] == 0 and math.isnan(scores["discriminator/precision"])
    columns = [column.header for table in result_tables(result) for column in table.columns]
    own = ["objective", "loss", "perplexity", "accuracy", "tokens", "objective", "metric", "mean"]
    assert columns == [*own, "code", "bits"]


def test_scores_count_each_token_once(store):
    """Loss and accuracy of one objective, from the model's logits row by row."""
    program = program_for("prefix_lm")
    params = random_params(program)
    loss = right = tokens = 0.0
    logits_of = jax.jit(lambda batch: program.model(params)(batch))
    data = program.run.data
    for batch in heldout.objective_batches(store, data, data.sources[0], 8, data.mixture[0], 2):
        features = batch["main"]
        logits = np.asarray(logits_of(features), np.float64)
        for row, column in np.argwhere(features["decoder_loss_weights"]):
            scores, target = logits[row, column], features["decoder_target_tokens"][row, column]
            loss += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target]
            right += scores.argmax() == target
            tokens += 1
    result = evaluate_held_out(program, placed(program, params), [store], step=0, num_batches=2)
    found = result["objectives"]["R_3_0.15"]
    assert found["tokens"] == tokens
    assert found["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    # The rows add up to these scores.
    rows = held_out_rows(program, placed(program, params), [store], num_batches=2)
    assert {row["objective"] for row in rows} == {*result["objectives"], "prefix_lm"}
    for name in ("R_3_0.15", "prefix_lm"):
        own = [row for row in rows if row["objective"] == name]
        mean = sum(row["loss"] for row in own) / sum(row["tokens"] for row in own)
        wanted = found["loss"] if name != "prefix_lm" else result["prefix_lm"]["loss_per_token"]
        assert mean == pytest.approx(wanted, rel=1e-5)
    assert sum(row["bytes"] for row in rows if row["objective"] == "prefix_lm") == result["prefix_lm"]["bytes"]
    assert found["loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert found["accuracy"] == pytest.approx(right / tokens, rel=1e-6)
    assert sum(row["correct"] for row in rows if row["objective"] == "R_3_0.15") == right


def test_windows_are_bounded_at_a_grid_of_masked_counts(store):
    """The first half is given; each quarter of 1..n has one count per window, and all counts occur alike."""
    data = program_for("encoder").run.data
    mask = store.vocabulary.mask_id
    counts = []
    for window in heldout.bound_batches(store, data, 8, 3):
        rows, weights = len(window.texts), 0.0
        assert len(window.batches) == heldout.BOUND_GRID
        for part, batch in enumerate(window.batches):
            features = {name: values[:rows] for name, values in batch["main"].items()}
            masked = features["encoder_input_tokens"] == mask
            assert np.array_equal(masked, features["encoder_loss_weights"] > 0) and not masked[:, :24].any()
            assert np.array_equal(features["encoder_target_tokens"][:, 24:], window.tokens_NxT)
            counts += masked.sum(axis=1).tolist()
            assert ((masked.sum(axis=1) - 1) // 6 == part).all()
            weights = weights + features["encoder_loss_weights"].sum(axis=1)
        assert weights == pytest.approx(24.0, rel=1e-5)
    occurrences = np.bincount(counts, minlength=25)[1:]
    assert occurrences.max() - occurrences.min() <= 3 and occurrences.min() >= 1


def test_bounds_of_windows_are_the_weighted_losses_of_their_masked_tokens(store):
    program = program_for("encoder")
    params = random_params(program)
    logits_of = jax.jit(lambda batch: program.model(params)(batch))
    expected, tokens = [], 0
    for window in heldout.bound_batches(store, program.run.data, 8, 2):
        losses = np.zeros(8)
        for batch in window.batches:
            features = batch["main"]
            logits = np.asarray(logits_of(features), np.float64)
            targets = np.take_along_axis(logits, features["encoder_target_tokens"][..., None], axis=-1)[..., 0]
            nats = np.log(np.exp(logits - logits.max()).sum(axis=-1)) + logits.max() - targets
            losses += (nats * features["encoder_loss_weights"]).sum(axis=1)
        expected += losses[: len(window.texts)].tolist()
        tokens += window.tokens_NxT.size
    rows = held_out_rows(program, placed(program, params), [store], num_batches=2)
    own = [row for row in rows if row["objective"] == "diffusion_bound"]
    assert [row["loss"] for row in own] == pytest.approx(expected, rel=1e-4)
    result = evaluate_held_out(program, placed(program, params), [store], step=0, num_batches=2)
    assert result["diffusion_bound"]["loss_per_token"] == pytest.approx(sum(expected) / tokens, rel=1e-4)
    assert {"loss/masked_lm", "accuracy/masked_lm", "bits_per_byte_bound"} == set(held_out_intervals(rows))


@pytest.mark.slow
def test_sharded_parameters_have_the_same_scores(store):
    one, many = program_for("encoder_decoder"), program_for("encoder_decoder", fsdp=2, tensor=2)
    params = random_params(one)
    sharded = placed(many, params)
    assert len(sharded["head"]["kernel"].sharding.device_set) == 4
    assert sharded["head"]["kernel"].addressable_shards[0].data.size == params["head"]["kernel"].size // 4
    expected = evaluate_held_out(one, placed(one, params), [store], step=0, num_batches=1)
    found = evaluate_held_out(many, sharded, [store], step=0, num_batches=1)
    for name, scores in expected["objectives"].items():
        assert found["objectives"][name] == pytest.approx(scores, rel=1e-4)
    assert found["prefix_lm"] == pytest.approx(expected["prefix_lm"], rel=1e-4)
    assert decode_samples(many, sharded, [store], count=1) == decode_samples(one, placed(one, params), [store], count=1)


def test_baselines_are_computed_on_the_scored_bytes(store):
    program = program_for("causal_lm")
    found = evaluate_held_out(program, placed(program, random_params(program)), [store], step=0, num_batches=2)[
        "baselines"
    ]
    scored = list(heldout.prefix_lm_batches(store, program.run.data, 8, 2))
    text = b"".join(batch.text for batch in scored)

    train = store.split("train")
    counts = collections.Counter(train.tokens(0, train.num_tokens).tolist())
    total = sum(counts.values()) + store.vocabulary.vocab_size
    tokens = [token for batch in scored for token in batch.tokens.tolist()]
    bits = sum(-math.log2((counts[token] + 1) / total) for token in tokens)
    assert found["unigram_bits_per_byte"] == pytest.approx(bits / len(text))

    bytes_seen = collections.Counter(text)
    entropy = sum(-count / len(text) * math.log2(count / len(text)) for count in bytes_seen.values())
    assert found["byte_entropy_bits_per_byte"] == pytest.approx(entropy)

    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    assert found["gzip_bits_per_byte"] == 8 * len(compressor.compress(text) + compressor.flush()) / len(text)
    xz = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    assert found["lzma_bits_per_byte"] == 8 * len(xz.compress(text) + xz.flush()) / len(text)


def test_baselines_of_extreme_texts():
    assert compression_baselines.byte_entropy(bytes(range(256)) * 4) == 8.0
    assert compression_baselines.byte_entropy(b"aaaa") == 0.0
    noise = np.random.default_rng(0).bytes(10_000)
    assert 8.0 < compression_baselines.gzip_bits_per_byte(noise) < 8.1
    assert 8.0 < compression_baselines.lzma_bits_per_byte(noise) < 8.2
    assert compression_baselines.gzip_bits_per_byte(b"ab" * 5_000) < 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_have_inputs_targets_and_prediction(tmp_path, layout):
    text = "".join(f"sentence {number} of some more than any window has. " for number in range(90))
    store = text_store(tmp_path / "plain", TRAIN, [text])
    program = program_for(layout)
    data = program.run.data
    found = decode_samples(program, placed(program, random_params(program)), [store], count=2)
    each = 1 if len(data.mixture) > 1 else 2
    assert [sample["denoiser"] for sample in found] == [o.name for o in data.mixture for _ in range(each)]
    for sample in found:
        assert set(sample) == {"denoiser", "inputs", "targets", "prediction"}
        mode = sample["denoiser"].split("_")[0]
        if layout in ("encoder_decoder", "prefix_lm"):
            assert sample["inputs"].startswith(f"[{mode}]")
        if mode in ("causal", "S"):
            given = sample["inputs"].removeprefix("[S]") + sample["targets"]
            assert given in text and "<extra_id" not in sample["prediction"]
        else:
            assert "<extra_id_0>" in sample["inputs"] and sample["targets"].count("<extra_id_0>") == 1
            assert put_back(sample["inputs"].removeprefix(f"[{mode}]"), sample["targets"]) in text
        if layout == "encoder":
            assert sample["prediction"].count("<extra_id_") == sample["targets"].count("<extra_id_")
    assert decode_samples(program, placed(program, random_params(program)), [store], count=0) == []


def put_back(inputs: str, targets: str) -> str:
    """Return the inputs with every sentinel replaced by its span."""
    for part in targets.split("<extra_id_")[1:]:
        number, span = part.split(">", 1)
        inputs = inputs.replace(f"<extra_id_{number}>", span)
    return inputs


def test_each_step_is_recorded_once_and_in_order(tmp_path):
    for step, loss in ((300, 3.0), (600, 2.0), (300, 2.5), (450, float("nan"))):
        newest = results_store.record(tmp_path, {"step": step, "objectives": {"a": {"loss": loss}}})
    assert newest == 600
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 9')  # an incomplete line, as after a kill
    results_store.record(tmp_path, {"step": 900, "objectives": {}})
    found, unreadable, gaps = read_records(tmp_path / "evaluations.jsonl")
    assert (unreadable, gaps) == (0, [])
    assert [record["step"] for record in found] == [300, 450, 600, 900]
    assert found[0]["objectives"] == {"a": {"loss": 2.5}}


def test_scores_of_a_step_from_two_processes_are_merged(tmp_path):
    """Training records held-out scores, and a process that follows the run a Task: the step has both."""
    results_store.record(tmp_path, {"step": 3, "objectives": {"a": {"loss": 1.0}}, "prefix_lm": None})
    assert results_store.is_evaluated(tmp_path, 3) and not results_store.is_evaluated(tmp_path, 3, ("squad",))
    results_store.record(
        tmp_path, {"step": 3, "tasks": {"squad_v1": {"em": 2.0, "examples": 9}}, "task_sets": ["squad"]}
    )
    results_store.record(tmp_path, {"step": 3, "tasks": {"sst2": {"accuracy": 5.0}}, "task_sets": ["glue"]})
    assert results_store.is_evaluated(tmp_path, 3, ("squad", "glue")) and not results_store.is_evaluated(tmp_path, 4)
    only = results_store.read_evaluations(tmp_path)[3]
    assert results_store.scalars(only) == {"loss/a": 1.0, "squad_v1/em": 2.0, "sst2/accuracy": 5.0}
    assert json.loads((tmp_path / "evaluation.json").read_text()) == only


def test_evaluation_reads_no_text_of_the_training_split(store, monkeypatch):
    """The training split is recorded as having 10**12 tokens, too many to read."""
    info = copy.deepcopy(store.info)
    info["splits"]["train"]["tokens"] = info["arrays"]["train/tokens"]["size"] = 10**12
    huge = Store(store.path, info)
    read = []
    for name in ("tokens", "gather"):
        method = getattr(Split, name)

        def recorded(split, *arguments, method=method):
            read.append(split.name)
            return method(split, *arguments)

        monkeypatch.setattr(Split, name, recorded)
    program = program_for("causal_lm")
    params = placed(program, random_params(program))
    scores = [evaluate_held_out(program, params, [found], step=1, num_batches=1) for found in (huge, store)]
    assert set(read) == {"validation"}
    assert scores[0] == scores[1] and scores[0]["baselines"]["unigram_bits_per_byte"] > 0
