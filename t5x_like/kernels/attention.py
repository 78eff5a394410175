"""Attention: one function for all backends, and the registry of its backends.

A backend is a module with a class of `kernels.attention_backend.AttentionBackend` and one call of `register_backend`;
`ModelConfig.attention` names it. A backend that cannot do what a model asks for refuses with its reason; there is no
fallback to another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.kernels.attention_backend import (
    AttentionBackend,
    AttentionOptions,
    AttentionRequest,
    drops_values,
)
from t5x_like.kernels.attention_masks import BlockwiseMask, DenseMask, Mask, MaskSpec
from t5x_like.kernels.blockwise_attention import BlockwiseAttention
from t5x_like.kernels.cudnn_attention import CudnnAttention
from t5x_like.kernels.dropout import keep_mask
from t5x_like.kernels.flash_attention import FlashAttention, GpuFlashAttention
from t5x_like.kernels.library_attention import XlaAttention
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.kernels.reference_attention import ReferenceAttention
from t5x_like.kernels.rowwise_attention import RowwiseAttention
from t5x_like.kernels.splash_attention import SplashAttention
from t5x_like.utils.name_registry import Registry

AUTO = "auto"
"""Value of `ModelConfig.attention` for which `kernels.auto_attention` chooses the backend."""
_BACKENDS: Registry[AttentionBackend] = Registry("attention backend")


def register_backend(name: str, backend: AttentionBackend) -> None:
    """Make `backend` available as `ModelConfig.attention = name`.

    Raises:
      ConfigError: the name is registered already, or is "auto".
      TypeError: `backend` is not an instance of `AttentionBackend`.
    """
    if not isinstance(backend, AttentionBackend):
        raise TypeError(f"attention backend {name!r}: found {backend!r}, expected an instance of AttentionBackend")
    if name == AUTO:
        found = f"the attention backend name {name!r}, which stands for a choice among backends"
        raise ConfigError([ConfigProblem(f"registration of {type(backend).__qualname__}", found, "another name")])
    _BACKENDS.register(name, backend, defined_by=type(backend))


def backend_names() -> tuple[str, ...]:
    """Return the names of the registered backends."""
    return tuple(_BACKENDS)


def get_backend(name: str) -> AttentionBackend:
    """Return the backend of this name.

    Raises:
      ConfigError: no backend has this name; the message lists the names.
    """
    return _BACKENDS.lookup(name, "model.attention")


def unknown_backend(name: str) -> ConfigProblem | None:
    """Return the problem of a name that is neither registered nor "auto", else None."""
    return None if name in _BACKENDS or name == AUTO else _BACKENDS.unknown(name, "model.attention")


register_backend("reference", ReferenceAttention())
register_backend("xla", XlaAttention())
register_backend("cudnn", CudnnAttention())
register_backend("blockwise", BlockwiseAttention())
register_backend("rowwise", RowwiseAttention())
register_backend("flash", FlashAttention())
register_backend("flash_gpu", GpuFlashAttention())
register_backend("splash", SplashAttention())


def attention(
    q_BxQxHxh: Array,
    k_BxKxGxh: Array | Sequence[Array],
    v_BxKxGxh: Array | Sequence[Array],
    mask: MaskSpec | Mask,
    *,
    scale: float,
    softcap: float | None = None,
    relative_bias: RelativeBias | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    dropout_broadcast_length: bool = False,
    backend: str = "reference",
) -> Array:
    """Return softmax(scale * q k + bias) v over the visible keys; the softmax is in float32.

    Query head i uses key and value head i // (H / G).

    Args:
      q_BxQxHxh: Queries.
      k_BxKxGxh: Keys, or several sequences of keys that count as one, in order.
      v_BxKxGxh: Values of the same shapes.
      mask: Description of the mask, or mask and bias as the backend's `prepare_mask` returned them.
      scale: Factor on the products of queries and keys.
      softcap: Scores s become softcap * tanh(s / softcap) before bias and mask, as in Gemma 2.
      relative_bias: T5's bias; only with a `MaskSpec`.
      dropout_rate: Rate at which probabilities are dropped.
      dropout_rng: Key of the dropout mask; None: no dropout.
      dropout_broadcast_length: One dropout mask [B, H, 1, K] for all queries, as in T5X.
      backend: Name of a registered backend. Built in are "reference" (einsums), "xla"
        (`jax.nn.dot_product_attention`), "cudnn" (the same function with NVIDIA's kernels), "blockwise" (loops over
        blocks, with memory linear in the length), "rowwise" (the same for a few rows at a time, on CPUs), "flash" and
        "flash_gpu" (Pallas kernels for TPUs and for GPUs) and "splash" (JAX's Pallas kernels for TPUs, without a bias).

    Returns:
      [B, Q, H, h] in the type of q.

    Raises:
      ConfigError: there is no such backend.
      ValueError: H is not a multiple of G, or the backend does not support the request.
    """
    implementation = get_backend(backend)
    keys, values = _as_sequences(k_BxKxGxh), _as_sequences(v_BxKxGxh)
    lengths = [k.shape[1] for k in keys]
    heads, kv_heads = q_BxQxHxh.shape[2], keys[0].shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key and value heads")
    # A description is prepared here for callers with one attention. Stacks prepare it once and pass the result to every
    # layer.
    if isinstance(mask, MaskSpec):
        mask = implementation.prepare_mask(mask, relative_bias, q_BxQxHxh.shape[1], sum(lengths), None)
    if dropout_rate == 0.0:
        dropout_rng = None
    if dropout_rng is not None and drops_values(heads, kv_heads, dropout_broadcast_length):
        # Drop values instead of probabilities: far fewer numbers, and any backend can do it. One mask is drawn for all
        # sequences of keys and split, so that it does not depend on how the keys are divided into sequences.
        keep = keep_mask(dropout_rng, 1.0 - dropout_rate, (values[0].shape[0], sum(lengths), kv_heads, 1))
        parts = jnp.split(keep, np.cumsum(lengths)[:-1], axis=1)
        values = [
            jnp.where(part, v / (1.0 - dropout_rate), 0).astype(v.dtype) for part, v in zip(parts, values, strict=True)
        ]
        dropout_rng = None
    # The request is checked at every call, at trace time. A caller that builds a mask itself cannot bypass what
    # `attention_problems` checks of a configuration.
    described = mask.keys if isinstance(mask, BlockwiseMask) else ()
    request = AttentionRequest(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=q_BxQxHxh.shape[3],
        dtype=str(q_BxQxHxh.dtype),
        bias="relative" if _has_bias(mask) else "none",
        softcap=softcap,
        dropout_rate=0.0 if dropout_rng is None else dropout_rate,
        dynamic_window=any(each.dynamic_window is not None for each in described),
        split=mask.split.length_split if isinstance(mask, BlockwiseMask) and mask.split is not None else None,
        is_merged=len(keys) > 1,
        q_length=q_BxQxHxh.shape[1],
        kv_length=sum(lengths),
    )
    if described:
        request = request.with_mask(described[0].mask)
    reason = implementation.supports(request)
    if reason is not None:
        raise ValueError(f"attention backend {backend!r}: {reason}")
    options = AttentionOptions(scale, softcap, dropout_rate, dropout_rng, dropout_broadcast_length)
    return implementation.attend(q_BxQxHxh, keys, values, mask, options)


def _as_sequences(x: Array | Sequence[Array]) -> list[Array]:
    return [x] if isinstance(x, Array) else list(x)


def _has_bias(mask: Mask) -> bool:
    if isinstance(mask, DenseMask):
        return mask.bias is not None
    return any(keys.relative_bias is not None for keys in mask.keys)
