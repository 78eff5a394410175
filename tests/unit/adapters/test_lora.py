"""Adapters: what they do to kernels of all shapes, whatever the family, and what they cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_examples import EXAMPLES, forward, model, parameters, stack, tokens

from t5x_like.adapters.base_weights import fingerprint
from t5x_like.adapters.lora import LoraSpec, lora_spec, summed
from t5x_like.config import LoraConfig, ModelConfig, RunConfig
from t5x_like.errors import ConfigError
from t5x_like.models.factory import abstract_model, bind_params, kernels
from t5x_like.training.optimizers.adamw import is_decayed
from t5x_like.utils.tree_paths import at

BERT = {"norm": "layernorm", "norm_placement": "post", "use_bias": True, "mlp_gated": False, "mlp_activation": "gelu"}
FAMILIES: dict[str, ModelConfig] = {
    "t5": model("encoder_decoder"),
    "llama": model("decoder", "rope"),
    "bert": model(
        "encoder", "learned", stack_changes=BERT, tie_embeddings=True, lm_head_transform=True, head_bias=True
    ),
    "mixtral": EXAMPLES["experts"],
}
ALL = (".*/kernel",)


def lora(config: ModelConfig, paths=ALL, rank: int = 3) -> LoraSpec:
    return lora_spec(LoraConfig(base="base", rank=rank, alpha=6.0, paths=paths), config)


def batch_for(config: ModelConfig):
    batch = {}
    if config.encoder is not None:
        batch["encoder_input_tokens"] = tokens(0, 2, 7)
    if config.decoder is not None:
        batch["decoder_input_tokens"] = tokens(1, 2, 9)
    return batch


@functools.cache
def adapted(config: ModelConfig):
    """Return the jitted function (base, adapters, batch) -> logits, not merged."""
    adapter_spec, graphdef = lora(config), abstract_model(config).graphdef
    return jax.jit(lambda base, adapters, batch: bind_params(graphdef, adapter_spec.joined(base, adapters))(batch))


def moved(adapters, size: float = 0.1):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + size * random.normal(size=x.shape).astype(np.float32), adapters)


@pytest.mark.parametrize(
    "family", ["t5", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "t5")]
)
def test_initial_adapters_change_nothing_and_trained_ones_equal_merged_kernels(family: str) -> None:
    config = FAMILIES[family]
    base, batch, adapter_spec = parameters(config), batch_for(config), lora(config)
    assert set(adapter_spec.kernels) == set(kernels(config)), "all that a model has"
    fresh = jax.jit(adapter_spec.init)(jax.random.key(3))
    before = np.asarray(forward(config)(base, batch))
    np.testing.assert_array_equal(adapted(config)(base, fresh, batch), before)

    adapters = moved(fresh)
    found = np.asarray(adapted(config)(base, adapters, batch))
    merged = jax.jit(adapter_spec.merged)(base, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_allclose(found, forward(config)(merged, batch), rtol=1e-5, atol=1e-5 * np.abs(before).max())
    assert np.abs(found - before).max() > 0.05 * np.abs(before).max(), "the adapters are without effect"


def test_every_adapter_has_an_effect_and_other_parameters_are_unchanged() -> None:
    """One kernel at a time, by what merging changes: the product of A and B of each layer and expert on its own."""
    config = FAMILIES["mixtral"]
    base = parameters(config)
    for path, kernel in lora(config).kernels.items():
        own = lora(config, (path,))
        adapters = moved(own.init(jax.random.key(0)))
        change = jax.tree.map(lambda new, old: np.asarray(new) - old, own.merged(base, adapters), base)
        others = [np.any(leaf) for name, leaf in flat(change).items() if name != path]
        assert not any(others)
        a, b = (np.asarray(leaf, np.float64) for leaf in (at(adapters, path)["lora_a"], at(adapters, path)["lora_b"]))
        cut, inputs = kernel.shape[: kernel.stacked], kernel.shape[kernel.stacked : kernel.split]
        expected = 2.0 * a.reshape(*cut, np.prod(inputs), 3) @ b.reshape(*cut, 3, -1)
        np.testing.assert_allclose(at(change, path), expected.reshape(kernel.shape), atol=1e-5)


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_adapters_of_full_rank_represent_any_change() -> None:
    config = model("decoder", "rope", stack_changes={"d_model": 16, "num_heads": 4, "head_dim": 4, "d_ff": 16})
    whole = lora(config, (r".*attention/(query|out)/kernel", ".*mlp/w._?0?/kernel"), rank=16)
    base, random = parameters(config), np.random.default_rng(1)
    wanted, adapters = {}, {}
    for path, kernel in whole.kernels.items():
        wanted[path] = random.normal(size=kernel.shape).astype(np.float32)
        inputs = kernel.shape[kernel.stacked : kernel.split]
        identity = np.broadcast_to(np.eye(16, dtype=np.float32).reshape(*inputs, 16), (2, *inputs, 16))
        adapters[path] = {
            "lora_a": identity,
            "lora_b": wanted[path].reshape(2, 16, *kernel.shape[kernel.split :]) / whole.scale,
        }
    nested = jax.tree_util.tree_map_with_path(
        lambda path, _: adapters[jax.tree_util.keystr(path[:-1], simple=True, separator="/")][path[-1].key],
        whole.shapes,
    )
    merged = whole.merged(base, nested)
    for path, change in wanted.items():
        np.testing.assert_allclose(at(merged, path) - at(base, path), change, atol=1e-5)


def test_only_matched_kernels_have_adapters_and_initial_values_are_independent() -> None:
    config = FAMILIES["t5"]
    few, all_of_them = lora(config, (r".*attention/(query|value)/kernel",)), lora(config)
    assert sorted(few.kernels) == [
        *("decoder/layers/cross_attention/query/kernel", "decoder/layers/cross_attention/value/kernel"),
        *("decoder/layers/self_attention/query/kernel", "decoder/layers/self_attention/value/kernel"),
        *("encoder/layers/self_attention/query/kernel", "encoder/layers/self_attention/value/kernel"),
    ]
    key = jax.random.key(5)
    some, more = few.init(key), all_of_them.init(key)
    for path in few.kernels:
        np.testing.assert_array_equal(at(some, path)["lora_a"], at(more, path)["lora_a"])
    assert jax.tree.map(jnp.shape, more) == jax.tree.map(lambda leaf: leaf.shape, all_of_them.shapes)


def test_pattern_without_a_kernel_is_refused_with_similar_paths() -> None:
    with pytest.raises(ConfigError) as refused:
        lora(FAMILIES["llama"], ("decoder/layers/self_attention/querry/kernel", ".*/wo/kernel", "(", ".*norm/scale"))
    first, second, third = refused.value.problems
    assert first.where == "training.lora.paths.0" and "decoder/layers/self_attention/query/kernel" in first.fix
    assert second.where == "training.lora.paths.2" and "not a regular expression" in second.found
    assert third.where == "training.lora.paths.3" and "matches no kernel" in third.found


def test_merged_kernels_of_one_layer_at_a_time_are_in_memory() -> None:
    """With the layers run one by one and recomputed, a step needs less memory than all merged kernels together."""
    wide = stack(num_layers=12, d_model=64, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=256, positions="rope")
    config = ModelConfig(encoder=None, decoder=wide, vocab_size=61)
    shapes, row = abstract_model(config).params, {"decoder_input_tokens": jax.ShapeDtypeStruct((1, 8), jnp.int32)}
    adapter_spec = lora(config, (".*/layers/.*kernel",))
    kernel_bytes = 4 * sum(int(np.prod(kernel.shape)) for kernel in adapter_spec.kernels.values())

    def bytes_of(remat: str, join) -> int:
        graphdef = abstract_model(dataclasses.replace(config, remat=remat)).graphdef
        gradient = jax.grad(
            lambda adapters, base, batch: jnp.sum(bind_params(graphdef, join(base, adapters))(batch) ** 2)
        )
        memory = jax.jit(gradient).lower(adapter_spec.shapes, shapes, row).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert bytes_of("dots", adapter_spec.joined) < 0.6 * kernel_bytes < 2 * kernel_bytes
    assert bytes_of("full", adapter_spec.merged) > 1.5 * kernel_bytes


def test_weight_decay_applies_to_adapters() -> None:
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, axes: is_decayed(path, axes), lora(FAMILIES["t5"]).logical_axes, is_leaf=lambda x: type(x) is tuple
    )
    assert all(jax.tree.leaves(decayed))


def test_fingerprint_depends_on_values_and_their_positions() -> None:
    tree = {"a": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "b": np.ones(3, np.float32)}
    found = fingerprint(tree)
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    split = jax.NamedSharding(mesh, jax.P("x", None, "y"))
    assert fingerprint({"a": jax.device_put(tree["a"], split), "b": jnp.asarray(tree["b"])}) == found
    one_bit, swapped = tree["a"].copy(), tree["a"].copy()
    one_bit.view(np.uint32)[1, 2, 3] ^= 1
    swapped[0, 0, [1, 2]] = swapped[0, 0, [2, 1]]
    others = [tree | {"a": one_bit}, tree | {"a": swapped}, tree | {"a": tree["a"].reshape(2, 4, 3)}]
    others += [{"c": tree["a"], "b": tree["b"]}, tree | {"a": -tree["a"]}]
    assert len({found, *map(fingerprint, others)}) == 6


def test_adapters_are_part_of_the_saved_configuration() -> None:
    from helpers.config_examples import changed, example

    from t5x_like.config.serialization import from_json, to_json
    from t5x_like.config.validation import validate

    run: RunConfig = changed(example(), "training.lora", LoraConfig(base="runs/base", rank=4))
    assert validate(run) == []
    assert from_json(to_json(run), source="here") == run
    wrong = changed(run, "training.lora", LoraConfig(base="", rank=0, alpha=0.0, paths=()))
    assert [problem.where.rpartition(".")[2] for problem in validate(wrong)] == ["base", "rank", "alpha", "paths"]


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "mixtral"))]
)
def test_kernels_of_a_base_in_8_bits_are_those_of_the_rounded_base(family: str) -> None:
    """Rounded to half a step at most; adapters add to them, merged or not, and have the gradients of that model."""
    config = FAMILIES[family]
    base, batch = parameters(config), batch_for(config)
    adapter_spec = lora_spec(LoraConfig(base="base", rank=3, paths=(".*attention/.*kernel",), base_type="int8"), config)
    kept = jax.jit(adapter_spec.kept)(base)
    rounded = summed(kept)
    assert jax.tree.structure(rounded) == jax.tree.structure(base)
    for path, leaf in flat(base).items():
        kernel, found = adapter_spec.quantized.get(path), np.asarray(flat(rounded)[path])
        if kernel is None:
            np.testing.assert_array_equal(found, leaf)
            continue
        assert "layers" in path and "router" not in path
        node = at(kept, path)
        assert node.values.dtype == jnp.int8
        inputs = tuple(range(kernel.stacked, kernel.split))
        step = np.abs(leaf).max(axis=inputs, keepdims=True) / 127
        assert np.all(np.abs(found - leaf) <= 0.5001 * step) and np.any(found != leaf)
    adapters = moved(jax.jit(adapter_spec.init)(jax.random.key(0)))
    graphdef = abstract_model(config).graphdef
    plain_spec = dataclasses.replace(adapter_spec, quantized={})

    def value_and_grad(spec, base):
        logits = lambda a: jnp.sum(jnp.sin(bind_params(graphdef, spec.joined(base, a))(batch)))  # noqa: E731
        return jax.jit(jax.value_and_grad(logits))(adapters)

    results = value_and_grad(adapter_spec, kept), value_and_grad(plain_spec, rounded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()), *results)
    merged, expected = adapter_spec.merged(base, adapters), plain_spec.merged(rounded, adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, expected)
