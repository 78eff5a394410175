"""Dense, embedding, norm, MLP, language-model head and dropout layers.

Parameters are float32 or bfloat16; each layer computes in the type of its input. Over the tokens, the gradients of
kernels, tables and norms are added up in float32, those of biases in the type of the activations. A gradient has the
type of its parameter.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.model import Activation, ModelConfig, StackConfig
from t5x_like.config.remat import Product
from t5x_like.errors import ConfigProblem
from t5x_like.kernels.dropout import keep_mask
from t5x_like.kernels.matmul import Quantization, matmul
from t5x_like.kernels.table_lookup import lookup
from t5x_like.model_output import OutputProjection
from t5x_like.models.remat import name_product
from t5x_like.sharding.constrain import constrain, lookup_sharding

LogicalAxes = tuple[str | None, ...]

recomputed = functools.partial(jax.checkpoint, prevent_cse=False)
"""Decorator for elementwise functions whose backward pass keeps the arguments only. Writing intermediate results to
memory and reading them back costs more than computing them again."""


def param(value: Array, axes: LogicalAxes) -> nnx.Param:
    """Return a parameter with its logical axes as metadata.

    The "layers" axis of stacked layers is added when the tree of axes is read (`factory.abstract_model`).
    """
    return nnx.Param(value, logical=axes)


class Dense(nnx.Module):
    """Linear layer that contracts the last dimensions of x with the first ones of the kernel."""

    def __init__(
        self,
        inputs: Sequence[tuple[str, int]],
        outputs: Sequence[tuple[str, int]],
        *,
        stddev: float,
        use_bias: bool,
        rngs: nnx.Rngs,
        quantization: Quantization | None = None,
        product: Product | None = None,
    ):
        """Create the layer.

        Args:
          inputs: (logical axis, size) of each contracted dimension.
          outputs: (logical axis, size) of each output dimension.
          stddev: Standard deviation of the kernel's initial values.
          use_bias: Add a bias.
          rngs: Source of the initial values.
          quantization: Rounding of the product's operands; see `kernels.matmul`.
          product: Name of the result for policies of recomputation that keep it.
        """
        self.quantization = quantization
        self.product = product
        axes, shape = zip(*inputs, *outputs, strict=True)
        # A kernel keeps one dimension per logical axis, [embed, heads, head_dim], so that rules can split the heads;
        # the product contracts all input dimensions at once.
        self.contracted = len(inputs)
        self.kernel = param(stddev * jax.random.normal(rngs.params(), shape), axes)
        self.bias = param(jnp.zeros(shape[len(inputs) :]), axes[len(inputs) :]) if use_bias else None

    def __call__(self, x: Array, dtype: jnp.dtype | None = None) -> Array:
        """Return the product in `dtype`, by default the type of x."""
        y = matmul(x, self.kernel[...], self.contracted, dtype or x.dtype, self.quantization)
        y = y if self.bias is None else y + self.bias[...].astype(y.dtype)
        return y if self.product is None else name_product(y, self.product)


def quantization_problems(config: ModelConfig) -> Iterator[ConfigProblem]:
    """Yield a problem if products are to be rounded to 8 bits and qwix, which does it, is not installed."""
    stacks = {**config.stacks, **({} if config.generator is None else {"generator": config.generator})}
    for name, stack in stacks.items():
        if stack.quantization is not None and importlib.util.find_spec("qwix") is None:
            expected = "None, or qwix: pip install 't5x-like[quantization]'"
            yield ConfigProblem(f"model.{name}.quantization", stack.quantization, expected)


class FusedDense(nnx.Module):
    """Several Dense layers on the same input as one product: fewer and larger products, for decoding."""

    def __init__(self, parts: Sequence[Dense]):
        kernels = [part.kernel[...] for part in parts]
        contracted = parts[0].contracted
        self.contracted = contracted
        self.quantization = parts[0].quantization
        self.outputs = tuple(kernel.shape[contracted:] for kernel in kernels)
        axes = (*parts[0].kernel.get_metadata("logical")[:contracted], None)
        # Outputs of all layers lie side by side in one dimension, which has no logical axis: it is not sharded.
        flat = [kernel.reshape(*kernel.shape[:contracted], -1) for kernel in kernels]
        self.kernel = param(jnp.concatenate(flat, axis=-1), axes)
        biases = [part.bias[...].reshape(-1) for part in parts if part.bias is not None]
        self.bias = param(jnp.concatenate(biases), (None,)) if biases else None

    def __call__(self, x: Array) -> list[Array]:
        """Return the result of each layer."""
        y = matmul(x, self.kernel[...], self.contracted, x.dtype, self.quantization)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        ends = itertools.accumulate(math.prod(shape) for shape in self.outputs[:-1])
        parts = jnp.split(y, list(ends), axis=-1)
        return [part.reshape(*y.shape[:-1], *shape) for part, shape in zip(parts, self.outputs, strict=True)]


class Embedding(nnx.Module):
    """Table of vectors, looked up by id."""

    def __init__(
        self, rows: tuple[str, int], columns: tuple[str, int], *, stddev: float, rngs: nnx.Rngs, padding: int = 0
    ):
        """Create the table.

        Args:
          rows: Logical axis and number of the ids.
          columns: Logical axis and size of a vector.
          stddev: Standard deviation of the initial values.
          rngs: Source of the initial values.
          padding: Number of rows of zeros after those of the ids.
        """
        self.axes = (rows[0], columns[0])
        self.last_id = rows[1] - 1
        values = stddev * jax.random.normal(rngs.params(), (rows[1], columns[1]))
        self.embedding = param(with_zeros(values, padding, 0), self.axes)

    def __call__(self, ids: Array, dtype: jnp.dtype) -> Array:
        """Return the vectors [..., columns] of ids [...]. Ids beyond the table take the row of the last id."""
        table = self.embedding[...]
        if self.last_id < table.shape[0] - 1:
            ids = jnp.minimum(ids, self.last_id)
        flat = ids.reshape(math.prod(ids.shape[:-1]), ids.shape[-1])
        sharding = lookup_sharding(flat.shape, table.shape, self.axes)
        rows = lookup(table, flat, dtype, sharding)
        return rows.reshape(*ids.shape, table.shape[1])


class Norm(nnx.Module):
    """RMSNorm (scale only) or LayerNorm (with a bias if the stack has biases); statistics in float32."""

    def __init__(self, config: StackConfig, over: tuple[str, int] | None = None, *, has_parameters: bool | None = None):
        """Create the layer.

        Args:
          config: The stack.
          over: Logical axis and size of the normalized dimension; None: the model's width.
          has_parameters: Whether there are a scale and, with biases, a bias; None: as the stack says.
        """
        axis, width = over or ("norm", config.d_model)
        match config.norm:
            case "layernorm":
                self.centered = True
            case "rmsnorm":
                self.centered = False
            case unknown:
                assert_never(unknown)
        self.epsilon = config.norm_epsilon
        self.offset = 1.0 if config.norm_scale_plus_one else 0.0
        has_parameters = config.norm_parameters if has_parameters is None else has_parameters
        has_bias = has_parameters and self.centered and config.use_bias
        self.scale = param(jnp.full(width, 1.0 - self.offset), (axis,)) if has_parameters else None
        self.bias = param(jnp.zeros(width), (axis,)) if has_bias else None

    def __call__(self, x: Array) -> Array:
        @recomputed
        def normalize(x: Array, scale: Array | None, bias: Array | None) -> Array:
            y = x.astype(jnp.float32)
            if self.offset and scale is not None:
                # Gemma stores scale - 1. The sum is in float32, where 1 + a small number is not rounded away.
                scale = scale.astype(jnp.float32) + self.offset
            if self.centered:
                y = y - jnp.mean(y, axis=-1, keepdims=True)
            # With centering this is LayerNorm, without it RMSNorm: the mean square is then the variance.
            y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
            y = y if scale is None else y * scale
            return (y if bias is None else y + bias).astype(x.dtype)

        scale, bias = (None if parameter is None else parameter[...] for parameter in (self.scale, self.bias))
        return normalize(x, scale, bias)


class Mlp(nnx.Module):
    """MLP: activation(x wi) wo, or gated: (activation(x wi_0) * (x wi_1)) wo. The factor of wo may be normalized."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed, mlp = ("embed", config.d_model), ("mlp", config.d_ff)
        stddev = config.d_model**-0.5
        use_bias = config.use_bias if config.mlp_bias is None else config.mlp_bias
        dense = functools.partial(Dense, use_bias=use_bias, rngs=rngs, quantization=config.quantization)

        def inner() -> Dense:
            return dense([embed], [mlp], stddev=stddev, product="mlp")

        if config.mlp_gated:
            self.wi_0, self.wi_1 = inner(), inner()
        else:
            self.wi = inner()
        out_stddev = config.output_init_scale * config.d_ff**-0.5
        self.wo = dense([mlp], [embed], stddev=out_stddev)
        if config.norm_placement in ("normformer", "sub"):
            self.norm = Norm(config, ("norm", config.d_ff))

    def __call__(self, x_BxLxd: Array, *, dropout_rng: Array | None) -> Array:
        @recomputed
        def activated(x: Array, gate: Array | None = None) -> Array:
            y = activate(x, self.config.mlp_activation)
            return y if gate is None else y * gate

        if hasattr(self, "fused"):
            hidden = activated(*self.fused(x_BxLxd))
        elif self.config.mlp_gated:
            hidden = activated(self.wi_0(x_BxLxd), self.wi_1(x_BxLxd))
        else:
            hidden = activated(self.wi(x_BxLxd))
        hidden = self.norm(hidden) if hasattr(self, "norm") else hidden
        hidden = dropout(hidden, self.config, dropout_rng)
        return self.wo(constrain(hidden, ("batch", "length", "mlp")))

    def fuse(self) -> None:
        """Replace the two input products of a gated MLP by one."""
        if self.config.mlp_gated:
            self.fused = FusedDense([self.wi_0, self.wi_1])
            del self.wi_0, self.wi_1


class LMHead(nnx.Module):
    """Language-model head: BERT's transform if configured, the token table or a separate kernel, and a bias."""

    def __init__(self, config: ModelConfig, stack: StackConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.activation = config.lm_head_activation or stack.mlp_activation
        embed = ("embed", stack.d_model)
        stddev = stack.d_model**-0.5
        width = stack.d_model
        if config.lm_head_transform:
            width = config.lm_head_width
            self.transform = Dense([embed], [("mlp", width)], stddev=stddev, use_bias=stack.use_bias, rngs=rngs)
            self.transform_norm = Norm(stack, ("norm", width))
        if not config.tie_embeddings:
            stddev = config.head_init_scale * width**-0.5
            values = stddev * jax.random.normal(rngs.params(), (width, config.vocab_size))
            self.kernel = param(with_zeros(values, config.vocab_padding_rows, 1), ("embed", "vocab"))
        if config.head_bias:
            self.bias = param(jnp.zeros(config.padded_vocab_size), ("vocab",))

    def __call__(self, x_BxLxd: Array, table_Vxd: Array) -> Array:
        """Return the logits, float32 [B, L, V]; `table_Vxd` is read if the embeddings are tied."""
        return self.logits(self.projection(x_BxLxd, table_Vxd))

    def projection(self, x_BxLxd: Array, table_Vxd: Array) -> OutputProjection:
        """Return the factors of the logits of states [B, L, d]."""
        x = x_BxLxd
        if self.config.lm_head_transform:
            x = self.transform_norm(activate(self.transform(x), self.activation))
        if self.config.scale_logits:
            # T5 1.0 initializes its tied table with standard deviation 1; without the factor, logits would grow with
            # the width.
            x = x * x.shape[-1] ** -0.5
        kernel = table_Vxd.T if self.config.tie_embeddings else self.kernel[...]
        bias = self.bias[...] if self.config.head_bias else None
        return OutputProjection(x, kernel, bias, self.config.logits_softcap, self.config.vocab_size)

    def logits(self, projection: OutputProjection) -> Array:
        """Return the logits, float32 [B, L, V], of their factors."""
        # Logits are accumulated and kept in float32, whatever the type of the states: the loss is a small difference of
        # large numbers.
        logits = matmul(projection.states, projection.kernel, 1, jnp.dtype(jnp.float32))
        if projection.bias is not None:
            logits = logits + projection.bias
        if projection.softcap is not None:
            logits = projection.softcap * jnp.tanh(logits / projection.softcap)
        logits = constrain(logits, ("batch", "length", "vocab"))
        # Padding has no logits: nothing that reads them, such as sampling or a divergence, needs to know of it.
        return logits[..., : projection.vocab_size] if projection.is_padded else logits


def with_zeros(values: Array, count: int, axis: int) -> Array:
    """Return `values` with `count` zeros after the others along an axis."""
    return jnp.pad(values, [(0, count if dim == axis else 0) for dim in range(values.ndim)]) if count else values


def activate(x: Array, activation: Activation) -> Array:
    """Apply an activation function."""
    match activation:
        case "relu":
            return jax.nn.relu(x)
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case unknown:
            assert_never(unknown)


def dropout(x_BxLxD: Array, config: StackConfig, rng: Array | None) -> Array:
    """Set elements to 0 at the stack's rate and scale the others up; return x itself without a key."""
    if rng is None or config.dropout_rate == 0.0:
        return x_BxLxD
    rows, length, width = x_BxLxD.shape
    keep_probability = 1.0 - config.dropout_rate
    keep = keep_mask(rng, keep_probability, (rows, 1 if config.dropout_broadcast_length else length, width))

    @recomputed
    def dropped(x: Array, keep: Array) -> Array:
        return jnp.where(keep, x / keep_probability, 0).astype(x.dtype)

    return dropped(x_BxLxD, keep)


def attention_stddevs(config: StackConfig) -> tuple[float, float, float]:
    """Return the initial standard deviations of the query kernel, the key and value kernels, and the output kernel.

    T5 does not scale its scores: with attention_scale 1 the factor is folded into the query kernel (Mesh TensorFlow's
    `attention_params`).
    """
    d, h = config.d_model, config.head_dim
    # h^-0.5 is the factor that scores would otherwise be multiplied by.
    query = (d * h) ** -0.5 if config.attention_scale == 1.0 else d**-0.5
    return query, d**-0.5, config.output_init_scale * (config.num_heads * h) ** -0.5


def attention_scale(config: StackConfig) -> float:
    """Return the factor on the attention scores."""
    return 1.0 / math.sqrt(config.head_dim) if config.attention_scale is None else config.attention_scale
