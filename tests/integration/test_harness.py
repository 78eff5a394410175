"""lm-evaluation-harness on local tasks of all three request types, offline, against direct computation."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import runpy

import jax
import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="the extra harness is not installed; `make test-harness` installs it")

from helpers.small_run import small_run  # noqa: E402

from t5x_like.checkpoints.manager import CheckpointManager  # noqa: E402
from t5x_like.cli.main import main  # noqa: E402
from t5x_like.config import (  # noqa: E402
    CausalLM,
    CheckpointConfig,
    CorpusConfig,
    MaskedDiffusion,
    MaskedLM,
    PrefixLM,
    SpanCorruption,
)
from t5x_like.config.serialization import to_json  # noqa: E402
from t5x_like.data.store.prepare import open_stores, prepare  # noqa: E402
from t5x_like.data.stream.row_stream import TrainingStream  # noqa: E402
from t5x_like.evaluation import lm_eval_adapter  # noqa: E402
from t5x_like.evaluation.masked_scores import ScoredText, score_texts  # noqa: E402
from t5x_like.models.factory import bind_params  # noqa: E402
from t5x_like.program import build_program  # noqa: E402

pytestmark = pytest.mark.harness

WORDS = "red green blue yellow one two three four".split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for number in range(24):
        (root / f"{number}.txt").write_text(" ".join(rng.choice(WORDS, 90)))
    return root


@pytest.fixture(scope="module", params=["encoder_decoder", "prefix_lm", "causal_lm"])
def run_dir(request, texts, tmp_path_factory):
    spans = SpanCorruption(name="R", mean_noise_span_length=3.0, noise_density=0.15, mode="R")
    mixture = (CausalLM(),) if request.param == "causal_lm" else (spans, PrefixLM(name="S", mode="S"))
    return random_run(texts, request.param, mixture, tmp_path_factory.mktemp(request.param))


def random_run(texts, layout, mixture, root):
    """Write a run directory with random parameters."""
    run = small_run(
        texts,
        layout,
        mixture,
        corpus=CorpusConfig(files=(str(texts / "*.txt"),), validation_fraction=0.4),
        lengths=(48, 0 if layout == "encoder" else 24),
        stack={"d_ff": 48, "positions": "relative_bias"},
        training={"num_train_steps": 1},
    )
    if run.model.decoder is not None:
        decoder = dataclasses.replace(run.model.decoder, relative_bias_bidirectional=layout == "prefix_lm")
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder))
    prepare(run.data, report=lambda line: None)
    program = build_program(run, jax.devices())
    state = program.init()
    manager = CheckpointManager(root / "checkpoints", CheckpointConfig())
    data = {"rows": 0, "fingerprint": TrainingStream(open_stores(run.data), run.data, 8).fingerprint}
    manager.save(1, state, {"data": data})
    manager.close()
    (root / "config.json").write_text(to_json(run))
    return root


def local_tasks(folder, name):
    """Write a task of each of lm-eval's output types, with synthetic rows."""
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
    return jax.jit(lambda params, features: bind_params(program.spec.graphdef, params)(features))


def direct(model, inputs, targets):
    """Return (log-likelihood, is greedy) from the logits of one row, in double precision."""
    program, config = model._loaded.program, model._loaded.run.model
    if config.encoder is not None:
        batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": [0, *targets[:-1]]}
        first = 0
    else:
        batch = {"decoder_input_tokens": [0, *inputs, *targets[:-1]]}
        first = len(inputs)
    batch |= {name.replace("input_tokens", "segment_ids"): [1] * len(row) for name, row in batch.items()}
    if model._format.form.bidirectional and config.encoder is None:
        batch["decoder_causal_attention"] = [1] * (first + 1)
    features = {name: np.array([[*row, *[0] * (WIDTH - len(row))]], np.int32) for name, row in batch.items()}
    logits = np.asarray(forward(program)(model._params, features), np.float64)[0, first : first + len(targets)]
    best = logits.max(-1, keepdims=True)
    log_p = logits - best - np.log(np.exp(logits - best).sum(-1, keepdims=True))
    return sum(log_p[index, target] for index, target in enumerate(targets)), list(logits.argmax(-1)) == list(targets)


def test_all_request_types_equal_a_direct_computation(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = local_tasks(tmp_path, "local")
    output = tmp_path / "results.json"
    tasks = "local_choice,local_generate,local_rolling"
    arguments = ["lm-eval", str(run_dir), "--tasks", tasks, "--include-path", str(tmp_path), "--output", str(output)]
    assert main(arguments) == 0
    results = json.loads(output.read_text())["results"]

    model = lm_eval_adapter.T5xLikeLM(str(run_dir), cache="no")
    text = model._format
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

    continuation = model._continue([rows[0]["question"]], {"until": ["e"], "max_gen_toks": 6})
    assert "e" not in continuation[0] and len(continuation[0].encode("utf-8", "replace")) <= 6 * 3

    # A second evaluation reads all results from the cache and does not run the model.
    monkeypatch.setattr(lm_eval_adapter, "request_scores", lambda *_, **__: pytest.fail("asked again"))
    monkeypatch.setattr(lm_eval_adapter, "generate_tokens", lambda *_, **__: pytest.fail("asked again"))
    assert main(arguments) == 0
    assert json.loads(output.read_text())["results"] == results
    assert "local_choice" in capsys.readouterr().out


def test_score_and_greediness_of_single_requests(run_dir):
    from lm_eval.api.instance import Instance

    model = lm_eval_adapter.T5xLikeLM(f"{run_dir}:1", cache="no")
    pairs = [("red green", " blue"), ("", "one two"), ("yellow ", "three"), ("red green", " blue"), ("four " * 40, "x")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for (result, greedy), pair in zip(model.loglikelihood(requests), pairs, strict=True):
        expected = direct(model, *model._format.pair(*pair))
        assert result == pytest.approx(expected[0], rel=1e-4, abs=1e-4) and greedy == expected[1]
    # The greedy continuation is greedy.
    (continuation,) = model.generate_until([Instance("generate_until", {}, ("red green", {"max_gen_toks": 5}), 0)])
    tokens = model._format.tokenizer.encode(continuation)
    if len(tokens) == 5 and model._format.tokenizer.decode(tokens) == continuation:
        ((_, greedy),) = model.loglikelihood([Instance("loglikelihood", {}, ("red green", continuation), 0)])
        assert greedy


@pytest.mark.parametrize(
    ("mixture", "scoring"), [((MaskedDiffusion(),), "diffusion_bound"), ((MaskedLM(),), "pseudo_likelihood")]
)
def test_an_encoder_scores_tasks_of_likelihoods(texts, tmp_path, monkeypatch, capsys, mixture, scoring):
    """The accuracy is that of the scores of `masked_scores`, which its own tests compare with a plain loop."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run = random_run(texts, "encoder", mixture, tmp_path / "run")
    rows = local_tasks(tmp_path, "masked")
    output = tmp_path / "results.json"
    command = ["lm-eval", str(run), "--include-path", str(tmp_path), "--output", str(output), "--tasks"]
    assert main([*command, "masked_choice,masked_rolling"]) == 0
    assert f"texts scored by {scoring.replace('_', '-' if scoring == 'pseudo_likelihood' else ' ')}" in " ".join(
        capsys.readouterr().out.split()
    )
    written = json.loads(output.read_text())
    assert written["scoring"] == scoring

    model = lm_eval_adapter.T5xLikeLM(str(run), cache="no")
    assert model.get_model_info()["scoring"] == scoring
    vocabulary = model._format.tokenizer.vocabulary

    def score(inputs, targets):
        scored = ScoredText([*inputs, *targets], len(inputs), len(targets))
        (found,) = score_texts(model._loaded.program, model._params, [scored], vocabulary.mask_id, scoring)
        return found.sum

    right = 0
    for row in rows:
        scores = [score(*model._format.pair(row["question"], choice)) for choice in row["choices"]]
        right += int(np.argmax(scores)) == row["label"]
    assert written["results"]["masked_choice"]["acc,none"] == pytest.approx(right / len(rows))
    total = sum(score(*window) for row in rows for window in model._format.rolling(row["text"]))
    size = sum(len(row["text"].encode()) for row in rows)
    found = written["results"]["masked_rolling"]["bits_per_byte,none"]
    assert found == pytest.approx(-total / size / math.log(2), rel=1e-4)
    assert main([*command, "masked_generate"]) == 2
    assert "this task generates text" in capsys.readouterr().err


def test_command_line_of_lm_eval_finds_the_model(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    local_tasks(tmp_path, "own")
    words = ["run", "--model", "t5x_like", "--model_args", f"path={run_dir}"]
    words += ["--tasks", "own_choice", "--include_path", str(tmp_path), "--limit", "3"]
    words += ["--output_path", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["lm-eval", *words])
    runpy.run_module("t5x_like.evaluation.lm_eval_adapter", run_name="__main__")  # As `python -m` does.
    (written,) = (tmp_path / "out").rglob("results_*.json")
    result = json.loads(written.read_text())
    assert result["config"]["model"] == "t5x_like" and "own_choice" in result["results"]


def test_local_completions_of_the_server_score_as_the_adapter(run_dir, tmp_path, monkeypatch):
    """lm-eval's own client of a server, with the tokens from the server, against the model in this process."""
    for name in ("tenacity", "aiohttp", "uvicorn", "starlette"):
        pytest.importorskip(name)
    from helpers.served_model import served
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    local_tasks(tmp_path, "served")
    # Windows of a long text are other ones in lm-eval's clients of servers, so that both read each text at once.
    direct = lm_eval_adapter.T5xLikeLM(str(run_dir), cache="no", max_length=220)
    with served(run_dir, prompt_length=220, max_new_tokens=8) as address:
        # A start token of id 0 is nothing to lm-eval, unless it is named.
        client = LocalCompletionsAPI(
            base_url=f"{address}/v1/completions",
            model=direct._loaded.run.name,
            max_length=221,
            batch_size=4,
            max_retries=1,
            custom_prefix_token_id=0,
        )
        if run_dir.name.startswith(("encoder_decoder", "prefix_lm")):
            with pytest.raises(Exception, match="400"):
                client.loglikelihood([Instance("loglikelihood", {}, ("red green", " blue"), 0)])
            return
        pairs = [("red green", " blue"), ("", "one two"), ("yellow ", "three"), ("four " * 9, "x")]
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        for ours, theirs in zip(direct.loglikelihood(requests), client.loglikelihood(requests), strict=True):
            assert theirs == (pytest.approx(ours[0], abs=1e-4), ours[1])
        texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("red green blue", "four " * 30)]
        assert client.loglikelihood_rolling(texts) == pytest.approx(direct.loglikelihood_rolling(texts), abs=1e-3)
        tasks = ["served_choice", "served_rolling"]
        manager = TaskManager(include_path=str(tmp_path))
        results = [
            lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)["results"]
            for model in (direct, client)
        ]
        for task in tasks:
            for metric, value in results[0][task].items():
                if isinstance(value, float):
                    assert results[1][task][metric] == pytest.approx(value, rel=1e-4), metric


def test_multiple_choice_task_from_held_out_text(run_dir, tmp_path, monkeypatch, capsys):
    """With random parameters no accuracy is above chance, which the report states."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert main(["lm-eval", str(run_dir), "--heldout-multiple-choice", "--limit", "8"]) == 0
    rows = [json.loads(line) for line in (run_dir / "lm_eval" / "docs_choice.jsonl").read_text().splitlines()]
    held_out = open_stores(lm_eval_adapter.open_model(run_dir).run.data)[0]
    split = held_out.split("validation")
    text = held_out.tokenizer.decode(split.tokens(0, split.num_tokens).tolist())
    for row in rows:
        assert row["beginning"] + row["choices"][row["label"]] in text
        assert len(set(row["choices"])) == 4
        assert not any(
            row["beginning"] + wrong in text for wrong in set(row["choices"]) - {row["choices"][row["label"]]}
        )
    assert "docs_choice acc: 0." in capsys.readouterr().out


def test_unusable_models_and_tasks_are_refused(run_dir, tmp_path, capsys):
    assert main(["lm-eval", str(run_dir), "--tasks", "no_such_task"]) == 2
    assert "found no_such_task, expected tasks that lm-eval knows" in capsys.readouterr().err
    assert main(["lm-eval", str(tmp_path), "--tasks", "x"]) == 2
    assert "no checkpoints in it" in capsys.readouterr().err
