"""lm-evaluation-harness on local tasks of all three kinds, offline; its scores beside a direct computation."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="the extra harness is not installed; `make test-harness` installs it")

from t5x_like.checkpoints.manager import CheckpointManager  # noqa: E402
from t5x_like.cli import main  # noqa: E402
from t5x_like.config import (  # noqa: E402
    CausalLM,
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    ModelConfig,
    PrefixLM,
    RunConfig,
    SpanCorruption,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.serialization import to_json  # noqa: E402
from t5x_like.data.prepare import open_stores, prepare  # noqa: E402
from t5x_like.data.stream import Stream  # noqa: E402
from t5x_like.evaluation import harness  # noqa: E402
from t5x_like.models.build import merge  # noqa: E402
from t5x_like.program import assemble  # noqa: E402

pytestmark = pytest.mark.harness

WORDS = "red green blue yellow one two three four".split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    place = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for number in range(24):
        (place / f"{number}.txt").write_text(" ".join(rng.choice(WORDS, 90)))
    return place


@pytest.fixture(scope="module", params=["encoder_decoder", "prefix_lm", "causal_lm"])
def run_dir(request, texts, tmp_path_factory):
    """A run of random parameters, as `train` would leave it."""
    place = tmp_path_factory.mktemp(request.param)
    stack = StackConfig(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=48)
    spans = SpanCorruption(name="R", mean_noise_span_length=3.0, noise_density=0.15, mode="R")
    mixture = (CausalLM(),) if request.param == "causal_lm" else (spans, PrefixLM(name="S", mode="S"))
    run = RunConfig(
        name="random",
        model=ModelConfig(
            encoder=stack if request.param == "encoder_decoder" else None,
            decoder=dataclasses.replace(stack, relative_bias_bidirectional=request.param == "prefix_lm"),
            vocab_size=288,
        ),
        data=DataConfig(
            corpus=CorpusConfig(files=(str(texts / "*.txt"),), validation_fraction=0.4),
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=16),
            layout=request.param,
            mixture=mixture,
            inputs_length=48,
            targets_length=24,
            store=str(texts / "stores"),
        ),
        training=TrainingConfig(num_train_steps=1, batch_size=8),
    )
    prepare(run.data, report=lambda line: None)
    program = assemble(run, jax.devices())
    state = program.init()
    manager = CheckpointManager(place / "checkpoints", CheckpointConfig())
    data = {"rows": 0, "fingerprint": Stream(open_stores(run.data), run.data, 8).fingerprint}
    manager.save(1, state, {"data": data})
    manager.close()
    (place / "config.json").write_text(to_json(run))
    return place


def local_tasks(folder, name):
    """One task of each of lm-eval's kinds of output, over made-up rows."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(9):
        choices = [" " + " ".join(rng.choice(WORDS, 2)) for _ in range(3)]
        rows.append(
            {
                "question": " ".join(rng.choice(WORDS, 6)),
                "choices": choices,
                "label": int(rng.integers(3)),
                "text": " ".join(rng.choice(WORDS, int(rng.integers(3, 30)))),
            }
        )
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {json.dumps(str(data))}\ntest_split: test\n"
    )
    (folder / "choice.yaml").write_text(
        f"task: {name}_choice\n{common}output_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        'doc_to_target: label\ntarget_delimiter: ""\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n'
    )
    (folder / "generate.yaml").write_text(
        f"task: {name}_generate\n{common}output_type: generate_until\ndoc_to_text: question\ndoc_to_target: text\n"
        "generation_kwargs:\n  until: ['e']\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n"
    )
    (folder / "rolling.yaml").write_text(
        f"task: {name}_rolling\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
        "metric_list:\n  - metric: bits_per_byte\n  - metric: word_perplexity\n"
    )
    return rows


WIDTH = 96


@functools.cache
def forward(program):
    return jax.jit(lambda params, features: merge(program.spec.graphdef, params)(features))


def direct(model, inputs, targets):
    """(log-likelihood, is it greedy) by the model's forward pass on one row, and double precision from there on."""
    program, config = model._opened.program, model._opened.run.model
    if config.encoder is not None:
        batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": [0, *targets[:-1]]}
        first = 0
    else:
        batch = {"decoder_input_tokens": [0, *inputs, *targets[:-1]]}
        first = len(inputs)
    batch |= {name.replace("input_tokens", "segment_ids"): [1] * len(row) for name, row in batch.items()}
    if model._text.form.bidirectional and config.encoder is None:
        batch["decoder_causal_attention"] = [1] * (first + 1)
    features = {name: np.array([[*row, *[0] * (WIDTH - len(row))]], np.int32) for name, row in batch.items()}
    logits = np.asarray(forward(program)(model._params, features), np.float64)[0, first : first + len(targets)]
    best = logits.max(-1, keepdims=True)
    log_p = logits - best - np.log(np.exp(logits - best).sum(-1, keepdims=True))
    return sum(log_p[place, target] for place, target in enumerate(targets)), list(logits.argmax(-1)) == list(targets)


def test_all_three_kinds_offline_and_equal_to_a_direct_computation(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = local_tasks(tmp_path, "local")
    output = tmp_path / "results.json"
    tasks = "local_choice,local_generate,local_rolling"
    arguments = ["harness", str(run_dir), "--tasks", tasks, "--include-path", str(tmp_path), "--output", str(output)]
    assert main(arguments) == 0
    results = json.loads(output.read_text())["results"]

    model = harness.T5xLikeLM(str(run_dir), cache="no")
    text = model._text
    right = right_norm = 0
    for row in rows:
        scores = [direct(model, *text.pair(row["question"], choice))[0] for choice in row["choices"]]
        right += int(np.argmax(scores)) == row["label"]
        lengths = [len(choice) for choice in row["choices"]]
        right_norm += int(np.argmax(np.divide(scores, lengths))) == row["label"]
    assert results["local_choice"]["acc,none"] == pytest.approx(right / len(rows))
    assert results["local_choice"]["acc_norm,none"] == pytest.approx(right_norm / len(rows))

    total = sum(direct(model, *window)[0] for row in rows for window in text.rolling(row["text"]))
    size = sum(len(row["text"].encode()) for row in rows)
    assert results["local_rolling"]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-4)

    said = model._continue([rows[0]["question"]], {"until": ["e"], "max_gen_toks": 6})
    assert "e" not in said[0] and len(said[0].encode("utf-8", "replace")) <= 6 * 3

    # Again: everything is known, and nothing is asked of the model.
    monkeypatch.setattr(harness, "score_tokens", lambda *_, **__: pytest.fail("asked again"))
    monkeypatch.setattr(harness, "generate_tokens", lambda *_, **__: pytest.fail("asked again"))
    assert main(arguments) == 0
    assert json.loads(output.read_text())["results"] == results
    assert "local_choice" in capsys.readouterr().out


def test_scores_and_greediness_of_requests_one_by_one(run_dir):
    from lm_eval.api.instance import Instance

    model = harness.T5xLikeLM(f"{run_dir}:1", cache="no")
    pairs = [("red green", " blue"), ("", "one two"), ("yellow ", "three"), ("red green", " blue"), ("four " * 40, "x")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for (found, greedy), pair in zip(model.loglikelihood(requests), pairs, strict=True):
        expected = direct(model, *model._text.pair(*pair))
        assert found == pytest.approx(expected[0], rel=1e-4, abs=1e-4) and greedy == expected[1]
    # What greedy decoding says is greedy.
    (said,) = model.generate_until([Instance("generate_until", {}, ("red green", {"max_gen_toks": 5}), 0)])
    tokens = model._text.tokenizer.encode(said)
    if len(tokens) == 5 and model._text.tokenizer.decode(tokens) == said:
        ((_, greedy),) = model.loglikelihood([Instance("loglikelihood", {}, ("red green", said), 0)])
        assert greedy


def test_lm_evals_own_command_line_knows_the_model(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    local_tasks(tmp_path, "own")
    words = ["run", "--model", "t5x_like", "--model_args", f"path={run_dir}"]
    words += ["--tasks", "own_choice", "--include_path", str(tmp_path), "--limit", "3"]
    words += ["--output_path", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["lm-eval", *words])
    harness.main()
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())
    assert found["config"]["model"] == "t5x_like" and "own_choice" in found["results"]


def test_a_task_of_held_out_text(run_dir, tmp_path, monkeypatch, capsys):
    """Of random parameters nothing is above chance; the report says what it is."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert main(["harness", str(run_dir), "--docs-choice", "--limit", "8"]) == 0
    rows = [json.loads(line) for line in (run_dir / "harness" / "docs_choice.jsonl").read_text().splitlines()]
    held_out = open_stores(harness.open_model(run_dir).run.data)[0]
    split = held_out.split("validation")
    text = held_out.tokenizer.decode(split.tokens(0, split.num_tokens).tolist())
    for row in rows:
        assert row["beginning"] + row["choices"][row["label"]] in text
        assert len(set(row["choices"])) == 4
        assert not any(
            row["beginning"] + wrong in text for wrong in set(row["choices"]) - {row["choices"][row["label"]]}
        )
    assert "docs_choice acc: 0." in capsys.readouterr().out


def test_what_cannot_be_driven_is_refused(run_dir, tmp_path, capsys):
    assert main(["harness", str(run_dir), "--tasks", "no_such_task"]) == 2
    assert "found no_such_task, expected tasks that lm-eval knows" in capsys.readouterr().err
    assert main(["harness", str(tmp_path), "--tasks", "x"]) == 2
    assert "no checkpoints in it" in capsys.readouterr().err
