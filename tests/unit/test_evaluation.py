"""Held-out scores: what a model without knowledge must get, and baselines against direct computation."""

import collections
import dataclasses
import functools
import json
import lzma
import math
import zlib

import jax
import numpy as np
import pytest
from data_examples import data_config, text_store

from t5x_like.config import ModelConfig, PartitioningConfig, RunConfig, StackConfig, TrainingConfig
from t5x_like.data import validation
from t5x_like.evaluation import baselines, records
from t5x_like.evaluation.evaluator import evaluate, held_out_rows
from t5x_like.evaluation.samples import decode_samples
from t5x_like.evaluation.tables import tables
from t5x_like.monitoring.records import read_records
from t5x_like.program import Program, assemble

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
        training=TrainingConfig(num_train_steps=1, batch_size=8),
        partitioning=PartitioningConfig(fsdp=fsdp, tensor=tensor),
    )
    return assemble(run, jax.devices()[: fsdp * tensor])


def random_params(program: Program, head: float = 0.3):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), program.spec.params)
    params["head"]["kernel"] *= head / 0.3
    return params


def placed(program: Program, params):
    return jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_params))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_that_knows_nothing_pays_for_every_token_alike(store, layout):
    """Uniform logits: ln V per token, and log2 V times tokens over bytes per byte."""
    program = program_for(layout)
    result = evaluate(program, placed(program, random_params(program, head=0.0)), [store], step=5, num_batches=3)
    assert result["step"] == 5
    data = program.run.data
    for objective in data.mixture:
        batches = list(validation.objective_batches(store, data, data.sources[0], 8, objective, 3))
        weights = next(name for name in batches[0]["main"] if name.endswith("loss_weights"))
        scores = result["objectives"][objective.name]
        assert scores["tokens"] == sum(batch["main"][weights].sum() for batch in batches) > 0
        assert scores["loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-5)
    if layout == "encoder":
        assert result["prefix_lm"] is None and result["baselines"] is None
        return
    scored = list(validation.prefix_lm_batches(store, program.run.data, 8, 3))
    num_tokens, num_bytes = sum(len(batch.tokens) for batch in scored), sum(len(batch.text) for batch in scored)
    assert num_tokens > num_bytes > 500  # EOS has no byte
    assert result["prefix_lm"] == {
        "loss_per_token": pytest.approx(math.log(VOCABULARY), rel=1e-5),
        "bits_per_byte": pytest.approx(math.log2(VOCABULARY) * num_tokens / num_bytes, rel=1e-5),
        "bytes": num_bytes,
    }
    assert program.eval_step._cache_size() == 1, "all batches have the shapes of training"


def test_what_the_model_reports_of_itself_is_among_the_scores(store):
    """A discriminator that knows nothing pays ln 2 per token and calls none replaced; a generator with flat logits
    hits one token in V."""
    run = program_for("encoder").run
    model = dataclasses.replace(run.model, generator=dataclasses.replace(run.model.encoder, d_model=16))
    program = assemble(dataclasses.replace(run, model=model), jax.devices()[:1])
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), program.spec.params)
    result = evaluate(program, placed(program, params), [store], step=5, num_batches=3)
    (scores,) = result["objectives"].values()
    assert scores["loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-5)
    assert scores["discriminator/loss"] == pytest.approx(math.log(2), rel=1e-5)
    data = program.run.data
    batches = validation.objective_batches(store, data, data.sources[0], 8, data.mixture[0], 3)
    present = sum((batch["main"]["encoder_input_tokens"] != 0).sum() for batch in batches)
    assert 0.9 * scores["tokens"] <= scores["discriminator/replaced"] * present <= scores["tokens"]
    assert scores["discriminator/accuracy"] == pytest.approx(1 - scores["discriminator/replaced"], rel=1e-6)
    assert scores["discriminator/recall"] == 0 and math.isnan(scores["discriminator/precision"])
    columns = [column.header for table in tables(result) for column in table.columns]
    assert columns == ["objective", "loss", "perplexity", "accuracy", "tokens", "objective", "metric", "mean"]


def test_scores_are_of_each_token_once(store):
    """Loss and accuracy of one objective, from the model's logits row by row."""
    program = program_for("prefix_lm")
    params = random_params(program)
    loss = right = tokens = 0.0
    logits_of = jax.jit(lambda batch: program.model(params)(batch))
    data = program.run.data
    for batch in validation.objective_batches(store, data, data.sources[0], 8, data.mixture[0], 2):
        features = batch["main"]
        logits = np.asarray(logits_of(features), np.float64)
        for row, column in np.argwhere(features["decoder_loss_weights"]):
            scores, target = logits[row, column], features["decoder_target_tokens"][row, column]
            loss += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target]
            right += scores.argmax() == target
            tokens += 1
    result = evaluate(program, placed(program, params), [store], step=0, num_batches=2)
    found = result["objectives"]["R_3_0.15"]
    assert found["tokens"] == tokens
    assert found["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    # The rows behind these numbers add up to them.
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


def test_split_parameters_get_the_same_scores(store):
    one, many = program_for("encoder_decoder"), program_for("encoder_decoder", fsdp=2, tensor=2)
    params = random_params(one)
    sharded = placed(many, params)
    assert len(sharded["head"]["kernel"].sharding.device_set) == 4
    assert sharded["head"]["kernel"].addressable_shards[0].data.size == params["head"]["kernel"].size // 4
    expected = evaluate(one, placed(one, params), [store], step=0, num_batches=1)
    found = evaluate(many, sharded, [store], step=0, num_batches=1)
    for name, scores in expected["objectives"].items():
        assert found["objectives"][name] == pytest.approx(scores, rel=1e-4)
    assert found["prefix_lm"] == pytest.approx(expected["prefix_lm"], rel=1e-4)
    assert decode_samples(many, sharded, [store], count=1) == decode_samples(one, placed(one, params), [store], count=1)


def test_baselines_are_of_the_scored_bytes(store):
    program = program_for("causal_lm")
    found = evaluate(program, placed(program, random_params(program)), [store], step=0, num_batches=2)["baselines"]
    scored = list(validation.prefix_lm_batches(store, program.run.data, 8, 2))
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
    assert baselines.byte_entropy(bytes(range(256)) * 4) == 8.0
    assert baselines.byte_entropy(b"aaaa") == 0.0
    noise = np.random.default_rng(0).bytes(10_000)
    assert 8.0 < baselines.gzip_bits_per_byte(noise) < 8.1
    assert 8.0 < baselines.lzma_bits_per_byte(noise) < 8.2
    assert baselines.gzip_bits_per_byte(b"ab" * 5_000) < 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_show_inputs_targets_and_prediction(tmp_path, layout):
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
    """The inputs with every sentinel replaced by its span."""
    for part in targets.split("<extra_id_")[1:]:
        number, span = part.split(">", 1)
        inputs = inputs.replace(f"<extra_id_{number}>", span)
    return inputs


def test_scores_of_a_step_are_kept_once_and_in_order(tmp_path):
    for step, loss in ((300, 3.0), (600, 2.0), (300, 2.5), (450, float("nan"))):
        newest = records.record(tmp_path, {"step": step, "objectives": {"a": {"loss": loss}}})
    assert newest == 600
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 9')  # what a kill leaves
    records.record(tmp_path, {"step": 900, "objectives": {}})
    found, unreadable = read_records(tmp_path / "evaluations.jsonl")
    assert unreadable == 0
    assert [record["step"] for record in found] == [300, 450, 600, 900]
    assert found[0]["objectives"] == {"a": {"loss": 2.5}}


def test_scores_of_a_step_from_two_processes_are_merged(tmp_path):
    """Training scores held-out text, a process that follows it a Task: the step has both."""
    records.record(tmp_path, {"step": 3, "objectives": {"a": {"loss": 1.0}}, "prefix_lm": None})
    assert records.is_evaluated(tmp_path, 3) and not records.is_evaluated(tmp_path, 3, ("squad",))
    records.record(tmp_path, {"step": 3, "tasks": {"squad_v1": {"em": 2.0, "examples": 9}}, "task_sets": ["squad"]})
    records.record(tmp_path, {"step": 3, "tasks": {"sst2": {"accuracy": 5.0}}, "task_sets": ["glue"]})
    assert records.is_evaluated(tmp_path, 3, ("squad", "glue")) and not records.is_evaluated(tmp_path, 4)
    only = records.read_evaluations(tmp_path)[3]
    assert records.scalars(only) == {"loss/a": 1.0, "squad_v1/em": 2.0, "sst2/accuracy": 5.0}
    assert json.loads((tmp_path / "evaluation.json").read_text()) == only
