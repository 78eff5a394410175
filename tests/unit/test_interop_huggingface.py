"""Hugging Face's directories without torch: every preset can be written and read back, and what is wrong is refused."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from model_examples import parameters

from t5x_like.cli import main
from t5x_like.config import EXIT_OK, EXIT_REFUSED, EXIT_USAGE, DataError, ModelConfig, RefusedError
from t5x_like.interop.huggingface import convert, families
from t5x_like.interop.huggingface.directories import import_directory, open_directory, write_directory
from t5x_like.interop.huggingface.names import tensors
from t5x_like.interop.safetensors import SINGLE, Pending, write
from t5x_like.interop.weights import Weights
from t5x_like.models import presets
from t5x_like.models.build import abstract

PRESETS = {
    "t5": [presets.t5_1_0("small"), presets.t5_1_1("small"), presets.ul2_20b()],
    "mt5": [presets.mt5("small")],
    "umt5": [presets.umt5("small"), presets.umt5("small", scale_logits=True)],
    "llama": [presets.llama_3("1b"), presets.llama_3("8b"), presets.decoder_1b()],
    "mixtral": [presets.mixtral_8x7b()],
    "gemma2": [presets.gemma_2("2b"), presets.gemma_2("27b")],
    "gemma3_text": [presets.gemma_3("270m"), presets.gemma_3("27b")],
    "t5gemma": [presets.t5gemma("2b-2b"), presets.t5gemma("9b-2b")],
    "t5gemma2": [presets.t5gemma_2("270m-270m"), presets.t5gemma_2("4b-4b")],
    "gpt2": [presets.gpt_2("small"), presets.gpt_2("xl")],
    "bert": [presets.bert("base")],
    "deberta-v2": [presets.deberta_v3("small")],
    "modernbert": [presets.modernbert("large")],
}


@pytest.mark.parametrize("kind", PRESETS)
def test_presets_are_of_their_family_and_every_parameter_has_a_name(kind):
    assert PRESETS.keys() == families.FAMILIES.keys()
    for model in PRESETS[kind]:
        assert families.differences(model, kind) == {}
        found = [*tensors(families.FAMILIES[kind].rules, convert.shapes_of(abstract(model).params))]
        assert len({tensor.name for tensor in found}) == len(found)
        size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract(model).params))
        assert sum(int(np.prod(tensor.shape)) for tensor in found) == size
        # mT5 is a T5 whose config.json says so.
        assert families.require(model, None) == {"mt5": "t5"}.get(kind, kind)


def test_what_is_of_no_family_is_told_in_what():
    assert families.kinds_for(presets.smoke()) == []
    with pytest.raises(RefusedError, match="no family"):
        families.require(presets.smoke(), None)
    with pytest.raises(RefusedError, match="decoder.positions: 'rope' in the model, 'relative_bias' in t5"):
        families.require(presets.smoke(), "t5")
    gemma = presets.gemma_2()
    wider = dataclasses.replace(gemma.decoder, rope_scaling=None, qk_norm=True)
    with pytest.raises(RefusedError, match="qk_norm: True in the model, False"):
        families.require(dataclasses.replace(gemma, decoder=wider), "gemma2")


def small() -> ModelConfig:
    stack = dataclasses.replace(
        presets.llama_3("8b").decoder, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24
    )
    return dataclasses.replace(presets.llama_3("8b"), decoder=stack, vocab_size=31, dtype="float32", remat="none")


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "theirs"
    path.mkdir()
    write_directory(path, small(), parameters(small()), "llama")
    return path


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_command_goes_both_ways(directory, tmp_path, capsys):
    (directory / "tokenizer.json").write_text("{}")
    config = json.loads((directory / "config.json").read_text()) | {"eos_token_id": 17}
    (directory / "config.json").write_text(json.dumps(config))
    ours, again = tmp_path / "ours", tmp_path / "again"
    assert main(["convert", "--from", "hf", str(directory), str(ours)]) == EXIT_OK
    assert "llama" in capsys.readouterr().out
    assert main(["convert", "--to", "hf", str(ours), str(again)]) == EXIT_OK
    for name in ("config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (directory / name).read_bytes() or name == "config.json"
    assert json.loads((again / "config.json").read_text()) == config
    one, other = Weights(directory), Weights(again)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one.read(name), other.read(name))
    assert main(["convert", "--to", "hf", str(ours), str(again)]) == EXIT_REFUSED
    half = tmp_path / "half"
    assert main(["convert", "--to", "hf", "--dtype", "bfloat16", str(ours), str(half)]) == EXIT_OK
    assert {Weights(half)[name].dtype.name for name in Weights(half)} == {"bfloat16"}
    found = open_directory(half).params(abstract(small()).params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), found, parameters(small()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "half", "ours", "theirs"]


def test_parameters_are_made_where_their_sharding_puts_them(directory):
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spec = abstract(small()).params
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), spec)
    found = open_directory(directory).params(placed)
    same(found, parameters(small()))
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(found))


def rewritten(directory, change):
    weights = Weights(directory)
    arrays = {name: np.array(weights.read(name)) for name in weights}
    change(arrays)
    write(directory / SINGLE, [Pending(n, a.dtype, a.shape, lambda a=a: a) for n, a in arrays.items()], {})


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda arrays: arrays.pop("model.norm.weight"), r"model\.norm\.weight is missing, expected \(16,\)"),
        (lambda arrays: arrays.update(more=np.zeros(3)), "more is not known"),
        (
            lambda arrays: arrays.update({"model.norm.weight": np.zeros((1, 16))}),
            r"model.norm.weight has shape \(1, 16\), expected \(16,\)",
        ),
        (
            lambda arrays: arrays.update({"model.norm.weight": np.zeros(16, np.int8)}),
            "model.norm.weight has type int8, expected numbers of a floating type",
        ),
        (lambda arrays: arrays.pop("model.embed_tokens.weight"), "no token table"),
        (lambda arrays: arrays.update({"norm.weight": np.zeros(16)}), "two names of one tensor"),
    ],
)
def test_tensors_that_are_not_those_of_the_model_are_refused(directory, tmp_path, change, message):
    rewritten(directory, change)
    with pytest.raises(DataError, match=message):
        import_directory(directory, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("model_type", "bloom", "model_type: found 'bloom', expected one of t5"),
        ("model_type", None, "model_type: found None"),
        ("num_hidden_layers", "2", "num_hidden_layers: found '2', expected a natural number"),
        ("num_hidden_layers", True, "num_hidden_layers: found True"),
        ("num_hidden_layers", 2**30, "1024 at most"),
        ("num_hidden_layers", 3, r"layers\.2\..* is missing"),
        ("num_key_value_heads", 3, "num_kv_heads"),
        ("num_attention_heads", 0, "num_heads"),
        ("hidden_act", "swiglu", "hidden_act: found 'swiglu'"),
        ("attention_bias", True, "attention_bias: found True, expected False"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope_type: found 'yarn'"),
        ("rope_parameters", 3, "rope_parameters: found 3"),
        ("vocab_size", 32, "has shape"),
    ],
)
def test_a_config_that_is_wrong_is_refused(directory, tmp_path, capsys, field, value, message):
    config = json.loads((directory / "config.json").read_text()) | {field: value}
    (directory / "config.json").write_text(json.dumps(config))
    assert main(["convert", "--from", "hf", str(directory), str(tmp_path / "ours")]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_older_spellings_are_read(directory):
    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    (directory / "config.json").write_text(json.dumps(config))
    assert open_directory(directory).model.decoder == dataclasses.replace(small().decoder)


def smaller(model: ModelConfig) -> ModelConfig:
    size = {"num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "d_ff": 24}
    stacks = {name: dataclasses.replace(stack, **size, dropout_rate=0.0) for name, stack in model.stacks.items()}
    return dataclasses.replace(model, **stacks, vocab_size=31)


OLDER = {
    "t5 with copies of the table": (
        "t5",
        presets.t5_1_0("small"),
        lambda arrays: arrays.update(
            {f"{stack}.embed_tokens.weight": arrays["shared.weight"] for stack in ("encoder", "decoder")}
            | {"lm_head.weight": arrays["shared.weight"]}
            | {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.zeros((32, 4))}
        ),
    ),
    "t5 with the decoder's table only": (
        "t5",
        presets.t5_1_1("small"),
        lambda arrays: arrays.update({"decoder.embed_tokens.weight": arrays.pop("shared.weight")}),
    ),
    "gpt-2 without prefix": (
        "gpt2",
        presets.gpt_2("small"),
        lambda arrays: [arrays.update({name.removeprefix("transformer."): arrays.pop(name)}) for name in list(arrays)],
    ),
    "bert of its first year": (
        "bert",
        presets.bert("base"),
        lambda arrays: (
            [
                arrays.update({name.replace(new, old): arrays.pop(name)})
                for name in list(arrays)
                for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
                if new in name
            ]
            + [arrays.update({"cls.predictions.decoder.weight": arrays["bert.embeddings.word_embeddings.weight"]})]
            + [arrays.update({"cls.predictions.decoder.bias": arrays["cls.predictions.bias"]})]
            + [
                arrays.update(
                    {"bert.pooler.dense.weight": np.zeros((16, 16)), "cls.seq_relationship.bias": np.zeros(2)}
                )
            ]
        ),
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_files_of_older_versions_are_the_same_model(tmp_path, name):
    kind, preset, change = OLDER[name]
    model = smaller(preset)
    write_directory(tmp_path, model, parameters(model), kind)
    rewritten(tmp_path, change)
    source = open_directory(tmp_path)
    kept = ["bert.pooler.dense.weight", "cls.seq_relationship.bias"] if kind == "bert" else []
    assert sorted(source.described.left_out) == kept
    assert families.differences(source.model, kind) == {}
    assert abstract(source.model).params == abstract(model).params
    same(source.params(abstract(model).params), parameters(model))


def test_an_error_on_the_way_leaves_nothing(directory, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "read_params", fail)
    with pytest.raises(KeyboardInterrupt):
        import_directory(directory, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


@pytest.mark.parametrize(
    "said, ids",
    [
        ({}, (None, 1, (2,))),
        ({"bos_token_id": 5, "eos_token_id": [7, 8], "pad_token_id": 9}, (9, 5, (7, 8))),
        ({"bos_token_id": None, "eos_token_id": 3, "pad_token_id": -1}, (None, 1, (3,))),
    ],
)
def test_special_ids_are_those_of_the_files(directory, said, ids):
    config = json.loads((directory / "config.json").read_text())
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        config.pop(name)
    (directory / "config.json").write_text(json.dumps(config | said))
    model = open_directory(directory).model
    assert (model.pad_id, model.start_id, model.eos_ids) == ids


def test_a_run_writes_the_ids_that_it_was_trained_with(directory):
    config = json.loads((directory / "config.json").read_text())
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (0, 0, 1)
