"""Attention backends of a model: a registered one is used, an unknown or unsuitable one is refused before
compilation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_examples import EXAMPLES, parameters, tokens
from jax import Array

from t5x_like.config import ShardingConfig
from t5x_like.config.batch_spec import ArraySpec
from t5x_like.config.model import ModelConfig
from t5x_like.errors import ConfigError
from t5x_like.hardware.fake_devices import fake_devices
from t5x_like.hardware.topologies import parse_topology
from t5x_like.kernels import attention as registry
from t5x_like.kernels.attention import backend_names, register_backend
from t5x_like.kernels.attention_backend import AttentionBackend, AttentionOptions, AttentionRequest
from t5x_like.kernels.attention_masks import (
    BlockwiseMask,
    DenseMask,
    Mask,
    MaskSpec,
    SequenceSharding,
    materialize,
)
from t5x_like.kernels.auto_attention import choose
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.kernels.reference_attention import ReferenceAttention
from t5x_like.model_loading import LoadedModel, inference_run
from t5x_like.models import presets
from t5x_like.models.factory import abstract_model, bind_params, init_params
from t5x_like.sharding.attention_choice import attention_uses, describe_attention, sequence_split_of
from t5x_like.sharding.constrain import activation_context
from t5x_like.sharding.mesh import make_mesh
from t5x_like.sharding.rules import default_rules
from t5x_like.utils.tree_paths import by_path


class DescribedMaskBackend(AttentionBackend):
    """Keeps the description of the mask and builds its own mask when it attends."""

    def __init__(self) -> None:
        self.requests: list[AttentionRequest] = []

    def supports(self, request: AttentionRequest) -> str | None:
        self.requests.append(request)
        return "it has no soft cap" if request.softcap is not None else None

    def prepare_mask(
        self,
        mask: MaskSpec,
        relative_bias: RelativeBias | None,
        q_length: int,
        kv_length: int,
        split: SequenceSharding | None,
    ) -> Mask:
        return BlockwiseMask.of(mask, relative_bias, split)

    def attend(
        self, q_BxQxHxh: Array, keys: Sequence[Array], values: Sequence[Array], mask: Mask, options: AttentionOptions
    ) -> Array:
        assert isinstance(mask, BlockwiseMask) and len(mask.keys) == 1
        keys_mask = mask.keys[0]
        spec = keys_mask.mask
        if keys_mask.dynamic_window is not None:
            window = (keys_mask.dynamic_window[0], keys_mask.dynamic_window[1])
            spec = dataclasses.replace(spec, window=window)  # type: ignore[arg-type]
        dense = materialize(spec, keys_mask.relative_bias, q_BxQxHxh.shape[1], keys[0].shape[1])
        assert isinstance(dense, DenseMask)
        return ReferenceAttention().attend(q_BxQxHxh, keys, values, dense, options)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Iterator[DescribedMaskBackend]:
    monkeypatch.setattr(registry, "_BACKENDS", copy.deepcopy(registry._BACKENDS))
    backend = DescribedMaskBackend()
    register_backend("described", backend)
    yield backend


def small(attention: str, **stack_fields: object) -> ModelConfig:
    model = presets.smoke("decoder", vocab_size=64)
    assert model.decoder is not None
    stack = dataclasses.replace(
        model.decoder, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16
    )
    return dataclasses.replace(model, attention=attention, decoder=dataclasses.replace(stack, **stack_fields))  # type: ignore[arg-type]


def logits(model: ModelConfig) -> Array:
    tokens = np.random.default_rng(0).integers(2, 64, (2, 12))
    params = init_params(model, jax.random.key(0))
    graphdef = abstract_model(model).graphdef
    return jax.jit(lambda params: bind_params(graphdef, params)({"decoder_input_tokens": tokens}))(params)


@pytest.mark.parametrize(
    "stack_fields",
    [
        {"positions": "relative_bias"},
        {"positions": "relative_bias", "relative_bias_per_layer": True},
        {"layer_pattern": ("local", "global"), "sliding_window": (3, 0)},
    ],
    ids=["shared_bias", "bias_per_layer", "two_windows"],
)
def test_backend_that_never_gets_a_dense_mask_computes_the_same_logits(
    described: DescribedMaskBackend, stack_fields: dict[str, object]
) -> None:
    expected = logits(small("reference", **stack_fields))
    np.testing.assert_array_equal(logits(small("described", **stack_fields)), expected)
    np.testing.assert_allclose(logits(small("blockwise", **stack_fields)), expected, atol=1e-5)
    assert {request.bias for request in described.requests} <= {"relative", "none"}


@pytest.mark.slow
def test_sums_of_blocks_have_the_same_gradients_without_a_dense_mask() -> None:
    """LongT5's transient global tokens: two sequences of keys, each with a table of relative bias of its own."""
    config = EXAMPLES["blocks"]
    batch = {"encoder_input_tokens": tokens(0, 2, 9), "decoder_input_tokens": tokens(1, 2, 5)}

    def gradients(attention: str) -> dict[str, np.ndarray]:
        graphdef = abstract_model(dataclasses.replace(config, attention=attention)).graphdef
        total = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(bind_params(graphdef, params)(batch)))))
        return {path: np.asarray(leaf) for path, leaf in by_path(total(parameters(config))).items()}

    expected, found = gradients("reference"), gradients("blockwise")
    assert np.any(expected["encoder/global_relative_bias/embedding"])
    for path, gradient in expected.items():
        np.testing.assert_allclose(found[path], gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max(), err_msg=path)


def test_unknown_backend_is_refused_with_the_registered_names() -> None:
    with pytest.raises(
        ConfigError,
        match=r"model\.attention.*'blokwise'.*blockwise, cudnn, flash, flash_gpu, reference, rowwise, splash, xla",
    ):
        abstract_model(small("blokwise"))


def test_backend_that_lacks_a_feature_is_refused_with_its_reason(described: DescribedMaskBackend) -> None:
    with pytest.raises(ConfigError, match=r"described for model\.decoder.*it has no soft cap"):
        abstract_model(small("described", attention_softcap=2.0))


@pytest.mark.parametrize(
    ("attention", "stack_fields", "reason"),
    [
        ("xla", {"attention_softcap": 2.0}, "soft cap"),
        ("xla", {"positions": "disentangled", "num_kv_heads": 2}, "disentangled"),
        ("xla", {"dropout_rate": 0.1}, "dropout_broadcast_length=True"),
        ("cudnn", {}, "dtype=bfloat16"),
        ("flash", {"positions": "disentangled"}, "disentangled"),
    ],
)
def test_library_backend_is_refused_before_compilation(
    attention: str, stack_fields: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        abstract_model(small(attention, **stack_fields))


def test_flash_kernels_are_refused_for_merged_attention_when_the_model_is_built() -> None:
    decoder = small("flash", cross_attention="merged")
    stack = decoder.decoder
    assert stack is not None
    # Without an encoder, nothing is merged.
    abstract_model(decoder)
    with pytest.raises(ConfigError, match=r"flash for model\.decoder.*several sequences of keys"):
        abstract_model(dataclasses.replace(decoder, encoder=dataclasses.replace(stack, cross_attention="separate")))


def test_kernels_of_tpus_are_refused_on_other_devices_before_compilation() -> None:
    model = small("flash")
    spec = abstract_model(model)
    tokens = jax.ShapeDtypeStruct((2, 12), np.int32)

    def states(devices: Sequence[Any]) -> Any:
        mesh = make_mesh(ShardingConfig(), devices)
        with activation_context(mesh, default_rules(ShardingConfig())):
            return jax.eval_shape(
                lambda params, tokens: bind_params(spec.graphdef, params)({"decoder_input_tokens": tokens}),
                spec.params,
                tokens,
            )

    with pytest.raises(ConfigError, match="flash on devices of platform 'cpu', expected devices of platform 'tpu'"):
        states(jax.devices()[:1])
    # A program may be planned for devices that are not there.
    assert states(fake_devices(parse_topology("v5e:2x2"))[:1]).shape[:2] == (2, 12)


def test_auto_is_resolved_for_the_devices_of_the_mesh_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = presets.smoke("encoder_decoder", vocab_size=64)
    stacks = {name: dataclasses.replace(stack, positions="relative_bias") for name, stack in model.stacks.items()}
    model = dataclasses.replace(model, attention="auto", **stacks)  # type: ignore[arg-type]
    features = {f"{stack}_input_tokens": ArraySpec((2, 512), "int32") for stack in ("encoder", "decoder")}
    used: list[str] = []

    def record(q: Array, *_: Any, backend: str, **__: Any) -> Array:
        used.append(backend)
        return q

    monkeypatch.setattr("t5x_like.models.attention.attention", record)
    spec = abstract_model(model)
    tokens = {name: jax.ShapeDtypeStruct(array.shape, np.int32) for name, array in features.items()}
    tpus, one = fake_devices(parse_topology("v5e:2x2")), ShardingConfig(fsdp=1)
    gathered = ShardingConfig(fsdp=1, context=2, context_attention="all_gather")
    # Over 4 devices half of a part has 32 positions, which do not fill a tile.
    for sharding, devices, expected in [
        (one, tpus[:1], ["flash", "flash", "splash"]),
        (ShardingConfig(fsdp=1, context=2), tpus[:2], ["flash"] * 3),
        (gathered, tpus[:2], ["flash"] * 3),
        (ShardingConfig(fsdp=1, context=4), tpus, ["reference"] * 3),
        (one, jax.devices()[:1], ["rowwise"] * 3),
    ]:
        used.clear()
        mesh, rules = make_mesh(sharding, devices), default_rules(sharding)
        with activation_context(mesh, rules):
            jax.eval_shape(lambda params, batch: bind_params(spec.graphdef, params)(batch), spec.params, tokens)
        assert used == expected
        uses = list(attention_uses(model, features, split=sequence_split_of(mesh, rules)))
        assert [choose("auto", devices[0].platform, use.request).backend for use in uses] == used
    assert describe_attention(model, {"main": features}, "tpu", split=None) == (
        "flash for encoder self-attention and decoder self-attention (not splash: it has no relative bias), "
        "splash for decoder cross-attention"
    )


def test_a_model_of_other_devices_is_opened_with_auto_and_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = LoadedModel(Path("model"), "imported", inference_run("model", small("flash")), has_data=False)
    assert loaded.program.run.model.attention == "auto"
    assert "'flash' is for other devices" in capsys.readouterr().err
    assert loaded.model.attention == "flash"


def test_dropout_of_values_is_supported_by_every_backend() -> None:
    abstract_model(small("xla", dropout_rate=0.1, dropout_broadcast_length=True, num_kv_heads=2))


def test_incomplete_backend_and_taken_name_are_refused_at_registration() -> None:
    class Incomplete(AttentionBackend):
        def supports(self, request: AttentionRequest) -> str | None:
            return None

    with pytest.raises(TypeError, match="attend"):
        Incomplete()  # type: ignore[abstract]
    with pytest.raises(TypeError, match="instance of AttentionBackend"):
        register_backend("new", ReferenceAttention)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="already registered"):
        register_backend("xla", ReferenceAttention())
    assert backend_names() == ("reference", "xla", "cudnn", "blockwise", "rowwise", "flash", "flash_gpu", "splash")
