"""Accounts of models: their content, the models that can be named, and errors of the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.docs_examples import REPOSITORY

from t5x_like.cli.main import main
from t5x_like.config import BatchSizeStage, CorpusConfig, Preference
from t5x_like.config.recipes import load_recipe
from t5x_like.config.serialization import to_json
from t5x_like.errors import EXIT_OK, EXIT_USAGE
from t5x_like.hardware.topologies import parse_topology
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families import get_family, model_types
from t5x_like.interop.huggingface.family_matching import model_of_config
from t5x_like.models.flops import forward_flops_by_part
from t5x_like.models.presets.by_name import preset
from t5x_like.planning.account.quoted_numbers import page
from t5x_like.planning.estimate.inference import Inference, read_features

CLASSES = {"encoder": "ForMaskedLM", "decoder": "ForCausalLM", "encoder_decoder": "ForConditionalGeneration"}


def accounts(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, dict[str, Any]]]:
    """Return the sections of each account by title, with figures by name and unit, and common formulas by formula."""
    assert main(["account", *arguments, "--json"]) == EXIT_OK
    found = []
    for account in json.loads(capsys.readouterr().out)["accounts"]:
        sections = {}
        for section in account["sections"]:
            figures = {(figure["name"], figure["unit"]): figure["value"] for figure in section["figures"]}
            sections[section["title"]] = {**figures, **{common["formula"]: common for common in section["common"]}}
        found.append(sections)
    return found


def test_account_of_llama_on_an_a100(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["llama_3:70b", "--draft", "llama_3:8b", "--acceptance", "0.75", "--turns", "10", "--prompt", "100"]
    (found,) = accounts(capsys, *arguments, "--answer", "100", "--claim", "12400", "0.165", "--batch", "64")
    assert found["parameters"]["total", "parameters"] == 70_553_706_496
    cache = found["KV cache"]
    assert cache["per token", "bytes"] == 327_680
    assert cache["2 L 2 d bytes per token"]["value"] == 16 * 327_680
    throughput = found["throughput"]
    assert throughput["largest batch", "rows"] == 0
    assert "does not fit" in throughput["memory / (2 L d bytes per token)"]["remark"]
    # 64 rows of a step that reads 139 GB of weights, and in truth the caches as well.
    weights_alone = throughput["batch x bandwidth / weights"]["value"]
    assert weights_alone == pytest.approx(64 * 2.039e12 / 139.0e9, rel=0.01)
    assert weights_alone > throughput["batch of 64", "tokens per second"]
    short = next(common for formula, common in found["parameters"].items() if "int(P" in formula)
    assert short["value"] == 0 and "here 80." in short["remark"]
    time = found["least time"]
    common = time["time per token = cache bytes / bandwidth"]["value"]
    # What the formula leaves out is the time of reading the weights.
    assert time["the last step", "seconds"] - common == pytest.approx(139.0e9 / 2.039e12, rel=0.01)
    (claim,) = (each for formula, each in found["throughput"].items() if "per request" in formula)
    assert "contradict each other 3.1 times" in claim["remark"] and claim["remark"].count("impossible") == 2
    dialogue = found["dialogue of 10 turns"]
    assert dialogue["read again at each turn", "tokens"] == 10 * 100 + 200 * 45
    assert dialogue["read once", "tokens"] == 1_000
    speculation = found["speculative decoding"]
    assert speculation["cost c of a draft step", "times"] == pytest.approx(8.03 / 70.55, rel=0.1)
    assert (
        1
        < speculation["speed", "times"]
        <= next(common["value"] for formula, common in speculation.items() if "(1 - a**" in formula)
    )


def test_encoder_and_decoder_are_counted_apart_and_sum_to_the_row(capsys: pytest.CaptureFixture[str]) -> None:
    (pair, alone, encoder) = accounts(capsys, "t5_1_0:base", "gemma_2:2b", "bert", "--prompt", "96")
    per_token = pair["forward FLOPs per token"]
    row = 96 * per_token["encoder total", "FLOP"] + 128 * per_token["decoder total", "FLOP"]
    assert 3 * row == pytest.approx(per_token["training on a row", "FLOP"])
    model = preset("t5_1_0:base")
    counted = forward_flops_by_part(model, read_features(model, rows=1, source=96, target=128))
    assert row == pytest.approx(sum(counted.values()))
    source = {name: count for name, count in counted.items() if name.startswith("encoder ")}
    # Keys and values of the source: two of the four projections of cross-attention, all of which are as wide.
    keys = counted["cross projections"] * 96 / (96 + 128)
    assert 96 * per_token["encoder total", "FLOP"] == pytest.approx(sum(source.values()) + keys)
    assert per_token["6 N D on such a row"]["value"] == pytest.approx(6 * 222_903_552 * 224)
    assert alone["KV cache"]["windows of local layers", "bytes"] > 0
    assert "KV cache" not in encoder
    read = Inference(preset("bert"), parse_topology("a100:1"), 96, 0).read()
    assert encoder["least time"]["reading", "FLOP"] == read.flops
    assert encoder["loss tokens per GFLOP of training"].keys() >= {("masked diffusion", "tokens")}


def test_recipes_runs_and_hugging_face_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family, model = get_family("qwen2"), preset("qwen_2_5:0.5b")
    written = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **family.write(model)}
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen/config.json").write_text(json.dumps(written))
    run = load_recipe("t5")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(to_json(run))
    names = [f"{tmp_path}/qwen", f"{tmp_path}/qwen/config.json", f"{tmp_path}/run", "t5"]
    directory, file, of_run, recipe = accounts(capsys, *names)
    assert directory == file and directory["parameters"]["total", "parameters"] == 494_032_768
    assert of_run == recipe
    exposure = recipe["loss tokens per GFLOP of training"]
    assert [name for name in exposure if isinstance(name, tuple)] == [(run.data.mixture[0].name, "tokens")]


def test_preference_pairs_have_no_loss_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_recipe("t5")
    corpus = CorpusConfig(files=("pairs.jsonl",), inputs_field="prompt", text_field="chosen", rejected_field="rejected")
    data = dataclasses.replace(run.data, corpus=corpus, mixture=(Preference(),))
    (tmp_path / "config.json").write_text(to_json(dataclasses.replace(run, data=data)))
    (found,) = accounts(capsys, str(tmp_path))
    assert "loss tokens per GFLOP of training" not in found and "training and inference" in found


def test_training_with_smaller_first_batches_costs_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_recipe("t5")
    steps, rows = run.training.num_train_steps, run.training.global_batch_size
    assert steps % 2 == rows % 2 == 0
    ramp = (BatchSizeStage(until_step=steps // 2, batch_size=rows // 2),)
    growing = dataclasses.replace(run, training=dataclasses.replace(run.training, batch_size_ramp=ramp))
    (tmp_path / "config.json").write_text(to_json(growing))
    plain, found = (account["training and inference"] for account in accounts(capsys, "t5", str(tmp_path)))
    for unit in ("tokens", "FLOP"):
        assert found["training", unit] == pytest.approx(0.75 * plain["training", unit])


@pytest.mark.parametrize("kind", model_types())
def test_a_config_json_alone_describes_the_model_of_its_family(kind: str) -> None:
    family = get_family(kind)
    for make in family.presets:
        model = make()
        suffix = CLASSES[model.architecture]
        if family.variant_of is not None:
            suffix = "EncoderModel"
        field, value = family.variant_field or ("", "")
        name = value if field == "architectures" else f"Any{suffix}"
        written = {"model_type": family.written_type, "architectures": [name], **family.write(model)}
        found = model_of_config(Fields(json.loads(json.dumps(written)), "config.json"))
        features = read_features(model, rows=1, source=32, target=32)
        expected = forward_flops_by_part(model, features)
        if not model.lm_head_transform:
            expected.pop("head", None)
        assert expected.items() <= forward_flops_by_part(found, features).items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama_3:8b", "--machine", "a200:1"], "found a200:1, expected a kind of a100"),
        (["llama_3:8b", "--machine", "cpu:4"], "--machine: found cpu:4, expected an accelerator whose speed"),
        (["llama_3:8b", "--draft", "llama_3:1b"], "--draft: found no --acceptance, expected both"),
        (["llama_3:8b", "--acceptance", "0.5"], "--acceptance: found no --draft, expected both"),
        (["llama_3:8b", "--draft", "llama_3:1b", "--acceptance", "75"], "found 75, expected a probability"),
        (["llama_3:8b", "--draft", "bert", "--acceptance", "0.7"], "--draft with bert: found an encoder"),
        (["bert", "llama_3:8b", "--answer", "1"], "--answer: found 1, expected 2 or more"),
        (["bert", "--answer", "10"], "--answer with bert: found an encoder, expected a model with a decoder"),
        (["llama_3:8b", "bert", "--turns", "2"], "--turns with bert: found an encoder"),
        (["llama_3:9b"], "found 'llama_3:9b', expected llama_3:SIZE with one of 1b, 3b, 8b, 70b"),
        (["lama_3:8b"], "perhaps llama_3"),
        (["ul2_20b:base"], "expected ul2_20b, which has one size"),
        (["no_such.py"], "no such recipe"),
        (["gs://bucket/runs/ul2"], "MODEL: found 'gs://bucket/runs/ul2', expected a local path"),
    ],
)
def test_errors_say_what_was_found_and_expected(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["account", *arguments]) == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_a_hugging_face_configuration_that_is_not_understood_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "mamba"}))
    assert main(["account", str(path)]) == EXIT_USAGE
    assert "model_type: found 'mamba', expected one of" in capsys.readouterr().err
    family, model = get_family("llama"), preset("llama_3:1b")
    path.write_text(json.dumps({"model_type": "llama", **family.write(model), "logit_warp": 2.0}))
    assert main(["account", str(path)]) == EXIT_USAGE
    assert "logit_warp" in capsys.readouterr().err


def test_rows_that_are_too_short_for_an_objective_have_an_account(capsys: pytest.CaptureFixture[str]) -> None:
    pair, alone = accounts(capsys, "t5_1_1:small", "llama_3:1b", "--prompt", "1", "--answer", "2")
    assert ("span corruption (3, 15 %)", "tokens") not in pair.get("loss tokens per GFLOP of training", {})
    assert ("causal LM", "tokens") in alone["loss tokens per GFLOP of training"]
    (pair,) = accounts(capsys, "t5_1_1:small", "--answer", "1")
    assert pair["least time"]["the answer", "seconds"] == pair["least time"]["the last step", "seconds"]


def test_drafts_pay_where_a_step_of_the_batch_reads_all_experts_anyway(capsys: pytest.CaptureFixture[str]) -> None:
    draft = ["--draft", "llama_3:1b", "--acceptance", "0.7"]
    speeds = {}
    for rows in ("1", "16"):
        (found,) = accounts(capsys, "mixtral_8x7b", *draft, "--batch", rows)
        section = found["speculative decoding"]
        free = next(each["value"] for name, each in section.items() if "(1 - a**" in name)
        speeds[rows] = section["speed", "times"] / free
    # A single row chooses 2 of 8 experts in a step and more in a check; 16 rows choose nearly all in either.
    assert speeds["1"] < 0.8 and speeds["16"] > 0.9


@pytest.fixture(scope="module")
def quoted() -> str:
    return page()


def test_the_page_of_quoted_numbers_is_what_the_command_prints(quoted: str) -> None:
    path = REPOSITORY / "docs/quoted-numbers.md"
    assert path.read_text() == quoted, "the page differs: run `make quoted-numbers` and look at the difference"


@pytest.mark.parametrize(
    ("claim", "value"),
    [
        # Values by hand and from published configurations, independent of the functions that the page calls.
        ("A cached token takes", "327,680 B, 16 times less"),
        ("cache of 8,192 tokens", "2.68 GB"),
        ("An encoder-decoder caches twice", "393,216 B per decoder token and 393,216 B per encoder token"),
        ("`d = int(", "0 layers"),
        ("DeBERTa-v3 large has 304M", "435.2M"),
        ("540M parameters", "368M, 1.37 times"),
        ("0.30 ms per token", "at least 6.87 ms"),
        ("512 tokens in 3.3 ms", "at least 23.0 ms"),
        ("one A100 with 80 GB", "does not fit"),
        ("50 to 1,000 times", "75 times"),
        ("50 times as expensive", "17.5 times DeBERTa-v3 large, 21.5 times"),
        ("48,000 texts/s", "757/s at 512 tokens and 2,279/s at 128"),
        ("890 texts/s", "43/s at 512 tokens and 174/s at 128"),
        ("batch 64", "contradict each other 4.0 times"),
        ("batch 32", "contradict each other 3.4 times"),
        ("5 to 15 %", "0.65 % for a batch of 1, 5.2 % for a batch of 8, 15 % for a batch of 23"),
        ("TPU v5e", "v5e 241, v4 229, v6e 560, v5p 166"),
        ("10 to 100 times the training", "42.0T to 420T"),
        ("1.4T tokens are compute-optimal", "93 tokens per parameter by the published fit, 18 by the refit"),
        ("T5 learns from half", "0.20 of the raw tokens, 0.18 of the positions"),
        ("2 N parameters costs as much", "T5 1.1 XXL 1.18, UL2 1.13, T5Gemma 2B-2B 1.10, T5Gemma 2 1B-1B 1.02"),
        ("Training costs 6 N D", "1.87 times the count"),
        ("70B with 8B", "impossible: at most 2.10 times, with drafts of 4"),
        ("70B with 8B", "needs c < 0.086"),
        ("70B with 1B", "possible: at most 1.99 times, with drafts of 5"),
        ("8x22B with 8x7B", "impossible: at most 1.25 times, with drafts of 2"),
        ("check of a draft", "38.7B parameters, 3.0 times"),
    ],
)
def test_corrections_of_quoted_numbers(quoted: str, claim: str, value: str) -> None:
    (row,) = (line for line in quoted.splitlines() if line.startswith("|") and claim in line)
    assert value in row.partition("|")[2].partition("|")[2]
