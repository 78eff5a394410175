"""Attention over a sequence that is split over devices: keys and values go round, queries stay (Liu et al. 2023, Ring
Attention with Blockwise Transformers).

Each device has a block of the queries and a block of the keys. In as many rounds as there are devices it attends to the
block that it holds and hands it on to its neighbour, with a softmax that is corrected as larger scores come (Milakov &
Gimelshein 2018). No device ever holds more scores than those of one block with another, and no more keys than the next
block beside its own. The backward pass goes round once more and computes the scores again; gradients of keys and values
travel with their block and are at home after the last round.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from t5x_like.kernels.masks import Described, Keys, MaskSpec, RelativeBias, Split, dense_bias, dense_mask
from t5x_like.kernels.random import keep_mask_block

_HIDDEN = float(jnp.finfo(jnp.float32).min)
Arrays = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What of one sequence of keys is known before the program runs."""

    causal: bool
    window: tuple[int, int] | None
    bidirectional: bool
    max_distance: int


@dataclasses.dataclass(frozen=True)
class _Setting:
    split: Split
    kinds: tuple[_Kind, ...]
    softcap: float | None
    dropout_rate: float
    shared_dropout: bool
    """One dropout mask for all queries."""


def ring_attention(
    q_BxQxHxh: Array,
    keys_values: Sequence[tuple[Array, Array]],
    mask: Described,
    *,
    softcap: float | None,
    dropout_rate: float,
    dropout_rng: Array | None,
    dropout_broadcast_length: bool,
) -> Array:
    """softmax(q k + bias) v over the keys that the mask shows, all sequences of keys together; see `attention`.

    A query that sees nothing gets a mean of values: a number, to be ignored.

    Args:
      q_BxQxHxh: Scaled queries.
      keys_values: Of each sequence of keys, [B, K, G, h] each. Q and each K are multiples of the split's size.

    Returns:
      [B, Q, H, h] in the type of q.
    """
    if any(keys.mask.q_positions is not None or keys.mask.kv_positions is not None for keys in mask.keys):
        raise ValueError("a sequence that is split over devices is in the order of its cells: found positions")
    setting = _Setting(
        mask.split,
        tuple(_kind(keys) for keys in mask.keys),
        softcap,
        0.0 if dropout_rng is None else dropout_rate,
        dropout_broadcast_length,
    )
    tables = {
        f"table_{i}": keys.relative_bias.table for i, keys in enumerate(mask.keys) if keys.relative_bias is not None
    }
    described = {name: x for i, keys in enumerate(mask.keys) for name, x in _described(i, keys).items()}
    if dropout_rng is not None:
        described["rng"] = dropout_rng
    kvs = {f"{name}_{i}": x for i, pair in enumerate(keys_values) for name, x in zip("kv", pair, strict=True)}
    return _attend(setting, q_BxQxHxh, kvs, tables, described)


def _kind(keys: Keys) -> _Kind:
    bias = keys.relative_bias
    return _Kind(
        keys.mask.causal,
        keys.mask.window,
        bias is not None and bias.bidirectional,
        0 if bias is None else bias.max_distance,
    )


def _described(number: int, keys: Keys) -> dict[str, Array]:
    """The arrays of a description, as far as there are any."""
    names = ("q_segment_ids", "kv_segment_ids", "q_prefix", "kv_prefix")
    found = {f"{name}_{number}": getattr(keys.mask, name) for name in names} | {f"reach_{number}": keys.reach}
    return {name: x for name, x in found.items() if x is not None}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(setting: _Setting, q: Array, kvs: Arrays, tables: Arrays, described: Arrays) -> Array:
    return _forward(setting, q, kvs, tables, described)[0]


def _forward(setting: _Setting, q: Array, kvs: Arrays, tables: Arrays, described: Arrays) -> tuple[Array, Any]:
    specs = _Specs(setting.split)
    out, maximum, total = jax.shard_map(
        functools.partial(_forward_here, setting),
        mesh=setting.split.mesh,
        in_specs=(specs.q, specs.all(kvs), specs.all(tables), specs.all(described)),
        out_specs=(specs.q, specs.statistic, specs.statistic),
        check_vma=False,
    )(q, kvs, tables, described)
    return out, (q, kvs, tables, described, out, maximum, total)


def _backward(setting: _Setting, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    q, kvs, tables, described, out, maximum, total = residuals
    # sum_k p dp of each query, which is the same for all blocks.
    delta = jnp.einsum("bqhx,bqhx->bqh", out, d_out, preferred_element_type=jnp.float32)
    specs = _Specs(setting.split)
    d_q, d_kvs, d_tables = jax.shard_map(
        functools.partial(_backward_here, setting),
        mesh=setting.split.mesh,
        in_specs=(
            specs.q,
            specs.all(kvs),
            specs.all(tables),
            specs.all(described),
            specs.q,
            *(specs.statistic,) * 3,
        ),
        out_specs=(specs.q, specs.all(kvs), specs.all(tables)),
        check_vma=False,
    )(q, kvs, tables, described, d_out, maximum, total, delta)
    return d_q, d_kvs, d_tables, {name: np.zeros(x.shape, jax.dtypes.float0) for name, x in described.items()}


_attend.defvjp(_forward, _backward)


class _Specs:
    """How each array lies on the mesh."""

    def __init__(self, split: Split):
        batch, length, heads, kv_heads = (
            axes or None for axes in (split.batch, split.length, split.heads, split.kv_heads)
        )
        self.q = PartitionSpec(batch, length, heads)
        self.statistic = PartitionSpec(batch, length, heads)
        self._kinds = {
            "k": PartitionSpec(batch, length, kv_heads),
            "v": PartitionSpec(batch, length, kv_heads),
            "table": PartitionSpec(None, heads),
            "q_segment_ids": PartitionSpec(batch, length),
            "q_prefix": PartitionSpec(batch, length),
            # One number per key, whole on every device: less to send once than to hand on in every round.
            "kv_segment_ids": PartitionSpec(batch),
            "kv_prefix": PartitionSpec(batch),
            "reach": PartitionSpec(),
            "rng": PartitionSpec(),
        }

    def all(self, arrays: Arrays) -> dict[str, PartitionSpec]:
        return {name: self._kinds[name.removesuffix(f"_{name.rpartition('_')[2]}") or name] for name in arrays}


class _Here:
    """This device's place, and blocks of scores there. Queries are [b, q, g, r, x] and keys [b, k, g, x]: r queries
    heads for each of g key heads."""

    def __init__(self, setting: _Setting, q: Array, tables: Arrays, described: Arrays):
        self.setting, self.tables, self.described = setting, tables, described
        self.size = _size(setting.split, setting.split.length)
        self.rank = jax.lax.axis_index(setting.split.length)
        self.rows, self.q_length, self.heads, self.width = q.shape

    def scores(self, number: int, q: Array, k: Array, source: Array) -> tuple[Array, Array]:
        """Scores [b, g, r, q, k] in float32 before the mask, and what is left of a change by the soft cap."""
        kind, cap = self.setting.kinds[number], self.setting.softcap
        scores = jnp.einsum("bqgrx,bkgx->bgrqk", q, k, preferred_element_type=jnp.float32)
        slope = jnp.ones(())
        if cap is not None:
            tanh = jnp.tanh(scores / cap)
            scores, slope = cap * tanh, 1.0 - jnp.square(tanh)
        if f"table_{number}" in self.tables:
            bias = self.bias(self.tables[f"table_{number}"], kind, k.shape[1], source)
            scores = scores + bias.reshape(1, *scores.shape[1:])
        return scores, slope

    def bias(self, table: Array, kind: _Kind, kv_length: int, source: Array) -> Array:
        """[1, h, q, k]."""
        offset = source * kv_length - self.rank * self.q_length
        relative_bias = RelativeBias(table, kind.bidirectional, kind.max_distance)
        return dense_bias(MaskSpec(), relative_bias, self.q_length, kv_length, offset)

    def seen(self, number: int, kv_length: int, source: Array) -> Array | None:
        """bool [1 or b, 1, 1, 1 or q, k], or None where all see all."""
        kind = self.setting.kinds[number]

        def of(name: str) -> Array | None:
            x = self.described.get(f"{name}_{number}")
            if x is None or not name.startswith("kv"):
                return x
            return jax.lax.dynamic_slice_in_dim(x, source * kv_length, kv_length, axis=1)

        reach = self.described.get(f"reach_{number}")
        window: Any = kind.window if reach is None else (reach[0], reach[1])
        mask = MaskSpec(
            causal=kind.causal,
            window=window,
            q_positions=(self.rank * self.q_length + jnp.arange(self.q_length))[None],
            kv_positions=(source * kv_length + jnp.arange(kv_length))[None],
            q_segment_ids=of("q_segment_ids"),
            kv_segment_ids=of("kv_segment_ids"),
            q_prefix=of("q_prefix"),
            kv_prefix=of("kv_prefix"),
        )
        dense = dense_mask(mask, self.q_length, kv_length)
        return None if dense is None else dense[:, :, None]

    def keep(self, number: int, shape: Sequence[int], kv_lengths: Sequence[int], source: Array) -> Array | None:
        """The part of the mask of dropout over all rows, heads, queries and keys that belongs to scores of `shape`; it
        is the same however the sequence is split."""
        if self.setting.dropout_rate == 0.0:
            return None
        split = self.setting.split
        rows, heads, q_length = (
            count * _size(split, axes)
            for count, axes in (
                (self.rows, split.batch),
                (self.heads, split.heads),
                (self.q_length, split.length),
            )
        )
        before = self.size * sum(kv_lengths[:number])
        shared = self.setting.shared_dropout
        keep = keep_mask_block(
            self.described["rng"],
            1.0 - self.setting.dropout_rate,
            (rows, heads, 1 if shared else q_length, self.size * sum(kv_lengths)),
            (
                _rank(split.batch) * self.rows,
                _rank(split.heads) * self.heads,
                0 if shared else self.rank * self.q_length,
                before + source * kv_lengths[number],
            ),
            (self.rows, self.heads, 1 if shared else self.q_length, kv_lengths[number]),
        )
        return keep.reshape(*shape[:3], *keep.shape[2:])

    def own_heads(self, kv: Array, kv_heads: int) -> Array:
        """Of keys or values [b, k, G, x] the heads that this device's queries ask; `kv_heads` of them on all devices
        together. Where more devices share the heads of queries than those of keys, a key head is asked by several."""
        split = self.setting.split
        if split.heads == split.kv_heads:
            return kv
        repeats = self.heads * _size(split, split.heads) // kv_heads
        first = _rank(split.heads) * self.heads
        before = _rank(split.kv_heads) * kv.shape[2]
        if repeats % self.heads == 0:
            return jax.lax.dynamic_slice_in_dim(kv, first // repeats - before, 1, axis=2)
        return jnp.take(kv, (first + jnp.arange(self.heads)) // repeats - before, axis=2)

    def round(self, step: Array) -> Array:
        """Whose block is here."""
        return (self.rank - step) % self.size

    def hand_on(self, tree: Any) -> Any:
        ways = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.setting.split.length, ways), tree)


def _size(split: Split, axes: tuple[str, ...]) -> int:
    return math.prod(split.mesh.shape[axis] for axis in axes)


def _rank(axes: tuple[str, ...]) -> Array | int:
    return jax.lax.axis_index(axes) if axes else 0


def _kv_lengths(kvs: Arrays) -> list[int]:
    return [kvs[f"k_{number}"].shape[1] for number in range(len(kvs) // 2)]


def _by_key_head(q: Array, kv: Array) -> Array:
    """[b, q, h, ...] as [b, q, g, r, ...]."""
    return q.reshape(*q.shape[:2], kv.shape[2], -1, *q.shape[3:])


def _turned(statistic: Array, kv: Array) -> Array:
    """Numbers of queries [b, q, h] beside scores: [b, g, r, q, 1]."""
    return jnp.moveaxis(_by_key_head(statistic, kv), 1, -1)[..., None]


def _if_any(seen: Array | None, is_first: Array, compute: Any, carry: Any) -> Any:
    """`compute(carry)`; a block of which nothing is seen is passed over, but for the first, so that no query is left
    without any score."""
    if seen is None:
        return compute(carry)
    return jax.lax.cond(is_first | jnp.any(seen), compute, lambda carry: carry, carry)


def _forward_here(
    setting: _Setting, q: Array, kvs: Arrays, tables: Arrays, described: Arrays
) -> tuple[Array, Array, Array]:
    """Of this device's queries: what they get, and the largest score and the sum of exponentials of each."""
    here = _Here(setting, q, tables, described)
    lengths = _kv_lengths(kvs)
    out = jnp.zeros(q.shape, jnp.float32)
    maximum = jnp.full(q.shape[:3], -jnp.inf)
    total = jnp.zeros(q.shape[:3])
    carry = (out, maximum, total)
    for number in range(len(lengths)):
        kv_heads = kvs[f"k_{number}"].shape[2] * _size(setting.split, setting.split.kv_heads)
        kv = tuple(here.own_heads(kvs[f"{name}_{number}"], kv_heads) for name in "kv")

        def attend(kv: Any, step: Array, carry: Any, number: int = number) -> Any:
            k, v = kv
            source = here.round(step)
            seen = here.seen(number, k.shape[1], source)

            def compute(carry: Any) -> Any:
                out, maximum, total = carry
                scores, _ = here.scores(number, _by_key_head(q, k), k, source)
                if seen is not None:
                    scores = jnp.where(seen, scores, _HIDDEN)
                old = _turned(maximum, k)
                new = jnp.maximum(old, jnp.max(scores, axis=-1, keepdims=True))
                weights, decay = jnp.exp(scores - new), jnp.exp(old - new)
                total = total * _back(decay, q) + _back(jnp.sum(weights, axis=-1, keepdims=True), q)
                keep = here.keep(number, scores.shape, lengths, source)
                if keep is not None:
                    weights = jnp.where(keep, weights / (1.0 - setting.dropout_rate), 0.0)
                added = jnp.einsum("bgrqk,bkgx->bqgrx", weights.astype(q.dtype), v, preferred_element_type=jnp.float32)
                return out * _back(decay, q)[..., None] + added.reshape(q.shape), _back(new, q), total

            return _if_any(seen, (step == 0) & (number == 0), compute, carry)

        def go_round(state: Any, step: Array, attend: Any = attend) -> tuple[Any, None]:
            kv, carry = state
            following = here.hand_on(kv)
            return (following, attend(kv, step, carry)), None

        (kv, carry), _ = jax.lax.scan(go_round, (kv, carry), jnp.arange(here.size - 1))
        carry = attend(kv, jnp.int32(here.size - 1), carry)
    out, maximum, total = carry
    return (out / total[..., None]).astype(q.dtype), maximum, total


def _back(statistic: Array, q: Array) -> Array:
    """[b, g, r, q, 1] as [b, q, h]."""
    return jnp.moveaxis(statistic[..., 0], -1, 1).reshape(q.shape[:3])


def _backward_here(
    setting: _Setting,
    q: Array,
    kvs: Arrays,
    tables: Arrays,
    described: Arrays,
    d_out: Array,
    maximum: Array,
    total: Array,
    delta: Array,
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    here = _Here(setting, q, tables, described)
    lengths = _kv_lengths(kvs)
    split = setting.split
    d_q = jnp.zeros(q.shape, jnp.float32)
    d_kvs: dict[str, Array] = {}
    d_tables: dict[str, Array] = {}
    for number in range(len(lengths)):
        names = [f"{name}_{number}" for name in "kv"]
        kv_heads = kvs[names[0]].shape[2] * _size(split, split.kv_heads)
        kv, return_heads = jax.vjp(
            lambda kv, kv_heads=kv_heads: tuple(here.own_heads(x, kv_heads) for x in kv),
            tuple(kvs[name].astype(jnp.float32) for name in names),
        )
        kv = tuple(x.astype(q.dtype) for x in kv)
        table = tables.get(f"table_{number}")

        def go_round(state: Any, step: Array, number: int = number, table: Array | None = table) -> tuple[Any, None]:
            (k, v), of_kv, carry = state
            source = here.round(step)
            seen = here.seen(number, k.shape[1], source)
            following = here.hand_on((k, v))
            queries, d_outs = _by_key_head(q, k), _by_key_head(d_out, k)

            def compute(sums: Any) -> Any:
                (d_k, d_v), (d_q, d_table) = sums
                scores, slope = here.scores(number, queries, k, source)
                if seen is not None:
                    scores = jnp.where(seen, scores, _HIDDEN)
                weights = jnp.exp(scores - _turned(maximum, k)) / _turned(total, k)
                d_weights = jnp.einsum("bqgrx,bkgx->bgrqk", d_outs, v, preferred_element_type=jnp.float32)
                kept, keep = weights, here.keep(number, scores.shape, lengths, source)
                if keep is not None:
                    rate = setting.dropout_rate
                    kept = jnp.where(keep, weights / (1.0 - rate), 0.0)
                    d_weights = jnp.where(keep, d_weights / (1.0 - rate), 0.0)
                d_scores = weights * (d_weights - _turned(delta, k))
                if seen is not None:
                    d_scores = jnp.where(seen, d_scores, 0.0)
                if table is not None:
                    kind, heads = setting.kinds[number], d_scores.shape
                    _, of_table = jax.vjp(lambda table: here.bias(table, kind, k.shape[1], source), table)
                    d_bias = jnp.sum(d_scores, axis=0).reshape(1, -1, *heads[3:])
                    d_table = d_table + of_table(d_bias.astype(table.dtype))[0]
                d_products = (d_scores * slope).astype(q.dtype)
                product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
                d_q = d_q + product("bgrqk,bkgx->bqgrx", d_products, k).reshape(q.shape)
                d_k = d_k + product("bgrqk,bqgrx->bkgx", d_products, queries)
                d_v = d_v + product("bgrqk,bqgrx->bkgx", kept.astype(q.dtype), d_outs)
                return (d_k, d_v), (d_q, d_table)

            of_kv, carry = _if_any(seen, (step == 0) & (number == 0), compute, (of_kv, carry))
            return (following, here.hand_on(of_kv), carry), None

        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in kv)
        d_table = None if table is None else jnp.zeros(table.shape, table.dtype)
        (_, of_kv, (d_q, d_table)), _ = jax.lax.scan(go_round, (kv, zeros, (d_q, d_table)), jnp.arange(here.size))
        (of_kv,) = return_heads(of_kv)
        others = tuple(axis for axis in split.heads if axis not in split.kv_heads)
        for name, x in zip(names, of_kv, strict=True):
            x = jax.lax.psum(x, others) if others else x
            d_kvs[name] = x.astype(kvs[name].dtype)
        if d_table is not None:
            d_tables[f"table_{number}"] = jax.lax.psum(d_table, (*split.batch, *split.length))
    return d_q.astype(q.dtype), d_kvs, d_tables
