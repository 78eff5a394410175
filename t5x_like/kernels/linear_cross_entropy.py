"""Cross-entropy of an output projection, computed in chunks of tokens: the logits of all tokens never exist at once.

The logits of a batch, [tokens, vocabulary] in float32, are the largest array of many training steps, and so is their
gradient. Here a loop computes the logits of one chunk, its losses, and at once the gradients of states and kernel: the
loss is a sum whose weights are known, so its gradient needs nothing that comes later. The backward pass then only
scales them. Compared with `cross_entropy` of whole logits there is no product more.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from t5x_like.kernels.cross_entropy import target_distribution


class LossSharding(NamedTuple):
    """Mesh axes that split the arrays of the loss; () for a dimension that is whole on every device.

    Attributes:
      mesh: The mesh.
      batch: Axes of the rows of states and targets.
      length: Axes of their length.
      vocab: Axes of the kernel's vocabulary.
      embed: Axes over which the gradient of the kernel is left split in its first dimension, as the parameter is.
        Others of `batch` and `length` are summed.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    length: tuple[str, ...]
    vocab: tuple[str, ...]
    embed: tuple[str, ...]


class TokenLosses(NamedTuple):
    """Losses of the tokens of a batch.

    Attributes:
      objective: float32 scalar, the weighted sum of coefficient * loss + z term. It alone has a gradient.
      loss: float32 [rows, length], cross-entropy in nats.
      z_term: float32 [rows, length], z_loss * log(Z)**2.
      is_best: float32 [rows, length], 1 where no other token has a larger logit than the target.
    """

    objective: Array
    loss: Array
    z_term: Array
    is_best: Array


class LossSetting(NamedTuple):
    """Constants of the loss.

    Attributes:
      z_loss: Coefficient of the z term.
      label_smoothing: Smoothing, as in `cross_entropy`.
      coefficient: Factor of the cross-entropy in the objective.
      softcap: Logits x become softcap * tanh(x / softcap); None: no soft cap.
      chunk_tokens: Number of tokens per device whose logits exist at once.
      sharding: Placement of the arrays; None: one device.
      vocab_size: Number of token ids. Further columns of the kernel are padding: they have probability 0 and no
        gradient. None: the kernel has no padding.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    coefficient: float = 1.0
    softcap: float | None = None
    chunk_tokens: int = 512
    sharding: LossSharding | None = None
    vocab_size: int | None = None


class _Gradients(NamedTuple):
    states: Array
    kernel: Array
    bias: Array


def linear_cross_entropy(
    states_BxTxd: Array,
    kernel_dxV: Array,
    bias_V: Array | None,
    targets_BxT: Array,
    weights_BxT: Array,
    setting: LossSetting,
) -> TokenLosses:
    """Return the losses of logits = states @ kernel + bias.

    Products are computed in the type of the states and accumulated in float32. The gradient of the states has their
    type, that of kernel and bias the type of these.

    Args:
      states_BxTxd: float [rows, length, d].
      kernel_dxV: float [d, vocabulary and its padding].
      bias_V: float [vocabulary and its padding]; None: no bias.
      targets_BxT: int [rows, length], in [0, vocabulary).
      weights_BxT: float32 [rows, length], weights of the objective; they have no gradient.
      setting: Constants.
    """
    return TokenLosses(*_losses(setting, states_BxTxd, kernel_dxV, bias_V, targets_BxT, weights_BxT))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(
    setting: LossSetting, states: Array, kernel: Array, bias: Array | None, targets: Array, weights: Array
) -> TokenLosses:
    return _run(setting, states, kernel, bias, targets, weights, with_gradients=False)[0]


def _forward(
    setting: LossSetting, states: Array, kernel: Array, bias: Array | None, targets: Array, weights: Array
) -> tuple[TokenLosses, tuple[_Gradients, Array | None, Array]]:
    losses, gradients = _run(setting, states, kernel, bias, targets, weights, with_gradients=True)
    assert gradients is not None
    return losses, (gradients, bias, targets)


def _backward(
    setting: LossSetting, residuals: tuple[_Gradients, Array | None, Array], cotangents: TokenLosses
) -> tuple[Array, Array, Array | None, np.ndarray, None]:
    gradients, bias, targets = residuals
    scale = cotangents.objective

    def scaled(gradient: Array) -> Array:
        return (gradient * scale).astype(gradient.dtype)

    d_bias = None if bias is None else scaled(gradients.bias).astype(bias.dtype)
    no_gradient = np.zeros(targets.shape, jax.dtypes.float0)
    return scaled(gradients.states), scaled(gradients.kernel), d_bias, no_gradient, None


_losses.defvjp(_forward, _backward)


def _run(
    setting: LossSetting,
    states: Array,
    kernel: Array,
    bias: Array | None,
    targets: Array,
    weights: Array,
    *,
    with_gradients: bool,
) -> tuple[TokenLosses, _Gradients | None]:
    vocabulary = kernel.shape[1] if setting.vocab_size is None else setting.vocab_size
    is_padded = vocabulary < kernel.shape[1]
    # The products read the kernel in the type of the states; its gradient is added up in float32, and then has the
    # kernel's own type.
    local = functools.partial(_on_device, setting, vocabulary, is_padded, with_gradients)
    bias = jnp.zeros(kernel.shape[1], jnp.float32) if bias is None else bias.astype(jnp.float32)
    arrays = (states, kernel.astype(states.dtype), bias, targets, weights)
    sharding = setting.sharding
    if sharding is not None:
        tokens = PartitionSpec(sharding.batch or None, sharding.length or None)
        vocab, embed = sharding.vocab or None, sharding.embed or None
        of_gradients = _Gradients(tokens, PartitionSpec(embed, vocab), PartitionSpec(vocab))  # type: ignore[arg-type]
        local = jax.shard_map(
            local,
            mesh=sharding.mesh,
            in_specs=(tokens, PartitionSpec(None, vocab), PartitionSpec(vocab), tokens, tokens),
            out_specs=((tokens,) * 3, of_gradients if with_gradients else None),
            check_vma=False,
        )
    (loss, z_term, is_best), gradients = local(*arrays)
    if gradients is not None:
        gradients = gradients._replace(kernel=gradients.kernel.astype(kernel.dtype))
    objective = jnp.sum(weights * (setting.coefficient * loss + z_term))
    return TokenLosses(objective, loss, z_term, is_best), gradients


def _on_device(
    setting: LossSetting,
    vocabulary: int,
    is_padded: bool,
    with_gradients: bool,
    states: Array,
    kernel: Array,
    bias: Array,
    targets: Array,
    weights: Array,
) -> tuple[tuple[Array, Array, Array], _Gradients | None]:
    """Return the losses of a device's tokens, and the gradients; chunk after chunk."""
    rows, length, width = states.shape
    count = rows * length
    chunks = max(1, math.ceil(count / setting.chunk_tokens))
    size = math.ceil(count / chunks)
    # Tokens that fill up the last chunk have weight 0.
    padding = chunks * size - count

    def split(x: Array) -> Array:
        flat = x.reshape(count, *x.shape[2:])
        return jnp.pad(flat, ((0, padding), *((0, 0),) * (flat.ndim - 1))).reshape(chunks, size, *flat.shape[1:])

    def joined(x: Array) -> Array:
        return x.reshape(chunks * size, *x.shape[2:])[:count].reshape(rows, length, *x.shape[2:])

    zeros = (jnp.zeros(kernel.shape, jnp.float32), jnp.zeros(bias.shape, jnp.float32)) if with_gradients else None

    def step(
        sums: tuple[Array, Array] | None, chunk: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array] | None, tuple[Array, ...]]:
        losses, d_logits = _chunk(setting, vocabulary, is_padded, kernel, bias, *chunk)
        if sums is None:
            return None, losses
        d_kernel, d_bias = sums
        rounded = d_logits.astype(states.dtype)
        d_states = _dot(rounded, kernel, 1, 1, states.dtype)
        d_kernel = d_kernel + _dot(chunk[0], rounded, 0, 0, jnp.dtype(jnp.float32))
        return (d_kernel, d_bias + jnp.sum(d_logits, axis=0)), (*losses, d_states)

    arrays = split(states), split(targets), split(weights)
    if chunks == 1:
        sums, results = step(zeros, (arrays[0][0], arrays[1][0], arrays[2][0]))
        results = tuple(x[None] for x in results)
    else:
        sums, results = jax.lax.scan(step, zeros, arrays)
    loss, z_term, is_best, *d_states = map(joined, results)
    if sums is None:
        return (loss, z_term, is_best), None
    return (loss, z_term, is_best), _summed(setting.sharding, d_states[0], *sums)


def _summed(sharding: LossSharding | None, d_states: Array, d_kernel: Array, d_bias: Array) -> _Gradients:
    """Return the gradients, summed over the devices that have parts of them."""
    if sharding is None:
        return _Gradients(d_states, d_kernel, d_bias)
    if sharding.vocab:
        d_states = jax.lax.psum(d_states, sharding.vocab)
    tokens = (*sharding.batch, *sharding.length)
    if tokens:
        d_bias = jax.lax.psum(d_bias, tokens)
    whole = tuple(axis for axis in tokens if axis not in sharding.embed)
    if sharding.embed:
        # A reduce-scatter: each device receives the part of the gradient whose parameters it stores.
        d_kernel = jax.lax.psum_scatter(d_kernel, sharding.embed, scatter_dimension=0, tiled=True)
    if whole:
        d_kernel = jax.lax.psum(d_kernel, whole)
    return _Gradients(d_states, d_kernel, d_bias)


def _chunk(
    setting: LossSetting,
    vocabulary: int,
    is_padded: bool,
    kernel: Array,
    bias: Array,
    states: Array,
    targets: Array,
    weights: Array,
) -> tuple[tuple[Array, Array, Array], Array]:
    """Return (loss, z term, is_best) [n] of a chunk of tokens, and the gradient of the objective with respect to
    states @ kernel + bias, [n, V], before the soft cap."""
    axes = () if setting.sharding is None else setting.sharding.vocab
    logits = _dot(states, kernel, 1, 0, jnp.dtype(jnp.float32)) + bias
    slope = None
    if setting.softcap is not None:
        squashed = jnp.tanh(logits / setting.softcap)
        logits, slope = setting.softcap * squashed, 1.0 - jnp.square(squashed)
    # Index of the target among the logits of this device; of no logit if another device has it.
    first = kernel.shape[1] * (jax.lax.axis_index(axes) if axes else 0)
    ids = targets - first
    columns = jax.lax.broadcasted_iota(ids.dtype, logits.shape, 1)
    is_target = columns == ids[:, None]
    is_token = columns < vocabulary - first if is_padded else None
    if is_token is not None:
        logits = jnp.where(is_token, logits, -jnp.inf)
    maximum = jnp.max(logits, axis=-1)
    if axes:
        maximum = jax.lax.pmax(maximum, axes)
    exponentials = jnp.exp(logits - maximum[:, None])
    high, low, entropy = target_distribution(vocabulary, setting.label_smoothing)
    inside = jnp.take_along_axis(logits, jnp.clip(ids, 0, kernel.shape[1] - 1)[:, None], axis=-1)[:, 0]
    inside = jnp.where((ids >= 0) & (ids < kernel.shape[1]), inside, 0.0)
    sums = [jnp.sum(exponentials, axis=-1), inside]
    if low:
        sums.append(jnp.sum(logits if is_token is None else jnp.where(is_token, logits, 0.0), axis=-1))
    if axes:
        sums = list(jax.lax.psum(jnp.stack(sums), axes))
    total, at_target, *all_logits = sums
    log_z = maximum + jnp.log(total)
    loss = log_z - (high - low) * at_target - entropy
    if low:
        loss = loss - low * all_logits[0]
    losses = loss, setting.z_loss * jnp.square(log_z), (at_target >= maximum).astype(jnp.float32)
    # As in `cross_entropy`, with the weights as cotangents.
    coefficient = weights * setting.coefficient
    of_softmax = (coefficient + 2.0 * setting.z_loss * log_z * weights) / total
    others = low if is_token is None else jnp.where(is_token, low, 0.0)
    d_logits = of_softmax[:, None] * exponentials - coefficient[:, None] * jnp.where(is_target, high, others)
    return losses, d_logits if slope is None else d_logits * slope


def _dot(a: Array, b: Array, a_dim: int, b_dim: int, dtype: jnp.dtype) -> Array:
    return jax.lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=dtype)
