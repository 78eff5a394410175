"""The layers that everything is made of. Parameters are float32; each layer computes in the type of its input."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.model import Activation, LayerKind, StackConfig
from t5x_like.kernels.matmul import matmul
from t5x_like.kernels.random import keep_mask
from t5x_like.partitioning.constrain import constrain

LogicalAxes = tuple[str | None, ...]


recomputed = functools.partial(jax.checkpoint, prevent_cse=False)
"""Of a function of elementwise work, the backward pass keeps the arguments only. Writing intermediate results to memory
and reading them back costs more than computing them again."""


def param(value: Array, axes: LogicalAxes) -> nnx.Param:
    """A parameter with its logical axes as metadata. Stacked layers get "layers" in front when the tree is read."""
    return nnx.Param(value, logical=axes)


class Dense(nnx.Module):
    """Contracts the last dimensions of x with the first ones of the kernel."""

    def __init__(
        self,
        inputs: Sequence[tuple[str, int]],
        outputs: Sequence[tuple[str, int]],
        *,
        stddev: float,
        use_bias: bool,
        rngs: nnx.Rngs,
    ):
        """Args:
        inputs, outputs: (logical axis, size) of each dimension.
        stddev: Of the kernel at the start.
        """
        axes, shape = zip(*inputs, *outputs, strict=True)
        self.contracted = len(inputs)
        self.kernel = param(stddev * jax.random.normal(rngs.params(), shape), axes)
        self.bias = param(jnp.zeros(shape[len(inputs) :]), axes[len(inputs) :]) if use_bias else None

    def __call__(self, x: Array, dtype: jnp.dtype | None = None) -> Array:
        """`dtype` is that of the result; by default that of x."""
        y = matmul(x, self.kernel[...], self.contracted, dtype or x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Joined(nnx.Module):
    """Several Dense layers on the same input as one product: fewer and larger ones, for decoding."""

    def __init__(self, parts: Sequence[Dense]):
        kernels = [part.kernel[...] for part in parts]
        contracted = parts[0].contracted
        self.contracted = contracted
        self.outputs = tuple(kernel.shape[contracted:] for kernel in kernels)
        axes = (*parts[0].kernel.get_metadata("logical")[:contracted], None)
        flat = [kernel.reshape(*kernel.shape[:contracted], -1) for kernel in kernels]
        self.kernel = param(jnp.concatenate(flat, axis=-1), axes)
        biases = [part.bias[...].reshape(-1) for part in parts if part.bias is not None]
        self.bias = param(jnp.concatenate(biases), (None,)) if biases else None

    def __call__(self, x: Array) -> list[Array]:
        """The result of each layer."""
        y = matmul(x, self.kernel[...], self.contracted, x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        ends = itertools.accumulate(math.prod(shape) for shape in self.outputs[:-1])
        parts = jnp.split(y, list(ends), axis=-1)
        return [part.reshape(*y.shape[:-1], *shape) for part, shape in zip(parts, self.outputs, strict=True)]


class Embedding(nnx.Module):
    """A table of vectors, looked up by id."""

    def __init__(self, rows: tuple[str, int], columns: tuple[str, int], *, stddev: float, rngs: nnx.Rngs):
        self.axes = (rows[0], columns[0])
        self.embedding = param(stddev * jax.random.normal(rngs.params(), (rows[1], columns[1])), self.axes)

    def __call__(self, ids: Array, dtype: jnp.dtype) -> Array:
        """[...] ids to [..., columns]."""
        # Gathered over fsdp before the lookup: left to itself, XLA would replicate the rows that were looked up.
        table = constrain(self.embedding[...], self.axes)
        return jnp.take(table, ids, axis=0, mode="clip").astype(dtype)


class Norm(nnx.Module):
    """RMSNorm (scale only) or LayerNorm (with a bias if the stack has biases); statistics in float32."""

    def __init__(self, config: StackConfig, over: tuple[str, int] | None = None):
        """`over`: logical axis and size of the dimension that is normalised, by default all of a state."""
        axis, width = over or ("norm", config.d_model)
        self.centred = config.norm == "layernorm"
        self.epsilon = config.norm_epsilon
        self.offset = 1.0 if config.norm_scale_from_zero else 0.0
        self.scale = param(jnp.full(width, 1.0 - self.offset), (axis,))
        self.bias = param(jnp.zeros(width), (axis,)) if self.centred and config.use_bias else None

    def __call__(self, x: Array) -> Array:
        @recomputed
        def normalise(x: Array, scale: Array, bias: Array | None) -> Array:
            y = x.astype(jnp.float32)
            if self.offset:
                scale = scale + self.offset
            if self.centred:
                y = y - jnp.mean(y, axis=-1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon) * scale
            return (y if bias is None else y + bias).astype(x.dtype)

        return normalise(x, self.scale[...], None if self.bias is None else self.bias[...])


class Mlp(nnx.Module):
    """activation(x wi) wo, or gated: (activation(x wi_0) * (x wi_1)) wo."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed, mlp = ("embed", config.d_model), ("mlp", config.d_ff)
        stddev = config.d_model**-0.5

        def inner() -> Dense:
            return Dense([embed], [mlp], stddev=stddev, use_bias=config.use_bias, rngs=rngs)

        if config.mlp_gated:
            self.wi_0, self.wi_1 = inner(), inner()
        else:
            self.wi = inner()
        self.wo = Dense([mlp], [embed], stddev=config.d_ff**-0.5, use_bias=config.use_bias, rngs=rngs)

    def __call__(self, x_BxLxd: Array, *, dropout_rng: Array | None) -> Array:
        @recomputed
        def activated(x: Array, gate: Array | None = None) -> Array:
            y = activate(x, self.config.mlp_activation)
            return y if gate is None else y * gate

        if hasattr(self, "joined"):
            hidden = activated(*self.joined(x_BxLxd))
        elif self.config.mlp_gated:
            hidden = activated(self.wi_0(x_BxLxd), self.wi_1(x_BxLxd))
        else:
            hidden = activated(self.wi(x_BxLxd))
        hidden = dropout(hidden, self.config, dropout_rng)
        return self.wo(constrain(hidden, ("batch", "length", "mlp")))

    def join(self) -> None:
        """Makes one product of the two of a gated MLP."""
        if self.config.mlp_gated:
            self.joined = Joined([self.wi_0, self.wi_1])
            del self.wi_0, self.wi_1


def activate(x: Array, activation: Activation) -> Array:
    match activation:
        case "relu":
            return jax.nn.relu(x)
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)


def dropout(x_BxLxD: Array, config: StackConfig, rng: Array | None) -> Array:
    """Zeroes numbers with the stack's rate and scales the rest up; x itself without a key."""
    if rng is None or config.dropout_rate == 0.0:
        return x_BxLxD
    rows, length, width = x_BxLxD.shape
    keep_probability = 1.0 - config.dropout_rate
    keep = keep_mask(rng, keep_probability, (rows, 1 if config.dropout_broadcast_length else length, width))

    @recomputed
    def dropped(x: Array, keep: Array) -> Array:
        return jnp.where(keep, x / keep_probability, 0).astype(x.dtype)

    return dropped(x_BxLxD, keep)


def rope_frequencies(config: StackConfig, kind: LayerKind) -> Array:
    """Angle per position of each rotated pair in layers of this kind, float32 [head_dim / 2] (Su et al. 2021)."""
    local = kind == "local"
    base = config.local_rope_base if local and config.local_rope_base is not None else config.rope_base
    frequencies = base ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None or local:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: how many times a wave fits the rows of the first training decides.
    fits = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = jnp.clip((fits - low) / (high - low), 0.0, 1.0)
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies


def rope(positions_BxL: Array, frequencies: Array) -> tuple[Array, Array]:
    """(cosines, sines), float32 [B, L, 1, head_dim / 2], of rotary positions."""
    angles = positions_BxL[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxLxHxh: Array, cos_sin: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + h / 2): the rotate-half layout of Llama and Hugging Face files."""
    cos, sin = cos_sin
    first, second = jnp.split(x_BxLxHxh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxLxHxh.dtype)


def attention_stddevs(config: StackConfig) -> tuple[float, float, float]:
    """Standard deviations of query, of key and value, and of output kernels at the start.

    T5 has no factor on its scores: with attention_scale 1 it is folded into the query kernel (Mesh TensorFlow's
    `attention_params`).
    """
    d, h = config.d_model, config.head_dim
    query = (d * h) ** -0.5 if config.attention_scale == 1.0 else d**-0.5
    return query, d**-0.5, (config.num_heads * h) ** -0.5


def attention_scale(config: StackConfig) -> float:
    return 1.0 / math.sqrt(config.head_dim) if config.attention_scale is None else config.attention_scale
