"""T5X checkpoints, legacy and Orbax: imported bit for bit, and refused with one message if they are invalid."""

import dataclasses
import json

import jax
import msgpack
import numpy as np
import pytest
from helpers.model_examples import VOCABULARY, forward, model, parameters, tokens
from helpers.t5x_examples import arrays, flat, write_legacy, write_orbax

from t5x_like.checkpoints import model_dir
from t5x_like.cli.main import main
from t5x_like.config import AdafactorConfig
from t5x_like.config.model import ModelConfig
from t5x_like.errors import EXIT_OK, EXIT_USAGE, DataError
from t5x_like.interop.t5x.adafactor_state import read_slots
from t5x_like.interop.t5x.checkpoint import import_directory, model_of, open_directory
from t5x_like.models import presets
from t5x_like.models.factory import abstract_model
from t5x_like.training.optimizers.adafactor import adafactor as make_adafactor

pytestmark = pytest.mark.slow

T5 = {"attention_scale": 1.0, "num_kv_heads": 4, "mlp_gated": True}


def t5(**changes) -> ModelConfig:
    """Return T5 1.1 in a tiny size."""
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
def test_every_checkpoint_format_is_imported_bit_for_bit(config, form, tmp_path):
    params = parameters(config)
    source = open_directory(FORMS[form](tmp_path / "checkpoint_1000", params), config)
    same(source.params(abstract_model(config).params), params)


@pytest.mark.parametrize("form", ["layers by name", "scanned"])
def test_imported_model_has_the_logits_of_the_source(form, tmp_path, monkeypatch):
    params = parameters(EXACT)
    batch = {"encoder_input_tokens": tokens(1, 2, 7), "decoder_input_tokens": tokens(2, 2, 5)}
    source = open_directory(FORMS[form](tmp_path / "checkpoint_1000", params), EXACT)
    found = forward(EXACT)(source.params(abstract_model(EXACT).params), batch)
    np.testing.assert_array_equal(found, forward(EXACT)(params, batch))


def test_each_device_reads_its_own_shard(tmp_path):
    params = parameters(EXACT)
    source = open_directory(FORMS["scanned"](tmp_path / "checkpoint_1000", params), EXACT)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("all",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract_model(EXACT).params
    )
    found = source.params(wanted)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(found))
    same(found, params)


@pytest.mark.parametrize(("version", "dtype"), [(3, "bfloat16"), (2, "uint16")])
def test_bfloat16_is_read_in_both_format_versions(version, dtype, tmp_path):
    import ml_dtypes

    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), parameters(EXACT))
    found = arrays(rounded)
    if version == 2:
        found = {path: leaf.view(np.uint16) for path, leaf in found.items()}
    source = open_directory(write_legacy(tmp_path / "c", found, version=version, dtype=dtype), EXACT)
    same(source.params(abstract_model(EXACT).params), jax.tree.map(lambda x: x.astype(np.float32), rounded))


def test_every_parameter_of_the_t5x_presets_has_an_array():
    from t5x_like.interop.t5x.weight_map import tensors

    for name in ("t5_1_0:small", "t5_1_1:xxl", "mt5:base", "umt5:small", "ul2_20b"):
        shapes = {path: leaf.shape for path, leaf in _abstract(model_of(name)[0]).items()}
        for axis in (None, 1):
            found = list(tensors(shapes, axis))
            assert len({tensor.path for tensor in found}) == len(found)
            assert sum(np.prod(t.shapes[0]) for t in found) == sum(np.prod(shape) for shape in shapes.values())
    assert model_of("t5_1_1:small")[0] == presets.t5_1_1("small")


def _abstract(config):
    leaves = jax.tree_util.tree_leaves_with_path(abstract_model(config).params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe whose model is `EXACT`."""
    from t5x_like.config.recipes import load_recipe
    from t5x_like.config.serialization import to_json

    path = tmp_path / "recipe.json"
    path.write_text(to_json(dataclasses.replace(load_recipe("smoke"), model=EXACT)))
    return str(path)


def test_convert_command_writes_a_model_directory(tmp_path, recipe, capsys):
    source = FORMS["layers by name"](tmp_path / "checkpoint_1000", parameters(EXACT))
    out = tmp_path / "out"
    assert main(["convert", "--from", "t5x", str(source), str(out), "--model", recipe]) == EXIT_OK
    assert "layers by name" in capsys.readouterr().out
    assert model_dir.read_model(out)[0] == EXACT
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "model.json"]


def test_moments_without_the_scale_of_their_loss_are_refused(tmp_path, recipe, capsys):
    command = ["convert", "--from", "t5x", str(tmp_path), str(tmp_path / "out"), "--model", recipe, "--optimizer"]
    with pytest.raises(SystemExit):
        main(command)
    assert "found only one of --optimizer and --loss-scale" in capsys.readouterr().err


def test_arrays_that_are_not_finite_are_named(tmp_path):
    params = jax.tree.map(lambda leaf: leaf.at[0].set(np.inf) if leaf.ndim == 1 else leaf, parameters(EXACT))
    source = open_directory(FORMS["layers by name"](tmp_path / "c", params), EXACT)
    with pytest.raises(
        DataError, match=r"NaN or infinity.*\n  - decoder/final_norm/scale\n  - encoder/final_norm/scale$"
    ):
        source.params(abstract_model(EXACT).params)


def test_mismatched_model_is_refused_with_a_table(tmp_path, recipe, capsys):
    wider = dataclasses.replace(EXACT, vocab_size=VOCABULARY + 3)
    source = FORMS["layers by name"](tmp_path / "checkpoint_1000", parameters(wider))
    assert main(["convert", "--from", "t5x", str(source), str(tmp_path / "out"), "--model", recipe]) == EXIT_USAGE
    message = capsys.readouterr().err
    assert "token_embedder/embedding" in message and "(64, 32)" in message and "(61, 32)" in message
    assert "layers_0" not in message
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def _repack(directory, change):
    """Rewrite the index with `change` applied to its tree."""
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
def test_index_with_unsafe_locations_is_refused(case, tmp_path):
    source = FORMS["layers by name"](tmp_path / "c", parameters(EXACT))
    change, named = HOSTILE[case]
    _repack(source, lambda tree: change(_spec(tree)))
    with pytest.raises(DataError, match="token_embedder/embedding") as refused:
        open_directory(source, EXACT)
    assert named in str(refused.value)


def test_symbolic_link_out_of_the_checkpoint_is_refused(tmp_path):
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
        (b"", "not msgpack"),
        (b"\x81", "truncated"),
        (b"\x91" * 3000, "not msgpack"),
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
def test_implausible_array_descriptions_are_refused(change, tmp_path):
    source = FORMS["layers by name"](tmp_path / "c", parameters(EXACT))
    _edit_zarray(source, lambda document: document.update(change))
    with pytest.raises(DataError, match="token_embedder/embedding"):
        open_directory(source, EXACT)


@pytest.mark.parametrize("form", ["layers by name", "orbax in folders"])
def test_missing_and_truncated_chunks_are_refused(form, tmp_path):
    source = FORMS[form](tmp_path / "c", parameters(EXACT))
    folder = next(source.rglob("target.token_embedder.embedding"))
    part = sorted(path for path in folder.iterdir() if path.name != ".zarray")[0]
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="token_embedder/embedding is damaged or truncated"):
        open_directory(source, EXACT).params(abstract_model(EXACT).params)
    part.unlink()
    # TensorStore would read zeros.
    with pytest.raises(DataError, match=r"parts of arrays are missing: target.token_embedder.embedding/0\.0"):
        open_directory(source, EXACT)


def test_missing_and_extra_arrays_are_named(tmp_path):
    found = arrays(parameters(EXACT))
    found["encoder/layers_7/mlp/wo/kernel"] = found.pop("encoder/layers_1/mlp/wo/kernel")
    with pytest.raises(DataError) as refused:
        open_directory(write_legacy(tmp_path / "c", found), EXACT)
    lines = [line.split() for line in str(refused.value).splitlines()]
    assert ["encoder/layers_1/mlp/wo/kernel", "nothing", "(48,", "32)"] in lines
    assert ["encoder/layers_7/mlp/wo/kernel", "(48,", "32)", "nothing"] in lines


def test_failed_import_leaves_no_files(tmp_path, recipe):
    source = FORMS["layers by name"](tmp_path / "c", parameters(EXACT))
    part = sorted((source / "target.decoder.logits_dense.kernel").glob("[0-9]*"))[-1]
    part.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="logits_dense"):
        import_directory(source, tmp_path / "out", model=recipe)
    assert not list(tmp_path.glob("out*"))


def test_error_for_a_parent_directory_names_its_checkpoints(tmp_path):
    (tmp_path / "checkpoint_1000").mkdir()
    with pytest.raises(DataError, match="name one of its checkpoints: checkpoint_1000"):
        open_directory(tmp_path, EXACT)
    with pytest.raises(DataError, match="checkpoint_2000: not found, expected a T5X checkpoint"):
        open_directory(tmp_path / "checkpoint_2000", EXACT)


def test_import_without_a_model_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["convert", "--from", "t5x", str(tmp_path), str(tmp_path / "out")])
    assert left.value.code == EXIT_USAGE and "--model" in capsys.readouterr().err
    assert main(["convert", "--from", "t5x", str(tmp_path), "x", "--model", "t5_1_1:huge"]) == EXIT_USAGE


SMALLEST_FACTORED = 24


def _t5x_slots(by_path, axis):
    """Return T5X's `init_param_state` with its means, for the squares of the arrays: by size where there are two
    dimensions and no layers, else by name, with embed as rows."""
    states = {}
    for path, leaf in by_path.items():
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


@pytest.mark.parametrize(("axis", "loss_scale"), [(None, 1.0), (1, 60.0)])
def test_adafactor_moments_are_converted(axis, loss_scale, tmp_path):
    """Also those of a sum over 60 tokens, whose gradients are 60 times as large as those of their mean."""
    config, adafactor = PER_LAYER, AdafactorConfig(min_dim_size_to_factor=SMALLEST_FACTORED)
    params, spec = parameters(config), abstract_model(config)
    found = arrays(params, axis)
    source = open_directory(write_legacy(tmp_path / "c", found, states=_t5x_slots(found, axis)), config)
    state = read_slots(source.tensors, source.arrays, spec, adafactor, loss_scale)
    assert state["count"] == 1000

    # Ours, of the same squares: one step of a decay rate that keeps nothing of the moments before.
    optimizer = make_adafactor(adafactor, spec.logical_axes)
    gradients = jax.tree.map(lambda leaf: leaf / loss_scale, params)
    _, expected = optimizer.update(gradients, optimizer.init(params), params, learning_rate=1.0)
    found, expected = flat(state["second_moment"]), flat(expected["second_moment"])
    assert found.keys() == expected.keys() and any(path.endswith("v_row") for path in found)
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-8 / loss_scale**2, err_msg=path)
    with pytest.raises(DataError, match="factors other arrays"):
        read_slots(source.tensors, source.arrays, spec, AdafactorConfig(min_dim_size_to_factor=128), 1.0)


def test_checkpoint_without_moments_is_refused(tmp_path):
    source = open_directory(FORMS["layers by name"](tmp_path / "c", parameters(EXACT)), EXACT)
    with pytest.raises(DataError, match="no optimizer state"):
        read_slots(source.tensors, source.arrays, abstract_model(EXACT), AdafactorConfig(), 1.0)
