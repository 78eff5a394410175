"""cuDNN attention, lowered for CUDA without a GPU: JAX's checks of layouts pass, and flags replace dense masks."""

from __future__ import annotations

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from t5x_like.kernels.attention import attention
from t5x_like.kernels.attention_backend import AttentionRequest
from t5x_like.kernels.attention_masks import MaskSpec, SequenceSplit
from t5x_like.kernels.cudnn_attention import CudnnAttention
from t5x_like.kernels.position_bias import RelativeBias

ROWS, HEADS, KV_HEADS, WIDTH, Q, K = 2, 4, 2, 64, 32, 48
SEGMENTS = np.repeat([[1] * 20 + [2] * 12], ROWS, axis=0)
PADDED = (np.arange(K) < np.array([[40], [0]])).astype(np.int32)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is asked for its version only."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_100)


def lowered(mask: MaskSpec, kv_length: int, bias: RelativeBias | None = None) -> str:
    """Return the program of the gradients of one attention for CUDA."""
    q, k = (
        jax.ShapeDtypeStruct((ROWS, length, heads, WIDTH), jnp.bfloat16)
        for length, heads in ((Q, HEADS), (kv_length, KV_HEADS))
    )

    def loss(q: Array, k: Array, v: Array, mask: MaskSpec) -> Array:
        out = attention(q, k, v, mask, scale=1.0, relative_bias=bias, backend="cudnn")
        return jnp.sum(out.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, jax.tree.map(jnp.asarray, mask))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def settings(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and the configuration of each kernel that the program calls."""
    calls = re.findall(r"@(__cudnn\$\w+)\(.*?backend_config = \"(.*?)\"[,}]", text)
    return [(name, json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"]) for name, config in calls]


@pytest.mark.parametrize(
    ("mask", "kv_length", "mask_type", "window"),
    [
        (MaskSpec(causal=True), Q, "CAUSAL", 0),
        (MaskSpec(causal=True, window=(7, 3)), Q, "CAUSAL", 8),
        (MaskSpec(), K, "NO_MASK", 0),
        (MaskSpec(kv_segment_ids=PADDED, padding_at_end=True), K, "PADDING", 0),
        (MaskSpec(causal=True, kv_segment_ids=PADDED[:, :Q], padding_at_end=True), Q, "PADDING_CAUSAL", 0),
    ],
    ids=["causal", "window", "cross", "padding", "causal padding"],
)
def test_flags_replace_the_mask(mask: MaskSpec, kv_length: int, mask_type: str, window: int) -> None:
    kernels = settings(lowered(mask, kv_length))
    assert len(kernels) == 2
    for name, config in kernels:
        assert "Bias" not in name
        assert (config["mask_type"], config["sliding_window_length"]) == (mask_type, window)


@pytest.mark.parametrize(
    ("mask", "kv_length", "bias"),
    [
        (MaskSpec(kv_segment_ids=PADDED), K, False),
        (MaskSpec(causal=True, q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS), Q, False),
        (MaskSpec(window=(3, 3)), Q, False),
        (MaskSpec(kv_segment_ids=PADDED[:, :Q], padding_at_end=True), Q, True),
    ],
    ids=["padding anywhere", "packed", "window on both sides", "relative bias"],
)
def test_other_masks_are_arrays_with_an_axis_of_queries(mask: MaskSpec, kv_length: int, bias: bool) -> None:
    table = RelativeBias(jnp.ones((32, HEADS)), bidirectional=True, max_distance=128) if bias else None
    kernels = settings(lowered(mask, kv_length, table))
    assert len(kernels) == 2 and all("Bias" in name for name, _ in kernels)


def test_what_the_kernels_lack_is_refused() -> None:
    for request, reason in [
        (AttentionRequest(dtype="float32"), "dtype=bfloat16"),
        (AttentionRequest(softcap=2.0), "soft cap"),
        (AttentionRequest(bias="content"), "disentangled"),
        (AttentionRequest(dropout_rate=0.1), "dropout_broadcast_length=True"),
        (AttentionRequest(split=SequenceSplit("all_gather", 2)), "devices split the sequence"),
        (AttentionRequest(head_dim=36), "multiple of 8"),
        (AttentionRequest(q_length=113, kv_length=512), "even lengths"),
    ]:
        assert reason in str(CudnnAttention().supports(request))
