"""Rotary positions (Su et al. 2021), and the scalings of their frequencies for rows longer than those of training."""

from __future__ import annotations

import math
from typing import assert_never

import jax.numpy as jnp
from jax import Array

from t5x_like.config.model import LayerKind, RopeScalingConfig, StackConfig

CosSin = tuple[Array, Array]
"""Cosines and sines of rotary positions."""


def rope(config: StackConfig, kind: LayerKind, positions_BxL: Array, valid_BxL: Array | None = None) -> CosSin:
    """Return (cosines, sines) of the rotary positions of layers of a kind, float32 [B, L, 1, head_dim / 2] each.

    Global and local layers have separate bases and scalings. With YaRN both are multiplied by its attention factor.

    Args:
      config: Configuration of the stack.
      kind: Kind of the layers.
      positions_BxL: int32 positions.
      valid_BxL: False for padding, which does not count towards the length of a row; None: no padding.
    """
    local = kind == "local"
    base = config.local_rope_base if local and config.local_rope_base is not None else config.rope_base
    scaling = config.local_rope_scaling if local else config.rope_scaling
    frequencies = _frequencies(jnp.float32(base), config.head_dim)
    factor = 1.0
    if scaling is not None:
        match scaling.kind:
            case "linear":
                # Equals the interpolation of positions (Chen et al. 2023): angle = position / factor * frequency.
                frequencies = frequencies / scaling.factor
            case "llama3":
                frequencies = _llama3(frequencies, scaling)
            case "yarn":
                frequencies = _yarn(frequencies, scaling, base, config.head_dim)
                factor = scaling.attention_factor
            case "dynamic":
                known = positions_BxL if valid_BxL is None else jnp.where(valid_BxL, positions_BxL, 0)
                frequencies = _dynamic(jnp.max(known, axis=1) + 1, scaling, base, config.head_dim)
            case unknown:
                assert_never(unknown)
    # In float32: in bfloat16 the angle of position 10,000 would be off by up to 32 radians.
    angles = positions_BxL[:, :, None, None].astype(jnp.float32) * frequencies
    # On queries and keys alike, so scores get the factor's square (Peng et al. 2023, section 3.4).
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x_BxLxHxh: Array, cos_sin: CosSin) -> Array:
    """Rotate the pairs (i, i + h / 2): the rotate-half layout of Llama and of Hugging Face checkpoints."""
    cos, sin = cos_sin
    first, second = jnp.split(x_BxLxHxh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxLxHxh.dtype)


def _frequencies(base: Array, head_dim: int) -> Array:
    """Return the angle per position of each rotated pair, float32 [..., head_dim / 2]."""
    # Pair i turns by base^(-2 i / head_dim) per position (Su et al. 2021, section 3.2.2).
    return base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def _llama3(frequencies: Array, scaling: RopeScalingConfig) -> Array:
    # The number of wavelengths in a row of the original training decides. Above `high` frequencies stay, below `low`
    # they are divided by the factor, and between them the two are blended.
    wavelengths = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    # 1 keeps a frequency, 0 divides it; linear in between, as in Llama 3.1's code.
    kept = jnp.clip((wavelengths - low) / (high - low), 0.0, 1.0)
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: Array, scaling: RopeScalingConfig, base: float, head_dim: int) -> Array:
    """Return frequencies of YaRN (Peng et al. 2023, section 3.2): the ramp is linear in the index of the pair."""

    def index(rotations: float) -> float:
        """Return the index of the pair that rotates this often in a row of the original training."""
        # Pair i rotates length * base^(-2 i / head_dim) / (2 pi) times; solved for i.
        ratio = scaling.original_max_positions / (2 * math.pi * rotations)
        return head_dim * math.log(ratio) / (2 * math.log(base))

    first, last = index(scaling.high_frequency_factor), index(scaling.low_frequency_factor)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # The ramp would divide by 0.
    if first == last:
        last += 0.001
    divided = jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - first) / (last - first), 0.0, 1.0)
    return (1.0 - divided) * frequencies + divided * frequencies / scaling.factor


def _dynamic(length_B: Array, scaling: RopeScalingConfig, base: float, head_dim: int) -> Array:
    """Return frequencies of dynamic NTK scaling, float32 [B, 1, 1, head_dim / 2]: beyond the rows of the original
    training the base grows with the length of the row. Keys in a cache keep the frequencies of their time."""
    original = scaling.original_max_positions
    # Rows no longer than those of training keep the base: `stretched` is then 1.
    length = jnp.maximum(length_B, original).astype(jnp.float32)[:, None, None, None]
    stretched = scaling.factor * length / original - (scaling.factor - 1.0)
    return _frequencies(base * stretched ** (head_dim / (head_dim - 2)), head_dim)
