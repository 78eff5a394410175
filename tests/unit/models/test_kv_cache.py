"""Key-value cache: slots of tokens, overwritten tokens, truncated and replaced rows, and the int8 error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.models.kv_cache import KVCache, empty_layer_cache, slot_positions, to_layer_cache

ROWS, HEADS, WIDTH = 3, 2, 4


def tokens(rows, positions):
    """Return keys and values [rows, T, HEADS, WIDTH] that hold their row and position; values are minus the keys."""
    keys = np.zeros((rows, len(positions[0]), HEADS, WIDTH), np.float32)
    keys[..., 0] = np.arange(rows)[:, None, None]
    keys[..., 1] = np.asarray(positions)[..., None]
    return jnp.asarray(keys), -jnp.asarray(keys)


@pytest.mark.parametrize("slots_per_row", [4, 7, 16])
def test_each_cache_slot_holds_its_newest_token(slots_per_row):
    """Prompts of unequal length, then steps of one and of three tokens, some rows standing still: at any time, the
    tokens at the slots that `slot_positions` gives are the row's last ones."""
    widest = 3
    slots = empty_layer_cache(ROWS, HEADS, slots_per_row, WIDTH, jnp.dtype("float32"))
    lengths = np.array([0, 2, 9 if slots_per_row == 16 else 11])
    written = jax.jit(type(slots).append)
    slots = slots.prefill(tokens(ROWS, [np.arange(12)] * ROWS), jnp.asarray(lengths))
    for step, count in enumerate([1, 3, 1, 1, 3]):
        check(slots, lengths, slots_per_row - (widest - 1 if step else 0))
        if slots_per_row == 16 and lengths.max() + count > 16:
            break
        slots = written(slots, tokens(ROWS, lengths[:, None] + np.arange(count)), jnp.asarray(lengths))
        lengths = lengths + np.array([count, count - 1, 1])


def check(slots, lengths, remembered):
    """Assert that the cache has at least the last `remembered` tokens; older ones may have been overwritten."""
    where = np.asarray(slot_positions(jnp.asarray(lengths), slots.size))
    keys, values = np.asarray(slots.keys), np.asarray(slots.values)
    for row, length in enumerate(lengths):
        claimed = {position: slot for slot, position in enumerate(where[row]) if position >= 0}
        assert set(claimed) == set(range(max(length - slots.size, 0), length))
        for position in range(max(length - remembered, 0), length):
            assert (keys[row, :, claimed[position], :2] == [row, position]).all()
    np.testing.assert_array_equal(values, -keys)


def test_cache_rows_can_be_replaced_and_truncated():
    slots = empty_layer_cache(ROWS, HEADS, 8, WIDTH, jnp.dtype("int8"))
    cache = KVCache(jnp.array([2, 5, 0]), (slots.prefill(tokens(ROWS, [np.arange(5)] * ROWS), jnp.array([2, 5, 0])),))
    one = jax.tree.map(lambda leaf: leaf[:1], cache)
    put = cache.insert_rows(2, one)
    for leaf, old in zip(jax.tree.leaves(put), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(leaf, np.asarray(old)[[0, 1, 0]])
    assert cache.truncate(jnp.array([4, 3, 0])).lengths.tolist() == [2, 3, 0], "never longer than it was"


def test_int8_error_is_at_most_half_a_scale():
    random = np.random.default_rng(0)
    keys, values = (jnp.asarray(random.normal(0, 3, (2, 6, HEADS, 16)), jnp.float32) for _ in range(2))
    slots = to_layer_cache((keys.at[0, 0].set(0), values), jnp.dtype("int8"))
    assert slots.keys.dtype == slots.values.dtype == jnp.int8 and slots.key_scales.shape == (2, HEADS, 6)
    for found, expected in zip(slots.dequantize(jnp.dtype("float32")), (keys.at[0, 0].set(0), values), strict=True):
        bound = np.max(np.abs(expected), axis=-1, keepdims=True) / 254
        assert (np.abs(found - expected) <= bound * 1.001).all()
    assert not np.asarray(slots.dequantize(jnp.dtype("float32"))[0])[0, 0].any()
