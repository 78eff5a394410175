"""Slots: where tokens lie, what is forgotten, what rolling back, moving and replacing rows leaves, and int8's error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.models.cache import Cache, empty_slots, slot_positions, stored

ROWS, HEADS, WIDTH = 3, 2, 4


def tokens(rows, positions):
    """Keys and values [rows, T, HEADS, WIDTH] that say their row and position; values are minus the keys."""
    keys = np.zeros((rows, len(positions[0]), HEADS, WIDTH), np.float32)
    keys[..., 0] = np.arange(rows)[:, None, None]
    keys[..., 1] = np.asarray(positions)[..., None]
    return jnp.asarray(keys), -jnp.asarray(keys)


@pytest.mark.parametrize("slots_per_row", [4, 7, 16])
def test_a_slot_holds_the_newest_token_that_belongs_into_it(slots_per_row):
    """Prompts of unequal length, then steps of one and of three tokens, some rows standing still: at any time, the
    tokens that lie where `slot_positions` says are the row's last ones."""
    widest = 3
    slots = empty_slots(ROWS, HEADS, slots_per_row, WIDTH, jnp.dtype("float32"))
    lengths = np.array([0, 2, 9 if slots_per_row == 16 else 11])
    written = jax.jit(type(slots).written)
    slots = slots.filled(tokens(ROWS, [np.arange(12)] * ROWS), jnp.asarray(lengths))
    for step, count in enumerate([1, 3, 1, 1, 3]):
        check(slots, lengths, slots_per_row - (widest - 1 if step else 0))
        if slots_per_row == 16 and lengths.max() + count > 16:
            break
        slots = written(slots, tokens(ROWS, lengths[:, None] + np.arange(count)), jnp.asarray(lengths))
        lengths = lengths + np.array([count, count - 1, 1])


def check(slots, lengths, remembered):
    """`remembered` tokens at least are there; what is claimed and older may have been written over."""
    where = np.asarray(slot_positions(jnp.asarray(lengths), slots.size))
    keys, values = np.asarray(slots.keys), np.asarray(slots.values)
    for row, length in enumerate(lengths):
        claimed = {position: slot for slot, position in enumerate(where[row]) if position >= 0}
        assert set(claimed) == set(range(max(length - slots.size, 0), length))
        for position in range(max(length - remembered, 0), length):
            assert (keys[row, :, claimed[position], :2] == [row, position]).all()
    np.testing.assert_array_equal(values, -keys)


def test_rows_move_are_replaced_and_roll_back():
    slots = empty_slots(ROWS, HEADS, 8, WIDTH, jnp.dtype("int8"))
    cache = Cache(jnp.array([2, 5, 0]), (slots.filled(tokens(ROWS, [np.arange(5)] * ROWS), jnp.array([2, 5, 0])),))
    moved = cache.reorder(jnp.array([1, 1, 0]))
    assert moved.lengths.tolist() == [5, 5, 2]
    for leaf, old in zip(jax.tree.leaves(moved), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(leaf, np.asarray(old)[[1, 1, 0]])
    one = jax.tree.map(lambda leaf: leaf[:1], cache)
    put = cache.put(2, one)
    for leaf, old in zip(jax.tree.leaves(put), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(leaf, np.asarray(old)[[0, 1, 0]])
    assert cache.rolled_back(jnp.array([4, 3, 0])).lengths.tolist() == [2, 3, 0], "never longer than it was"


def test_int8_is_off_by_half_a_scale_at_most():
    random = np.random.default_rng(0)
    keys, values = (jnp.asarray(random.normal(0, 3, (2, 6, HEADS, 16)), jnp.float32) for _ in range(2))
    slots = stored((keys.at[0, 0].set(0), values), jnp.dtype("int8"))
    assert slots.keys.dtype == slots.values.dtype == jnp.int8 and slots.key_scales.shape == (2, HEADS, 6)
    for found, expected in zip(slots.floats(jnp.dtype("float32")), (keys.at[0, 0].set(0), values), strict=True):
        bound = np.max(np.abs(expected), axis=-1, keepdims=True) / 254
        assert (np.abs(found - expected) <= bound * 1.001).all()
    assert not np.asarray(slots.floats(jnp.dtype("float32"))[0])[0, 0].any()
