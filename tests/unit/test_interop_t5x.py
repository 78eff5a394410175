"""T5X's checkpoints, legacy and Orbax: imported bit for bit, and refused with one message where they are not sound."""

import dataclasses
import json

import jax
import msgpack
import numpy as np
import pytest
from model_examples import VOCABULARY, forward, model, parameters, tokens
from t5x_examples import arrays, flat, write_legacy, write_orbax

from t5x_like.cli import main
from t5x_like.config import EXIT_OK, EXIT_USAGE, Adafactor, DataError
from t5x_like.config.model import ModelConfig
from t5x_like.interop import imported
from t5x_like.interop.t5x.directories import import_directory, model_of, open_directory
from t5x_like.interop.t5x.slots import read_slots
from t5x_like.models import presets
from t5x_like.models.build import abstract
from t5x_like.training.adafactor import adafactor as make_adafactor

pytestmark = pytest.mark.slow

T5 = {"attention_scale": 1.0, "num_kv_heads": 4, "mlp_gated": True}


def t5(**changes) -> ModelConfig:
    """T5 1.1 as it is, but tiny."""
    config = model("encoder_decoder", stack_changes=T5 | changes)
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=3))


EXACT = t5()
PER_LAYER = t5(relative_bias_per_layer=True)
TIED = dataclasses.replace(t5(mlp_gated=False), tie_embeddings=True, scale_logits=True)
DECODER = model("prefix_lm", stack_changes=T5)
FORMS = {
    "layers by name": lambda where, params: write_legacy(where, arrays(params)),
    "three dimensions": lambda where, params: write_legacy(where, arrays(params, joined=False)),
    "from a bucket": lambda where, params: write_legacy(where, arrays(params), driver="gcs"),
    "scanned": lambda where, params: write_legacy(where, arrays(params, axis=1)),
    "scanned, first": lambda where, params: write_legacy(where, arrays(params, axis=0)),
    "orbax": lambda where, params: write_orbax(where, arrays(params, axis=1)),
    "orbax in folders": lambda where, params: write_orbax(where, arrays(params), ocdbt=False),
}


def same(found, expected):
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


TWO = ("layers by name", "scanned")
OTHERS = {"per layer": PER_LAYER, "1.0": TIED, "decoder": DECODER}


@pytest.mark.parametrize(
    ("config", "form"),
    [
        *(pytest.param(EXACT, form, id=form) for form in FORMS),
        *(
            pytest.param(config, form, id=f"{name}, {form}")
            for name, config in OTHERS.items()
            for form in [*FORMS][:4:3]
        ),
    ],
)
def test_every_form_is_imported_bit_for_bit(config, form, tmp_path):
    params = parameters(config)
    source = open_directory(FORMS[form](tmp_path / "checkpoint_1000", params), config)
    same(source.params(abstract(config).params), params)


@pytest.mark.parametrize("form", ["layers by name", "scanned"])
def test_logits_are_those_of_the_source(form, tmp_path, monkeypatch):
    params = parameters(EXACT)
    batch = {"encoder_input_tokens": tokens(1, 2, 7), "decoder_input_tokens": tokens(2, 2, 5)}
    source = open_directory(FORMS[form](tmp_path / "checkpoint_1000", params), EXACT)
    found = forward(EXACT)(source.params(abstract(EXACT).params), batch)
    np.testing.assert_array_equal(found, forward(EXACT)(params, batch))


def test_shards_are_read_where_they_live(tmp_path):
    params = parameters(EXACT)
    source = open_directory(FORMS["scanned"](tmp_path / "checkpoint_1000", params), EXACT)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("all",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract(EXACT).params)
    found = source.params(wanted)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(found))
    same(found, params)


@pytest.mark.parametrize(("version", "dtype"), [(3, "bfloat16"), (2, "uint16")])
def test_bfloat16_of_both_versions(version, dtype, tmp_path):
    import ml_dtypes

    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), parameters(EXACT))
    found = arrays(rounded)
    if version == 2:
        found = {path: leaf.view(np.uint16) for path, leaf in found.items()}
    source = open_directory(write_legacy(tmp_path / "c", found, version=version, dtype=dtype), EXACT)
    same(source.params(abstract(EXACT).params), jax.tree.map(lambda x: x.astype(np.float32), rounded))


def test_presets_have_names_for_all_their_parameters():
    from t5x_like.interop.t5x.names import tensors

    for name in ("t5_1_0:small", "t5_1_1:xxl", "mt5:base", "umt5:small", "ul2_20b"):
        shapes = {path: leaf.shape for path, leaf in _abstract(model_of(name)[0]).items()}
        for axis in (None, 1):
            found = list(tensors(shapes, axis))
            assert len({tensor.path for tensor in found}) == len(found)
            assert sum(np.prod(t.shapes[0]) for t in found) == sum(np.prod(shape) for shape in shapes.values())
    assert model_of("t5_1_1:small")[0] == presets.t5_1_1("small")


def _abstract(config):
    leaves = jax.tree_util.tree_leaves_with_path(abstract(config).params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose model is `EXACT`."""
    from t5x_like.config.recipes import load_recipe
    from t5x_like.config.serialization import to_json

    path = tmp_path / "recipe.json"
    path.write_text(to_json(dataclasses.replace(load_recipe("smoke"), model=EXACT)))
    return str(path)


def test_the_command_writes_a_directory_of_ours(tmp_path, recipe, capsys):
    source = FORMS["layers by name"](tmp_path / "checkpoint_1000", parameters(EXACT))
    out = tmp_path / "out"
    assert main(["convert", "--from", "t5x", str(source), str(out), "--model", recipe]) == EXIT_OK
    assert "layers by name" in capsys.readouterr().out
    assert imported.read_model(out)[0] == EXACT
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "model.json"]


def test_another_model_is_refused_with_a_table(tmp_path, recipe, capsys):
    wider = dataclasses.replace(EXACT, vocab_size=VOCABULARY + 3)
    source = FORMS["layers by name"](tmp_path / "checkpoint_1000", parameters(wider))
    assert main(["convert", "--from", "t5x", str(source), str(tmp_path / "out"), "--model", recipe]) == EXIT_USAGE
    message = capsys.readouterr().err
    assert "token_embedder/embedding" in message and "(64, 32)" in message and "(61, 32)" in message
    assert "layers_0" not in message
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def _repack(directory, change):
    """The index with `change` made to its tree."""
    index = directory / "checkpoint"
    tree = msgpack.unpackb(index.read_bytes(), raw=False)
    change(tree)
    index.write_bytes(msgpack.packb(tree))


def _spec(tree):
    return tree["optimizer"]["target"]["token_embedder"]["embedding"]


HOSTILE = {
    "absolute": (lambda spec: spec["kvstore"].update(path="/etc/passwd"), "/etc/passwd"),
    "above": (lambda spec: spec["kvstore"].update(path="../secret"), "../secret"),
    "dots": (lambda spec: spec["kvstore"].update(path=".."), "'..'"),
    "driver": (lambda spec: spec.update(driver="n5"), "driver 'n5'"),
    "kvstore": (lambda spec: spec["kvstore"].update(driver="http"), "'http'"),
    "no path": (lambda spec: spec["kvstore"].pop("path"), "None"),
    "nowhere": (lambda spec: spec["kvstore"].update(path="nowhere"), "nowhere"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_indices_are_refused(case, tmp_path):
    source = FORMS["layers by name"](tmp_path / "c", parameters(EXACT))
    change, named = HOSTILE[case]
    _repack(source, lambda tree: change(_spec(tree)))
    with pytest.raises(DataError, match="token_embedder/embedding") as refused:
        open_directory(source, EXACT)
    assert named in str(refused.value)


def test_a_link_out_of_the_checkpoint_is_refused(tmp_path):
    source = FORMS["layers by name"](tmp_path / "c", parameters(EXACT))
    (source / "target.token_embedder.embedding").rename(tmp_path / "elsewhere")
    (source / "target.token_embedder.embedding").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="token_embedder/embedding"):
        open_directory(source, EXACT)


def _index(target):
    return msgpack.packb({"version": 3, "optimizer": {"target": target}})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no msgpack"),
        (b"\x81", "truncated"),
        (b"\x91" * 3000, "no msgpack"),
        (msgpack.packb({"version": 3, "optimizer": {"target": msgpack.ExtType(42, b"")}}), "type 42"),
        (
            msgpack.packb({"version": 3, "optimizer": {"a": msgpack.ExtType(1, msgpack.packb(([4], "float32", b"")))}}),
            "0 b",
        ),
        (
            msgpack.packb({"version": 3, "optimizer": {"a": msgpack.ExtType(1, msgpack.packb(([1], "O", b"12")))}}),
            "type",
        ),
        (msgpack.packb({"version": 1, "optimizer": {}}), "version 1"),
        (_index("text"), "target is a str"),
        (msgpack.packb([1]), "expected a map"),
    ],
)
def test_malformed_indices_are_refused(content, named, tmp_path):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(DataError, match=named):
        open_directory(tmp_path, EXACT)


def _edit_zarray(source, change):
    path = source / "target.token_embedder.embedding" / ".zarray"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**39, 32]},
        {"shape": [2**60, 2**60]},
        {"shape": [-1, 32]},
        {"shape": [61, 32, 1]},
        {"chunks": [2**40, 2**40]},
        {"chunks": [0, 1]},
        {"dtype": "|O"},
        {"zarr_format": 7},
        {"compressor": {"id": "pickle"}},
    ],
)
def test_absurd_descriptions_are_refused(change, tmp_path):
    source = FORMS["layers by name"](tmp_path / "c", parameters(EXACT))
    _edit_zarray(source, lambda document: document.update(change))
    with pytest.raises(DataError, match="token_embedder/embedding"):
        open_directory(source, EXACT)


@pytest.mark.parametrize("form", ["layers by name", "orbax in folders"])
def test_missing_and_truncated_parts_are_refused(form, tmp_path):
    source = FORMS[form](tmp_path / "c", parameters(EXACT))
    folder = next(source.rglob("target.token_embedder.embedding"))
    part = sorted(path for path in folder.iterdir() if path.name != ".zarray")[0]
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="token_embedder/embedding is damaged or truncated"):
        open_directory(source, EXACT).params(abstract(EXACT).params)
    part.unlink()
    # TensorStore would read zeros.
    with pytest.raises(DataError, match=r"parts of arrays are missing: target.token_embedder.embedding/0\.0"):
        open_directory(source, EXACT)


def test_a_missing_and_an_extra_array_are_named(tmp_path):
    found = arrays(parameters(EXACT))
    found["encoder/layers_7/mlp/wo/kernel"] = found.pop("encoder/layers_1/mlp/wo/kernel")
    with pytest.raises(DataError) as refused:
        open_directory(write_legacy(tmp_path / "c", found), EXACT)
    lines = [line.split() for line in str(refused.value).splitlines()]
    assert ["encoder/layers_1/mlp/wo/kernel", "nothing", "(48,", "32)"] in lines
    assert ["encoder/layers_7/mlp/wo/kernel", "(48,", "32)", "nothing"] in lines


def test_nothing_half_written_is_left(tmp_path, recipe):
    source = FORMS["layers by name"](tmp_path / "c", parameters(EXACT))
    part = sorted((source / "target.decoder.logits_dense.kernel").glob("[0-9]*"))[-1]
    part.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="logits_dense"):
        import_directory(source, tmp_path / "out", model=recipe)
    assert not list(tmp_path.glob("out*"))


def test_what_is_no_checkpoint_names_those_that_are_there(tmp_path):
    (tmp_path / "checkpoint_1000").mkdir()
    with pytest.raises(DataError, match="name one of its checkpoints: checkpoint_1000"):
        open_directory(tmp_path, EXACT)


def test_the_model_must_be_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["convert", "--from", "t5x", str(tmp_path), str(tmp_path / "out")])
    assert left.value.code == EXIT_USAGE and "--model" in capsys.readouterr().err
    assert main(["convert", "--from", "t5x", str(tmp_path), "x", "--model", "t5_1_1:huge"]) == EXIT_USAGE


SMALLEST_FACTORED = 24


def _t5x_slots(found, axis):
    """T5X's `init_param_state` and its means, for squares of the arrays themselves: by size where there are two
    dimensions and no layers, else by name, with embed as rows."""
    states = {}
    for path, leaf in found.items():
        square = np.square(leaf)
        scanned = axis is not None and path.startswith(("encoder/encoder/", "decoder/decoder/"))
        slots = dict.fromkeys(("v_row", "v_col", "v", "m"), np.zeros(1, np.float32))
        if leaf.ndim == 2 and not scanned:
            smaller, larger = np.argsort(leaf.shape)
            if leaf.shape[smaller] >= SMALLEST_FACTORED:
                slots |= {"v_row": square.mean(axis=larger), "v_col": square.mean(axis=smaller)}
            else:
                slots["v"] = square
        elif leaf.ndim == 3 and "relpos_bias" not in path:
            dims = [dim for dim in range(3) if dim != axis]
            row, column = dims[::-1] if "/wo/" in path or "/out/" in path else dims
            slots |= {"v_row": square.mean(axis=column), "v_col": square.mean(axis=row)}
        else:
            slots["v"] = square
        states |= {f"{path}/{kind}": slot for kind, slot in slots.items()}
    return states


@pytest.mark.parametrize("axis", [None, 1])
def test_moments_of_adafactor_are_those_of_the_same_means_here(axis, tmp_path):
    config, adafactor = PER_LAYER, Adafactor(min_dim_size_to_factor=SMALLEST_FACTORED)
    params, spec = parameters(config), abstract(config)
    found = arrays(params, axis)
    source = open_directory(write_legacy(tmp_path / "c", found, states=_t5x_slots(found, axis)), config)
    state = read_slots(source.tensors, source.arrays, spec, adafactor)
    assert state["count"] == 1000

    # Ours, of the same squares: one step of a decay rate that keeps nothing of the moments before.
    optimizer = make_adafactor(adafactor, spec.logical_axes)
    _, expected = optimizer.update(params, optimizer.init(params), params, learning_rate=1.0)
    found, expected = flat(state["second_moment"]), flat(expected["second_moment"])
    assert found.keys() == expected.keys() and any(path.endswith("v_row") for path in found)
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-8, err_msg=path)
    with pytest.raises(DataError, match="factors other arrays"):
        read_slots(source.tensors, source.arrays, spec, Adafactor(min_dim_size_to_factor=128))


def test_a_checkpoint_without_moments_is_refused(tmp_path):
    source = open_directory(FORMS["layers by name"](tmp_path / "c", parameters(EXACT)), EXACT)
    with pytest.raises(DataError, match="no state of an optimizer"):
        read_slots(source.tensors, source.arrays, abstract(EXACT), Adafactor())
