"""One block of queries in attention by blocks: the keys that it reaches, and mask, bias and dropout of its scores.

Shape letters: B rows, H heads, G key heads, R query heads per key head, q and k queries and keys of a block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.attention_masks import MaskSpec, dense_mask
from t5x_like.kernels.dropout import keep_mask_block
from t5x_like.kernels.online_softmax import loop_over_blocks, pad_to_blocks
from t5x_like.kernels.position_bias import RelativeBias, dense_bias

_ARRAYS = ("positions", "segment_ids", "prefix")
"""Arrays of a mask, one for the queries and one for the keys each."""


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """Numbers of rows, heads, queries and keys without padding, and the sizes of their blocks.

    Attributes:
      rows: Number of rows.
      heads: Number of query heads.
      q_length: Number of queries.
      kv_lengths: Number of keys of each sequence of keys.
      row_block: Number of rows that are computed together; it divides `rows`.
      q_block: Number of queries of a block.
      kv_blocks: Number of keys of a block, for each sequence of keys.
      joined_keys: Blocks of keys that are known before the program runs are joined if they have no more keys than this.
    """

    rows: int
    heads: int
    q_length: int
    kv_lengths: tuple[int, ...]
    row_block: int
    q_block: int
    kv_blocks: tuple[int, ...]
    joined_keys: int


@dataclasses.dataclass(frozen=True)
class BlockSetting:
    """Static part of a call; hashable, so that `custom_vjp` takes it as an argument that is not differentiated."""

    shape: BlockShape
    softcap: float | None
    dropout_rate: float
    shared_dropout: bool


@functools.partial(jax.tree_util.register_dataclass, data_fields=["masks", "windows", "rng", "keep"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class BlockInputs:
    """Arrays without gradients.

    Attributes:
      masks: Padded mask of each sequence of keys.
      windows: Dynamic window of each sequence of keys, or None.
      rng: Key of the dropout mask, from which each block draws its part; None: no dropout, or `keep` is given.
      keep: The whole dropout mask of each sequence of keys, bool [B, H, 1 or Q, K], padded to whole blocks; None: no
        dropout, or `rng` is given.
    """

    masks: tuple[MaskSpec, ...]
    windows: tuple[Array | None, ...]
    rng: Array | None
    keep: tuple[Array, ...] | None

    def of_rows(self, first: Array | int, shape: BlockShape) -> BlockInputs:
        """Return the inputs of `shape.row_block` rows from `first` on; all rows share an array with one row."""
        if shape.row_block == shape.rows:
            return self

        def part(x: Array) -> Array:
            return x if x.shape[0] == 1 else jax.lax.dynamic_slice_in_dim(x, first, shape.row_block)

        return dataclasses.replace(self, masks=jax.tree.map(part, self.masks), keep=jax.tree.map(part, self.keep))


class Keys(NamedTuple):
    """Keys of a block.

    Attributes:
      number: Number of their sequence of keys.
      start: Index of the first one.
      size: Number of keys.
    """

    number: int
    start: Array | int
    size: int


def padded_mask(mask: MaskSpec, q_block: int, kv_block: int) -> MaskSpec:
    """Return a mask whose arrays are padded to whole blocks."""
    blocks = {"q": q_block, "kv": kv_block}
    changes: dict[str, Any] = {
        f"{side}_{name}": pad_to_blocks(jnp.asarray(x), 1, block)
        for side, block in blocks.items()
        for name in _ARRAYS
        if (x := getattr(mask, f"{side}_{name}")) is not None
    }
    return dataclasses.replace(mask, **changes)


class QueryBlock:
    """One block of queries, and what its scores with blocks of keys need beside queries and keys.

    Attributes:
      start: Index of the first query.
    """

    def __init__(self, setting: BlockSetting, inputs: BlockInputs, start: Array | int, first_row: Array | int):
        self.setting, self.inputs, self.shape = setting, inputs, setting.shape
        self.start, self.first_row = start, first_row

    def over_keys(self, number: int, body: Callable[[Keys, Any], Any], carry: Any) -> Any:
        """Run `body(keys, carry)` for the keys of a sequence that the causal limit and the window can reach.

        They are joined to one block if their limits are known before the program runs and they are few enough.
        """
        low, high = self._range(number)
        block = self.shape.kv_blocks[number]
        if isinstance(low, int) and isinstance(high, int) and high > low:
            size = (high - low) * block
            if size <= max(block, self.shape.joined_keys):
                return body(Keys(number, low * block, size), carry)
        return loop_over_blocks(low, high, lambda j, carry: body(Keys(number, j * block, block), carry), carry)

    def _range(self, number: int) -> tuple[Array | int, Array | int]:
        """Return the first block of keys that the causal limit and the window can reach, and the one after the last.

        Only indices tell: with explicit positions all blocks are read.
        """
        mask, window, block = self.inputs.masks[number], self.inputs.windows[number], self.shape.kv_blocks[number]
        count = -(-self.shape.kv_lengths[number] // block)
        if mask.q_positions is not None or mask.kv_positions is not None:
            return 0, count
        last = self.start + self.shape.q_block - 1
        low: list[Any] = [0]
        high: list[Any] = [count]
        if mask.causal and (mask.q_prefix is None or mask.kv_prefix is None):
            high.append(last // block + 1)
        limits: Any = mask.window if window is None else window
        if limits is not None:
            low.append((self.start - limits[0]) // block)
            high.append((last + limits[1]) // block + 1)
        if all(isinstance(x, int) for x in (*low, *high)):
            return max(low), min(high)
        return functools.reduce(jnp.maximum, low), functools.reduce(jnp.minimum, high)

    def bias(self, keys: Keys, bias: RelativeBias | Array | None) -> Array | None:
        """Return T5's bias of these queries and a block of keys, [1 or B, H, q, k], if there is a bias.

        Args:
          keys: The block of keys.
          bias: Table, or the whole bias [1, H, Q, K], padded to whole blocks.
        """
        if bias is None:
            return None
        if not isinstance(bias, RelativeBias):
            sizes = (*bias.shape[:2], self.shape.q_block, keys.size)
            return jax.lax.dynamic_slice(bias, (0, 0, self.start, keys.start), sizes)
        mask, queries = self.inputs.masks[keys.number], self.shape.q_block
        if mask.q_positions is None and mask.kv_positions is None:
            return dense_bias(bias, queries, keys.size, offset=keys.start - self.start)
        here = self._mask(keys)
        return dense_bias(bias, queries, keys.size, q_positions=here.q_positions, kv_positions=here.kv_positions)

    def visible(self, keys: Keys) -> Array | None:
        """Return the mask of these queries and a block of keys, bool [1 or B, 1, 1, 1 or q, k]; None: all visible."""
        length = self.shape.kv_lengths[keys.number]
        visible = dense_mask(self._mask(keys), self.shape.q_block, keys.size)
        is_whole = length % self.shape.kv_blocks[keys.number] == 0
        if not is_whole and not (isinstance(keys.start, int) and keys.start + keys.size <= length):
            inside = (keys.start + jnp.arange(keys.size) < length)[None, None, None]
            visible = inside if visible is None else visible & inside
        return None if visible is None else visible[:, :, None]

    def _mask(self, keys: Keys) -> MaskSpec:
        """Return the mask of these queries and a block of keys; its positions are given."""
        mask, window = self.inputs.masks[keys.number], self.inputs.windows[keys.number]

        def of(side: str, name: str) -> Array | None:
            x = getattr(mask, f"{side}_{name}")
            start, size = (self.start, self.shape.q_block) if side == "q" else (keys.start, keys.size)
            if x is None:
                return (start + jnp.arange(size))[None] if name == "positions" else None
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        arrays: dict[str, Any] = {f"{side}_{name}": of(side, name) for side in ("q", "kv") for name in _ARRAYS}
        if window is not None:
            arrays["window"] = (window[0], window[1])
        return dataclasses.replace(mask, **arrays)

    def keep(self, keys: Keys, scores: Array) -> Array | None:
        """Return the part of the dropout mask of all scores that belongs to a block of `scores`; None: no dropout.

        It is the mask that the reference draws for the same key.
        """
        if self.setting.dropout_rate == 0.0:
            return None
        shape, shared = self.shape, self.setting.shared_dropout
        queries = 1 if shared else shape.q_block
        if self.inputs.keep is not None:
            starts = (0, 0, 0 if shared else self.start, keys.start)
            keep = jax.lax.dynamic_slice(
                self.inputs.keep[keys.number], starts, (shape.row_block, shape.heads, queries, keys.size)
            )
            return keep.reshape(*scores.shape[:3], *keep.shape[2:])
        assert self.inputs.rng is not None
        keep = keep_mask_block(
            self.inputs.rng,
            1.0 - self.setting.dropout_rate,
            (shape.rows, shape.heads, 1 if shared else shape.q_length, sum(shape.kv_lengths)),
            (self.first_row, 0, 0 if shared else self.start, sum(shape.kv_lengths[: keys.number]) + keys.start),
            (shape.row_block, shape.heads, queries, keys.size),
        )
        return keep.reshape(*scores.shape[:3], *keep.shape[2:])
