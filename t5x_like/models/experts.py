"""A mixture of experts: a router and, in the place of one MLP, several of which each token takes a few."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.model import StackConfig
from t5x_like.models.layers import Dense, activate, param
from t5x_like.partitioning.constrain import constrain


class Routing(NamedTuple):
    """Where the tokens of a layer went; sums, so that they can be added over layers and parts of a batch.

    Attributes:
      chosen: float32 [E], how many tokens chose each expert.
      probability: float32 [E], the router's probability of each expert, summed over tokens.
      tokens: float32 scalar.
    """

    chosen: Array
    probability: Array
    tokens: Array


def load_balancing_loss(routing: Routing) -> Array:
    """E times the sum over experts of (share of tokens that chose it) * (mean probability), for all layers at once:
    experts_per_token where both are even (Fedus et al. 2021, equation 4, as Mixtral counts it).

    Args:
      routing: With layers in front of each array.
    """
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), routing)
    tokens = jnp.maximum(total.tokens, 1.0)
    return total.chosen.shape[0] * jnp.sum(total.chosen / tokens * (total.probability / tokens))


class Experts(nnx.Module):
    """One kernel per expert."""

    def __init__(self, num_experts: int, inputs: tuple[str, int], outputs: tuple[str, int], *, rngs: nnx.Rngs):
        shape = (num_experts, inputs[1], outputs[1])
        kernel = inputs[1] ** -0.5 * jax.random.normal(rngs.params(), shape)
        self.kernel = param(kernel, ("experts", inputs[0], outputs[0]))


class MixtureOfExperts(nnx.Module):
    """The chosen experts' outputs, each (activation(x wi_0) * (x wi_1)) wo, weighted by the router."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        assert config.experts is not None
        self.activation = config.mlp_activation
        self.experts = config.experts
        count, embed, mlp = config.experts.num_experts, ("embed", config.d_model), ("mlp", config.d_ff)
        self.router = Dense([embed], [("router", count)], stddev=config.d_model**-0.5, use_bias=False, rngs=rngs)
        self.wi_0, self.wi_1 = Experts(count, embed, mlp, rngs=rngs), Experts(count, embed, mlp, rngs=rngs)
        self.wo = Experts(count, mlp, embed, rngs=rngs)

    def __call__(self, x_BxLxd: Array, *, valid: Array | None) -> tuple[Array, Routing]:
        """Args:
        valid: bool [B, L], False for padding: it takes no capacity and is not counted. None: all are valid.
        """
        probability_BxLxE = jax.nn.softmax(self.router(x_BxLxd, jnp.dtype(jnp.float32)), axis=-1)
        weight_BxLxk, expert_BxLxk = jax.lax.top_k(probability_BxLxE, self.experts.experts_per_token)
        weight_BxLxk = weight_BxLxk / jnp.sum(weight_BxLxk, axis=-1, keepdims=True)
        chosen_BxLxkxE = jax.nn.one_hot(expert_BxLxk, self.experts.num_experts)
        real_BxL = jnp.ones(x_BxLxd.shape[:2]) if valid is None else valid.astype(jnp.float32)
        routing = Routing(
            chosen=jnp.einsum("blke,bl->e", chosen_BxLxkxE, real_BxL),
            probability=jnp.einsum("ble,bl->e", probability_BxLxE, real_BxL),
            tokens=jnp.sum(real_BxL),
        )
        if self.experts.capacity_factor is None:
            return self._all(x_BxLxd, jnp.einsum("blke,blk->ble", chosen_BxLxkxE, weight_BxLxk)), routing
        return self._dispatched(x_BxLxd, chosen_BxLxkxE * real_BxL[:, :, None, None], weight_BxLxk), routing

    def _all(self, x_BxLxd: Array, weight_BxLxE: Array) -> Array:
        """Every expert on every token: devices that share the experts gather each other's tokens."""
        inner = ("expert_batch", "length", "experts", "mlp")
        x = constrain(x_BxLxd, ("expert_batch", "length", "embed"))
        hidden = self._hidden("bld,edf->blef", x, inner) * weight_BxLxE[..., None].astype(x.dtype)
        return jnp.einsum("blef,efd->bld", hidden, self.wo.kernel[...].astype(x.dtype))

    def _dispatched(self, x_BxLxd: Array, chosen_BxLxkxE: Array, weight_BxLxk: Array) -> Array:
        """Each expert on the tokens that it has room for: first all first choices from left to right, then the second.

        Tokens are sent and fetched by products with [B, L, E, C] arrays of zeros and ones, which any mesh can split.
        Devices that share the experts exchange what is sent, all with all: rows of all experts against all rows of own
        experts, and back.
        """
        rows, length, choices, count = chosen_BxLxkxE.shape
        assert self.experts.capacity_factor is not None
        room = min(length, math.ceil(self.experts.capacity_factor * length * choices / count))
        # An order over the whole row: small, beside what is sent.
        chosen_BxLxkxE = constrain(chosen_BxLxkxE, ("batch", None, None, None))
        in_order = jnp.swapaxes(chosen_BxLxkxE, 1, 2).reshape(rows, choices * length, count)
        place = (jnp.cumsum(in_order, axis=1) - in_order).reshape(rows, choices, length, count)
        slot = jax.nn.one_hot(jnp.swapaxes(place, 1, 2).astype(jnp.int32), room) * chosen_BxLxkxE[..., None]
        slot = constrain(slot, ("batch", "length", None, None, None))
        dtype = x_BxLxd.dtype
        send_BxLxExC = jnp.sum(slot, axis=2).astype(dtype)
        fetch_BxLxExC = jnp.einsum("blkec,blk->blec", slot, weight_BxLxk).astype(dtype)
        of_rows, of_experts = ("batch", None, "capacity", "embed"), ("expert_batch", "experts", "capacity", "embed")
        sent = constrain(jnp.einsum("blec,bld->becd", send_BxLxExC, x_BxLxd), of_rows)
        hidden = self._hidden("becd,edf->becf", constrain(sent, of_experts), (*of_experts[:3], "mlp"))
        out = jnp.einsum("becf,efd->becd", hidden, self.wo.kernel[...].astype(dtype))
        return jnp.einsum("becd,blec->bld", constrain(constrain(out, of_experts), of_rows), fetch_BxLxExC)

    def _hidden(self, product: str, x: Array, names: tuple[str | None, ...]) -> Array:
        gate, value = (jnp.einsum(product, x, part.kernel[...].astype(x.dtype)) for part in (self.wi_0, self.wi_1))
        return constrain(activate(gate, self.activation) * value, names)
