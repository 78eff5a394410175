"""config.json: exact both ways, strict, and nothing but data."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.config_examples import changed, example

from t5x_like.config import AdamWConfig
from t5x_like.config.objectives import Layout
from t5x_like.config.recipes import load_recipe
from t5x_like.config.serialization import SCHEMA_VERSION, diff_configs, from_json, to_dict, to_json
from t5x_like.config.validation.model import model_problems
from t5x_like.errors import ConfigError
from t5x_like.models import presets


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm", "causal_lm", "encoder"])
def test_round_trip(layout: Layout) -> None:
    run = changed(example(layout), "training.optimizer", AdamWConfig(b2=0.1 + 0.2))
    run = changed(run, "sharding.parameter_rules", (("embed", None), ("mlp", "tensor")))
    again = from_json(to_json(run), source="config.json")
    assert again == run and to_json(again) == to_json(run)
    assert hash(again) == hash(run), "lists must come back as tuples"


PRESETS = {
    "t5_1_1": presets.t5_1_1("xxl"),
    "t5_1_0": presets.t5_1_0("small"),
    "ul2_20b": presets.ul2_20b(),
    "mt5": presets.mt5("xl"),
    "mt5_base": presets.mt5_base(),
    "umt5": presets.umt5("small", scale_logits=True),
    "t5gemma": presets.t5gemma("9b-2b"),
    "t5gemma_2": presets.t5gemma_2(),
    "gemma_2": presets.gemma_2("27b"),
    "gemma_3": presets.gemma_3("4b"),
    "llama_3": presets.llama_3("8b"),
    "mixtral_8x7b": presets.mixtral_8x7b(),
    "gpt_2": presets.gpt_2(),
    "gpt_bert": presets.gpt_bert(),
    "ltg_bert": presets.ltg_bert(),
    "switch": presets.switch(),
    "bert": presets.bert("large"),
    "modernbert": presets.modernbert(),
    "deberta_v3": presets.deberta_v3(),
    "decoder_1b": presets.decoder_1b(),
    "bert_base": presets.bert_base(),
    "electra": presets.electra(),
    "electra_encoder": presets.electra_encoder(),
    "roberta": presets.roberta(),
    "xlm_roberta": presets.xlm_roberta(),
    "eurobert": presets.eurobert(),
    "neobert": presets.neobert(),
    "modernbert_decoder": presets.modernbert_decoder(),
    "gemma_1": presets.gemma_1(),
    "bart": presets.bart(),
    "mbart": presets.mbart(),
    "mistral_7b": presets.mistral_7b(),
    "qwen_2_5": presets.qwen_2_5(),
    "qwen_3": presets.qwen_3(),
    "byt5": presets.byt5(),
    "t5_encoder": presets.t5_encoder(),
    "long_t5": presets.long_t5(),
    "smoke": presets.smoke(),
}


def test_every_preset_is_listed() -> None:
    functions = {name for name, value in vars(presets).items() if inspect.isfunction(value) and name[0] != "_"}
    assert functions == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound_and_come_back(name: str) -> None:
    model = PRESETS[name]
    assert list(model_problems(model)) == []
    run = changed(example(), "model", model)
    assert from_json(to_json(run), source="config.json").model == model


def broken(path: str, value: Any) -> str:
    """Return the example's JSON with a value set at a dotted path; the value `...` removes it."""
    document = to_dict(changed(example(), "training.optimizer", AdamWConfig()))
    *parents, last = path.split(".")
    node: Any = document
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else node[name]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value", "where", "message"),
    [
        ("lerning_rate", 1, "lerning_rate", "an unknown field"),
        ("training.optimizer.momentm", 1, "training.optimizer.momentm", "an unknown field"),
        ("model.encoder.rotary", True, "model.encoder.rotary", "an unknown field"),
        ("data.mixture.3.rates", 1, "data.mixture.3.rates", "an unknown field"),
        ("training.global_batch_size", ..., "training.global_batch_size", "found nothing"),
        ("training.global_batch_size", "8", "training.global_batch_size", "found '8', expected a valid integer"),
        ("training.global_batch_size", 8.5, "training.global_batch_size", "found 8.5"),
        ("model.tie_embeddings", 1, "model.tie_embeddings", "expected a valid boolean"),
        ("data.layout", "decoder", "data.layout", "'causal_lm'"),
        ("training.optimizer.kind", "lion", "training.optimizer.kind", "'adafactor', 'adamw'"),
        ("data.mixture.0.kind", ..., "data.mixture.0.kind", "found nothing"),
        ("schema_version", 99, "schema_version", f"found 99, expected {SCHEMA_VERSION}"),
        ("schema_version", 1, "schema_version", "an earlier version of t5x-like wrote it"),
        ("schema_version", ..., "schema_version", "found None"),
    ],
)
def test_invalid_fields_are_refused_with_their_path(path: str, value: Any, where: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(broken(path, value), source="config.json")
    (problem,) = caught.value.problems
    assert problem.where == f"config.json: {where}"
    assert message in str(problem)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", f'{{"schema_version": {SCHEMA_VERSION}}}', "[" * 100_000])
def test_text_that_is_not_a_configuration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="config.json"):
        from_json(text, source="config.json")


TRAPS = [
    "__import__('pathlib').Path({marker!r}).touch()",
    "!!python/object/apply:os.system ['touch {marker}']",
    "$(touch {marker})",
    "@{marker}",
]


@pytest.mark.parametrize("trap", TRAPS)
def test_a_configuration_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str) -> None:
    """Code in values, a module to import named in them, Python files beside: all of it stays text."""
    marker = tmp_path / "executed"
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
    for name in ("config.py", "recipe.py", "sitecustomize.py", "evil_tasks.py", "conftest.py"):
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    text = trap.format(marker=str(marker))
    run = changed(changed(example(), "data.corpus.module", "evil_tasks"), "data.corpus.task", text)
    run = changed(run, "data.store_dir", text)
    path = tmp_path / "config.json"
    path.write_text(to_json(run))
    assert load_recipe(str(path)) == run
    document = to_dict(run)
    document["__reduce__"] = document["model"]["__class__"] = document["data"]["py/object"] = text
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"(?s)(?=.*__reduce__)(?=.*model\.__class__)(?=.*py/object)"):
        load_recipe(str(path))
    assert not marker.exists()


def test_differences_name_the_leaves() -> None:
    run = example()
    other = changed(changed(run, "training.global_batch_size", 16), "data.mixture.1.rate", 2.0)
    assert diff_configs(run, other) == {"training.global_batch_size": (8, 16), "data.mixture.1.rate": (1.0, 2.0)}
    shorter = changed(run, "data.mixture", run.data.mixture[:-1])
    assert {path.rsplit(".", 1)[0] for path in diff_configs(run, shorter)} == {"data.mixture.6"}
