"""Flash attention for TPUs and for GPUs: kernels (`kernels.flash_block`) with padding, T5's bias table and gradients.

The two are backends of their own: a configuration that names the one never runs the kernels of the other, whose results
differ in the last bits.

A query without any visible key gets the mean of all values, as in the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from t5x_like.kernels.attention_backend import AttentionBackend, AttentionOptions, AttentionRequest, usual_refusal
from t5x_like.kernels.attention_masks import BlockwiseMask, Mask, MaskSpec, SequenceSharding
from t5x_like.kernels.context_attention import context_attention
from t5x_like.kernels.device_kernels import Axes, attend_on_each_device
from t5x_like.kernels.flash_block import FlashKernels, KernelMask, KernelSetting
from t5x_like.kernels.flash_chunks import FlashChunks
from t5x_like.kernels.flash_gpu_kernels import GpuKernels
from t5x_like.kernels.flash_inputs import bias_distances, kernel_mask, kernel_setting
from t5x_like.kernels.flash_tpu_kernels import TpuKernels
from t5x_like.kernels.online_softmax import HIDDEN, correction, pad_to_blocks
from t5x_like.kernels.position_bias import RelativeBias


class FlashAttention(AttentionBackend):
    """Pallas kernels for TPUs, forward and backward.

    Attributes:
      kernels: Kernels of the platform.
      block: Number of queries and of keys of a block; None: chosen by the kernels.
      interpret: Run the kernels as ordinary operations on any platform, for tests. Otherwise compilation for another
        platform fails.
    """

    platform = "tpu"
    kernels: ClassVar[FlashKernels] = TpuKernels()
    recomputes_scores = True
    needs_placement = True
    gathers_keys = True

    def __init__(self, *, block: int | None = None, interpret: bool = False) -> None:
        self.block, self.interpret = block, interpret

    def supports(self, request: AttentionRequest) -> str | None:
        if request.is_merged:
            return 'it cannot attend to several sequences of keys (merged attention); set attention="blockwise"'
        if request.has_positions:
            return 'it masks by index and found explicit positions; set attention="blockwise"'
        return usual_refusal(request, "blockwise")

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
        if not isinstance(mask, BlockwiseMask):
            raise ValueError("found a dense mask, expected the result of this backend's prepare_mask")
        q = q_BxQxHxh * options.scale if options.scale != 1.0 else q_BxQxHxh
        if mask.split is not None and mask.split.length:
            kvs = list(zip(keys, values, strict=True))
            return context_attention(q, kvs, mask, FlashChunks(self.kernels, self.block, self.interpret), options)
        described = mask.keys[0]
        q_length, kv_length = q_BxQxHxh.shape[1], keys[0].shape[1]
        block = self.block or self.kernels.block_size(q_length, kv_length, q.shape[3], q.dtype)
        q, k, v = (pad_to_blocks(jnp.swapaxes(x, 1, 2), 2, block) for x in (q, keys[0], values[0]))
        bias = described.relative_bias
        distances = None if bias is None else bias_distances(bias, q.shape[2], k.shape[2])
        setting = kernel_setting(described, block, options.softcap, is_partial=False, interpret=self.interpret)
        arrays = kernel_mask(described, q_length, kv_length, block)

        def specs(batch: Axes, heads: Axes) -> tuple[Any, ...]:
            def rows_of(codes: Array | None) -> PartitionSpec:
                return PartitionSpec(batch if codes is not None and codes.shape[0] == q.shape[0] else None)

            codes = (rows_of(arrays.q_codes), rows_of(arrays.kv_codes))
            return PartitionSpec(heads), KernelMask(*codes, *(PartitionSpec(),) * 2)  # type: ignore[arg-type]

        attend = functools.partial(_attend, self.kernels, setting, kv_length)
        out = attend_on_each_device(attend, mask.split, q, k, v, (distances, arrays), specs)
        return jnp.swapaxes(out[:, :, :q_length], 1, 2)


class GpuFlashAttention(FlashAttention):
    """The same with Pallas kernels for GPUs."""

    platform = "gpu"
    kernels: ClassVar[FlashKernels] = GpuKernels()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    kernels: FlashKernels,
    setting: KernelSetting,
    kv_length: int,
    q: Array,
    k: Array,
    v: Array,
    distances: Array | None,
    mask: KernelMask,
) -> Array:
    return _forward(kernels, setting, kv_length, q, k, v, distances, mask)[0]


def _forward(
    kernels: FlashKernels,
    setting: KernelSetting,
    kv_length: int,
    q: Array,
    k: Array,
    v: Array,
    distances: Array | None,
    mask: KernelMask,
) -> tuple[Array, Any]:
    out, maximum, log_total = kernels.forward(setting, q, k, v, distances, mask)
    # The largest score of a query without visible keys is that of a hidden one. NaN is none: the output is NaN as well.
    unseen = maximum <= HIDDEN
    mean = jnp.sum(v, axis=2, dtype=jnp.float32) / kv_length
    mean = jnp.repeat(mean, q.shape[1] // k.shape[1], axis=1)[:, :, None]
    out = jnp.where(jnp.swapaxes(unseen, 2, 3), mean.astype(out.dtype), out)
    return out, (q, k, v, distances, mask, out, jnp.where(unseen, jnp.inf, log_total))


def _backward(
    kernels: FlashKernels, setting: KernelSetting, kv_length: int, residuals: Any, d_out: Array
) -> tuple[Any, ...]:
    q, k, v, distances, mask, out, log_total = residuals
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "distances": distances,
        "d_out": d_out,
        "log_total": log_total,
        "delta": correction(out, d_out)[:, :, None],
    }
    found = kernels.gradients(setting, arrays, mask)
    # Probabilities of queries without visible keys are 0 in the kernels; the mean of all values has this gradient.
    d_mean = jnp.where(jnp.swapaxes(jnp.isinf(log_total), 2, 3), d_out.astype(jnp.float32), 0.0)
    d_mean = jnp.sum(d_mean.reshape(*k.shape[:2], -1, k.shape[3]), axis=2, keepdims=True) / kv_length
    return found.q, found.k, (found.v + d_mean).astype(v.dtype), found.distances, None


_attend.defvjp(_forward, _backward)
