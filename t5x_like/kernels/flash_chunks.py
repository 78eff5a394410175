"""Attention of a chunk of queries with a chunk of keys by the kernels of flash attention."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.context_device import ChunkAttention, ChunkGradients, DeviceBlock, Pair
from t5x_like.kernels.flash_block import FlashKernels
from t5x_like.kernels.flash_inputs import bias_distances, kernel_mask, kernel_setting
from t5x_like.kernels.online_softmax import HIDDEN, Sums, pad_to_blocks


@dataclasses.dataclass(frozen=True)
class FlashChunks(ChunkAttention):
    """Kernels of flash attention, told the distance of the two chunks in the sequence.

    A query without any visible key gets 0, and passes no gradient.

    Attributes:
      kernels: Kernels of the platform.
      block: Number of queries and of keys of a block; None: chosen by the kernels.
      interpret: Run the kernels as ordinary operations on any platform.
    """

    kernels: FlashKernels
    block: int | None
    interpret: bool

    def add(self, here: DeviceBlock, pair: Pair, sums: Sums, q: Array, k: Array, v: Array) -> Sums:
        call = _Call(self, here, pair, q)
        bias = call.keys.relative_bias
        distances = None if bias is None else call.distances(bias.table)
        padded_q, padded_k, padded_v = (call.padded(x) for x in (_join_heads(q), k, v))
        out, maximum, log_total = self.kernels.forward(call.setting, padded_q, padded_k, padded_v, distances, call.mask)
        out = jnp.where(jnp.swapaxes(maximum <= HIDDEN, 2, 3), 0.0, out)[:, :, : pair.q_length]
        log_total = log_total[:, :, 0, : pair.q_length].reshape(q.shape[:-1])
        # The output is a mean already: the sums of these keys relative to the logarithm of their total, which is 1.
        return sums.plus(Sums(out.reshape(q.shape), log_total, jnp.ones_like(log_total)))

    def gradients(
        self,
        here: DeviceBlock,
        pair: Pair,
        q: Array,
        k: Array,
        v: Array,
        d_out: Array,
        statistics: tuple[Array, Array, Array],
    ) -> ChunkGradients:
        call = _Call(self, here, pair, q)
        distances = table_gradient = None
        if call.keys.relative_bias is not None:
            distances, table_gradient = jax.vjp(call.distances, call.keys.relative_bias.table)
        maximum, total, delta = statistics
        # Probabilities of queries without visible keys, and of padding, are 0.
        log_total = jnp.where(maximum <= HIDDEN, jnp.inf, maximum + jnp.log(total))
        arrays: dict[str, Array | None] = {
            **{name: call.padded(x) for name, x in {"q": _join_heads(q), "k": k, "v": v}.items()},
            "d_out": call.padded(_join_heads(d_out)),
            "distances": distances,
            "log_total": call.padded(_join_heads(log_total[..., None]), jnp.inf)[..., 0][:, :, None],
            "delta": call.padded(_join_heads(delta[..., None]))[..., 0][:, :, None],
        }
        found = self.kernels.gradients(call.setting, arrays, call.mask)
        return ChunkGradients(
            found.q[:, :, : pair.q_length].reshape(q.shape),
            found.k[:, :, : pair.kv_length],
            found.v[:, :, : pair.kv_length],
            None if table_gradient is None else table_gradient(found.distances)[0],
        )


class _Call:
    """Arguments of the kernels for a pair of chunks.

    Attributes:
      keys: Description of the mask and the bias.
      setting: Static part.
      mask: Arrays of the mask.
    """

    def __init__(self, chunks: FlashChunks, here: DeviceBlock, pair: Pair, q: Array):
        self.pair, self.keys = pair, here.key_spec(pair)
        self.offset = pair.kv_start - pair.q_start
        self.block = chunks.block or chunks.kernels.block_size(pair.q_length, pair.kv_length, q.shape[-1], q.dtype)
        self.setting = kernel_setting(
            self.keys, self.block, here.setting.softcap, is_partial=True, interpret=chunks.interpret
        )
        self.mask = kernel_mask(self.keys, pair.q_length, pair.kv_length, self.block, self.offset)

    def padded(self, x: Array, value: float = 0.0) -> Array:
        """Return an array [b, heads, length, x] in whole blocks."""
        return pad_to_blocks(x, 2, self.block, value)

    def distances(self, table: Array) -> Array:
        """Return the bias by head and distance, from its table."""
        bias = self.keys.relative_bias
        assert bias is not None
        q_length, kv_length = (-(-x // self.block) * self.block for x in (self.pair.q_length, self.pair.kv_length))
        return bias_distances(dataclasses.replace(bias, table=table), q_length, kv_length, self.offset)


def _join_heads(x: Array) -> Array:
    """Return [b, g, r, q, x] as [b, h, q, x]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])
