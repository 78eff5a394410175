"""Hugging Face directories without torch: presets are written and read back, invalid directories are refused."""

import copy
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from helpers.config_examples import shipped_recipes
from helpers.model_examples import parameters

from t5x_like.checkpoints import model_dir
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.cli.main import main
from t5x_like.config import CheckpointConfig, ModelConfig
from t5x_like.config.recipes import load_recipe
from t5x_like.errors import EXIT_OK, EXIT_USAGE, ConfigError, DataError
from t5x_like.export.huggingface_directory import export_directory
from t5x_like.interop.huggingface import families as registry
from t5x_like.interop.huggingface import state_dict
from t5x_like.interop.huggingface.checkpoint import import_directory, open_directory, write_directory
from t5x_like.interop.huggingface.families import Family, get_family, model_types, register_family
from t5x_like.interop.huggingface.family_matching import (
    describe_export,
    differences,
    matching_families,
    require_family,
)
from t5x_like.interop.huggingface.weight_map import tensors
from t5x_like.interop.safetensors_file import SINGLE, Pending, write
from t5x_like.interop.weight_files import Weights
from t5x_like.models import presets
from t5x_like.models.factory import abstract_model
from t5x_like.utils import tree_paths

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


PLAINEST = {
    "mt5": "t5",
    "mt5_encoder": "t5_encoder",
    "mistral": "llama",
    "xlm-roberta": "roberta",
    "xlm-roberta_classification": "roberta_classification",
    "xlm-roberta_token_classification": "roberta_token_classification",
}
"""Families whose models are exported as those of a simpler family."""


@pytest.mark.parametrize("kind", model_types())
def test_presets_match_their_family_and_every_parameter_has_a_tensor(kind):
    assert set(PRESETS) <= set(model_types())
    for model in PRESETS.get(kind) or [preset() for preset in get_family(kind).presets]:
        assert differences(model, get_family(kind)) == {}
        found = [*tensors(get_family(kind).rules, tree_paths.shapes(abstract_model(model).params))]
        assert len({tensor.name for tensor in found}) == len(found)
        size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_model(model).params))
        assert sum(int(np.prod(tensor.shape)) for tensor in found) == size
        assert require_family(model, None).model_type == PLAINEST.get(kind, kind)


def test_model_of_no_family_is_refused_with_its_differences():
    assert matching_families(presets.smoke()) == []
    with pytest.raises(ConfigError, match="found no matching Hugging Face family.*--family"):
        require_family(presets.smoke(), None)
    with pytest.raises(ConfigError, match="model.decoder.positions: found 'rope', expected 'relative_bias'"):
        require_family(presets.smoke(), "t5")
    gemma = presets.gemma_2()
    wider = dataclasses.replace(gemma.decoder, rope_scaling=None, qk_norm=True)
    with pytest.raises(ConfigError, match="qk_norm: found True, expected False"):
        require_family(dataclasses.replace(gemma, decoder=wider), "gemma2")


def test_registered_family_is_imported_and_exported(tmp_path, monkeypatch):
    """A family of another file: Llama under another name, with another name for its token table."""
    monkeypatch.setattr(registry, "_FAMILIES", copy.deepcopy(registry._FAMILIES))
    llama = get_family("llama")
    rules = [dataclasses.replace(rule, tensor=rule.tensor.replace("embed_tokens", "words")) for rule in llama.rules]
    family = dataclasses.replace(
        llama,
        model_type="my_llama",
        rules=rules,
        token_tables=("model.words.weight",),
        presets=(small,),
        write=lambda model: llama.write(model) | {"mine": True},
    )
    register_family(family)
    write_directory(tmp_path, small(), parameters(small()), "my_llama")
    source = open_directory(tmp_path)
    assert source.description.family is family and source.model.decoder == small().decoder
    same(source.params(abstract_model(small()).params), parameters(small()))


def test_incomplete_family_and_taken_name_are_refused_at_registration():
    llama = get_family("llama")
    with pytest.raises(ConfigError, match="'mine'.*no presets, rules"):
        register_family(dataclasses.replace(llama, model_type="mine", presets=(), rules=[]))
    with pytest.raises(TypeError, match="special_tokens"):
        Family(  # type: ignore[call-arg]
            model_type="mine", presets=llama.presets, rules=llama.rules, read=llama.read, write=llama.write
        )
    with pytest.raises(ConfigError, match="already registered"):
        register_family(dataclasses.replace(get_family("gpt2"), model_type="llama"))


def small() -> ModelConfig:
    stack = dataclasses.replace(
        presets.llama_3("8b").decoder, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24
    )
    return dataclasses.replace(presets.llama_3("8b"), decoder=stack, vocab_size=31, dtype="float32", remat="none")


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    write_directory(path, small(), parameters(small()), "llama")
    return path


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_convert_command_imports_and_exports(directory, tmp_path, capsys):
    (directory / "tokenizer.json").write_text("{}")
    config = json.loads((directory / "config.json").read_text()) | {"eos_token_id": 17}
    (directory / "config.json").write_text(json.dumps(config))
    imported, again = tmp_path / "imported", tmp_path / "again"
    assert main(["convert", "--from", "hf", str(directory), str(imported)]) == EXIT_OK
    assert "llama" in capsys.readouterr().out
    assert main(["convert", "--to", "hf", str(imported), str(again)]) == EXIT_OK
    for name in ("config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (directory / name).read_bytes() or name == "config.json"
    assert json.loads((again / "config.json").read_text()) == config
    one, other = Weights(directory), Weights(again)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one.read(name), other.read(name))
    assert main(["convert", "--to", "hf", str(imported), str(again)]) == EXIT_USAGE
    half = tmp_path / "half"
    assert main(["convert", "--to", "hf", "--dtype", "bfloat16", str(imported), str(half)]) == EXIT_OK
    assert {Weights(half)[name].dtype.name for name in Weights(half)} == {"bfloat16"}
    found = open_directory(half).params(abstract_model(small()).params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), found, parameters(small()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "half", "imported", "source"]


def test_a_directory_that_does_not_exist_is_named(tmp_path, capsys):
    assert main(["convert", "--from", "hf", str(tmp_path / "missing"), str(tmp_path / "imported")]) == EXIT_USAGE
    assert f"{tmp_path}/missing: found no such directory" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_exported(directory, tmp_path):
    params = jax.tree.map(lambda leaf: leaf, parameters(small()))  # A copy: other tests share these parameters.
    params["decoder"]["final_norm"]["scale"] = params["decoder"]["final_norm"]["scale"].at[0].set(np.inf)
    checkpoints = CheckpointManager(tmp_path / "imported" / "checkpoints", CheckpointConfig())
    checkpoints.save(0, {"params": params}, {"family": "llama"})
    checkpoints.close()
    model_dir.describe(tmp_path / "imported", small(), "llama")
    with pytest.raises(DataError, match="expected finite weights: decoder/final_norm/scale;"):
        export_directory(tmp_path / "imported", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_parameters_are_created_with_their_sharding(directory):
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spec = abstract_model(small()).params
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
        (lambda arrays: arrays.update(more=np.zeros(3)), "more is unknown"),
        (
            lambda arrays: arrays.update({"model.norm.weight": np.zeros((1, 16))}),
            r"model.norm.weight has shape \(1, 16\), expected \(16,\)",
        ),
        (
            lambda arrays: arrays.update({"model.norm.weight": np.zeros(16, np.int8)}),
            "model.norm.weight has type int8, expected a floating-point type",
        ),
        (lambda arrays: arrays.pop("model.embed_tokens.weight"), "no token table"),
        (
            lambda arrays: arrays.pop("lm_head.weight"),
            r"lm_head.weight is missing, expected \(31, 16\): config.json says",
        ),
        (lambda arrays: arrays["model.norm.weight"].fill(np.nan), r"NaN or infinity.*\n  - model\.norm\.weight$"),
        (lambda arrays: arrays.update({"norm.weight": np.zeros(16)}), "two names of one tensor"),
    ],
)
def test_tensors_that_do_not_match_the_model_are_refused(directory, tmp_path, change, message):
    rewritten(directory, change)
    with pytest.raises(DataError, match=message):
        import_directory(directory, tmp_path / "imported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


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
        ("rope_parameters", {"rope_type": "longrope"}, "rope_type: found 'longrope'"),
        ("rope_parameters", 3, "rope_parameters: found 3"),
        ("vocab_size", 32, "has shape"),
    ],
)
def test_invalid_config_json_is_refused(directory, tmp_path, capsys, field, value, message):
    config = json.loads((directory / "config.json").read_text()) | {field: value}
    (directory / "config.json").write_text(json.dumps(config))
    assert main(["convert", "--from", "hf", str(directory), str(tmp_path / "imported")]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_older_field_names_are_read(directory):
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
def test_files_of_older_versions_give_the_same_model(tmp_path, name):
    kind, preset, change = OLDER[name]
    model = smaller(preset)
    write_directory(tmp_path, model, parameters(model), kind)
    rewritten(tmp_path, change)
    source = open_directory(tmp_path)
    kept = ["bert.pooler.dense.weight", "cls.seq_relationship.bias"] if kind == "bert" else []
    assert sorted(source.description.unused) == kept
    assert differences(source.model, get_family(kind)) == {}
    assert abstract_model(source.model).params == abstract_model(model).params
    same(source.params(abstract_model(model).params), parameters(model))


@pytest.fixture
def t5_directory(tmp_path):
    path = tmp_path / "t5"
    path.mkdir()
    model = dataclasses.replace(smaller(presets.t5_1_1("small")), dtype="float32")
    write_directory(path, model, parameters(model), "t5")
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"feed_forward_proj": "gelu", "is_gated_act": True},
            "found 'gelu', expected 'gated-gelu', since is_gated_act",
        ),
        ({"feed_forward_proj": "gated-gelu", "is_gated_act": False}, "expected 'gelu', since is_gated_act is false"),
        ({"feed_forward_proj": None, "dense_act_fn": "gelu_new", "is_gated_act": True}, None),
        ({"feed_forward_proj": None, "dense_act_fn": "gelu_new", "is_gated_act": False}, "wi_0.weight is unknown"),
        ({"feed_forward_proj": None, "model_type": "mt5"}, None),
    ],
)
def test_contradictory_activations_of_t5_are_named(t5_directory, fields, message):
    config = json.loads((t5_directory / "config.json").read_text()) | fields
    text = json.dumps({name: value for name, value in config.items() if value is not None})
    (t5_directory / "config.json").write_text(text)
    if message is None:
        model = open_directory(t5_directory).model
        assert (model.encoder.mlp_activation, model.encoder.mlp_gated) == ("gelu_tanh", True)
    else:
        with pytest.raises(DataError, match=message):
            open_directory(t5_directory)


def test_failed_import_leaves_no_directory(directory, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(state_dict, "read_params", fail)
    with pytest.raises(KeyboardInterrupt):
        import_directory(directory, tmp_path / "imported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    "fields, ids",
    [
        ({}, (None, 1, (2,))),
        ({"bos_token_id": 5, "eos_token_id": [7, 8], "pad_token_id": 9}, (9, 5, (7, 8))),
        ({"bos_token_id": None, "eos_token_id": 3, "pad_token_id": -1}, (None, 1, (3,))),
    ],
)
def test_special_ids_are_read_from_the_files(directory, fields, ids):
    config = json.loads((directory / "config.json").read_text())
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        config.pop(name)
    (directory / "config.json").write_text(json.dumps(config | fields))
    model = open_directory(directory).model
    assert (model.pad_token_id, model.decoder_start_token_id, model.eos_ids) == ids


def test_export_of_a_run_writes_its_special_ids(directory):
    config = json.loads((directory / "config.json").read_text())
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (0, 0, 1)


def test_export_description_names_the_family():
    assert describe_export(presets.t5_1_1("small"), "encoder_decoder") == "exports to Hugging Face as t5"
    assert "causally to the prefix" in describe_export(presets.llama_3(), "prefix_lm")
    described = describe_export(presets.smoke(), "encoder_decoder")
    assert described.startswith("no Hugging Face export: the nearest family, ") and "differs in encoder." in described


@pytest.mark.parametrize("reference", shipped_recipes(), ids=lambda reference: reference.rpartition("/")[2])
def test_every_shipped_recipe_exports_or_says_at_its_start_why_not(reference: str) -> None:
    run = load_recipe(reference)
    said = describe_export(run.model, run.data.layout)
    if run.data.layout == "prefix_lm":
        assert said.startswith("no Hugging Face export: ") and "causally to the prefix" in said
    elif run.model.generator is not None:
        assert said.startswith("no Hugging Face export: ") and "a generator or a discriminator" in said
        for family in (None, "electra"):
            with pytest.raises(ConfigError, match=r"model\.generator: found a generator, expected none"):
                require_family(run.model, family)
    elif said.startswith("exports to Hugging Face as "):
        assert said.endswith(f" {require_family(run.model, None).model_type}")
    else:
        assert "the nearest family, " in said and " differs in " in said
        with pytest.raises(ConfigError, match="no matching Hugging Face family"):
            require_family(run.model, None)
