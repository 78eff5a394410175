"""Mixture of experts: a router sends each token to a few of several MLPs."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.model import MoEConfig, StackConfig
from t5x_like.kernels.expert_dispatch import apply_experts
from t5x_like.kernels.grouped_mlp import ExpertKernels
from t5x_like.model_output import TOKENS_PER_EXPERT, AuxiliaryLoss
from t5x_like.models.layers import Dense, Mlp, activate, param
from t5x_like.sharding.constrain import constrain, expert_sharding


class Routing(NamedTuple):
    """Routing statistics of a layer. They are sums, so that they can be added over layers and parts of a batch.

    Attributes:
      tokens_per_expert: float32 [E], number of tokens routed to each expert.
      probability: float32 [E], the router's probability of each expert, summed over tokens.
      squared_log_z: float32 scalar, square of the logarithm of the router's softmax normalizer, summed over tokens.
      tokens: float32 scalar, number of tokens.
    """

    tokens_per_expert: Array
    probability: Array
    squared_log_z: Array
    tokens: Array


def load_balancing_loss(routing: Routing) -> Array:
    """Return E * sum over experts of (share of tokens routed to it) * (mean probability), for all layers at once.

    It is experts_per_token if both are uniform (Fedus et al. 2021, equation 4, counted as in Mixtral).

    Args:
      routing: Statistics with layers as first dimension of each array.
    """
    # Sums over layers before the product, as in Mixtral: the layers together are balanced, not each of them.
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), routing)
    tokens = jnp.maximum(total.tokens, 1.0)
    num_experts = total.tokens_per_expert.shape[0]
    return num_experts * jnp.sum(total.tokens_per_expert / tokens * (total.probability / tokens))


def router_losses(name: str, experts: MoEConfig, routing: Routing) -> dict[str, AuxiliaryLoss]:
    """Return the losses of a stack's routers, and load statistics as losses with the coefficient 0.

      moe/aux_loss/<name>: `load_balancing_loss`.
      moe/z_loss/<name>: log(Z)**2, with Z the normalizer of the softmax of the router's logits.
      moe/max_load/<name>: tokens of the expert with most tokens, as a multiple of the mean.
      moe/unused_experts/<name>: fraction of the experts without any token of the batch.
      TOKENS_PER_EXPERT + <name>: the tokens of each expert and layer [N, E], if experts have biases, which they move.

    Args:
      name: Name of the stack.
      experts: Configuration of the experts.
      routing: Statistics with layers as first dimension of each array.
    """
    counts_NxE = routing.tokens_per_expert
    # A batch of padding alone has no tokens; the bound avoids 0 / 0.
    mean_N = jnp.maximum(jnp.mean(counts_NxE, axis=-1), 1e-9)
    tokens = jnp.mean(routing.tokens)
    means = {
        "aux_loss": (load_balancing_loss(routing), experts.router_aux_loss_weight),
        "z_loss": (jnp.mean(routing.squared_log_z) / jnp.maximum(tokens, 1.0), experts.router_z_loss_weight),
        "max_load": (jnp.mean(jnp.max(counts_NxE, axis=-1) / mean_N), 0.0),
        "unused_experts": (jnp.mean(counts_NxE == 0), 0.0),
    }
    losses = {
        # Losses are (sum, weight) pairs that add up over parts of a batch; a mean per token becomes one by
        # multiplication.
        f"moe/{key}/{name}": AuxiliaryLoss(mean * tokens, tokens, coefficient)
        for key, (mean, coefficient) in means.items()
    }
    if experts.bias_update_rate is not None:
        losses[f"{TOKENS_PER_EXPERT}{name}"] = AuxiliaryLoss(counts_NxE, tokens, 0.0)
    return losses


class ExpertWeights(nnx.Module):
    """Kernels [experts, inputs, outputs], one per expert, without biases."""

    def __init__(
        self, num_experts: int, inputs: tuple[str, int], outputs: tuple[str, int], *, scale: float = 1.0, rngs: nnx.Rngs
    ):
        """`scale` is a factor on the initial values, whose standard deviation is inputs**-0.5."""
        shape = (num_experts, inputs[1], outputs[1])
        kernel = scale * inputs[1] ** -0.5 * jax.random.normal(rngs.params(), shape)
        self.kernel = param(kernel, ("experts", inputs[0], outputs[0]))


class MixtureOfExperts(nnx.Module):
    """Sum of the chosen experts' outputs, weighted by the router. An expert is an MLP of the stack's kind.

    Shared experts are one MLP that all tokens take in addition.
    """

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        assert config.experts is not None
        self.activation = config.mlp_activation
        self.experts = config.experts
        count, embed, mlp = config.experts.num_experts, ("embed", config.d_model), ("mlp", config.d_ff)
        self.router = Dense([embed], [("router", count)], stddev=config.d_model**-0.5, use_bias=False, rngs=rngs)
        if config.experts.bias_update_rate is not None:
            self.router_bias = param(jnp.zeros(count), ("router",))
        for name in ("wi_0", "wi_1") if config.mlp_gated else ("wi",):
            setattr(self, name, ExpertWeights(count, embed, mlp, rngs=rngs))
        self.wo = ExpertWeights(count, mlp, embed, scale=config.output_init_scale, rngs=rngs)
        if config.experts.num_shared_experts:
            width = config.experts.num_shared_experts * config.d_ff
            self.shared = Mlp(dataclasses.replace(config, d_ff=width, experts=None), rngs=rngs)

    def __call__(
        self, x_BxLxd: Array, *, valid: Array | None, segment_ids: Array | None = None
    ) -> tuple[Array, Routing]:
        """Return the output [B, L, d] and the routing statistics.

        Args:
          x_BxLxd: States.
          valid: bool [B, L], False for padding, which is not sent to experts and not counted; None: all are valid.
          segment_ids: int32 [B, L], text of each token in packed rows; None: each row is one text.
        """
        # The router computes in float32 (Fedus et al. 2021, selective precision): rounding in bfloat16 changes which
        # experts are chosen.
        logits_BxLxE = self.router(x_BxLxd, jnp.dtype(jnp.float32))
        score_BxLxE = self._scores(logits_BxLxE)
        weight_BxLxk, expert_BxLxk = self._chosen(score_BxLxE)
        if self.experts.normalize_weights:
            weight_BxLxk = weight_BxLxk / jnp.sum(weight_BxLxk, axis=-1, keepdims=True)
        # DeepSeek-V3's `routed_scaling_factor`, which applies after the normalization.
        weight_BxLxk = weight_BxLxk * self.experts.weight_scale
        if valid is not None:
            # The number of experts stands for "no expert": such choices are neither computed nor counted.
            expert_BxLxk = jnp.where(valid[..., None], expert_BxLxk, self.experts.num_experts)
        processed_BxLxk = expert_BxLxk
        if self.experts.capacity is not None:
            processed_BxLxk = self._within_capacity(expert_BxLxk, self.experts.capacity, segment_ids)
        inner = [getattr(self, name) for name in ("wi_0", "wi_1", "wi") if hasattr(self, name)]
        wo, first, *gate = (part.kernel[...].astype(x_BxLxd.dtype) for part in (self.wo, *inner))
        out = apply_experts(
            x_BxLxd,
            processed_BxLxk,
            weight_BxLxk,
            ExpertKernels(first, gate[0] if gate else None, wo),
            functools.partial(activate, activation=self.activation),
            expert_sharding(*x_BxLxd.shape[:2], *first.shape[::2]),
        )
        if self.experts.num_shared_experts:
            out = out + self.shared(x_BxLxd, dropout_rng=None)
        out = constrain(out, ("batch", "length", "embed"))
        return out, self._statistics(logits_BxLxE, score_BxLxE, expert_BxLxk, valid)

    def _chosen(self, score_BxLxE: Array) -> tuple[Array, Array]:
        """Return the scores and the numbers of the chosen experts of each token."""
        if not hasattr(self, "router_bias"):
            return jax.lax.top_k(score_BxLxE, self.experts.experts_per_token)
        # The bias decides about the choice alone. It has no gradient: `training.router_bias` moves it.
        biased_BxLxE = score_BxLxE + jax.lax.stop_gradient(self.router_bias[...])
        _, expert_BxLxk = jax.lax.top_k(biased_BxLxE, self.experts.experts_per_token)
        return jnp.take_along_axis(score_BxLxE, expert_BxLxk, axis=-1), expert_BxLxk

    def _within_capacity(self, expert_BxLxk: Array, capacity: int, segment_ids: Array | None) -> Array:
        """Return the chosen experts, with the number of experts for choices of an expert whose capacity is used up."""
        chosen_BxLxkxE = expert_BxLxk[..., None] == jnp.arange(self.experts.num_experts)
        # In the order of the tokens, and of a token's choices.
        flat = chosen_BxLxkxE.reshape(expert_BxLxk.shape[0], -1, self.experts.num_experts).astype(jnp.int32)
        taken = jnp.cumsum(flat, axis=1)
        if segment_ids is not None:
            starts = jnp.concatenate([jnp.ones_like(segment_ids[:, :1]), jnp.diff(segment_ids, axis=1)], axis=1) != 0
            # A text begins with the first choice of its first token.
            first = jnp.arange(expert_BxLxk.shape[2]) == 0
            starts = (starts[..., None] & first).reshape(starts.shape[0], -1, 1)
            # Counts grow along the row, so that the largest one so far is that of the last start of a text.
            taken -= jax.lax.cummax(jnp.where(starts, taken - flat, 0), axis=1)
        number = jnp.max(jnp.where(chosen_BxLxkxE, taken.reshape(chosen_BxLxkxE.shape), 0), axis=-1)
        return jnp.where(number <= capacity, expert_BxLxk, self.experts.num_experts)

    def _scores(self, logits_BxLxE: Array) -> Array:
        match self.experts.scoring:
            case "softmax":
                return jax.nn.softmax(logits_BxLxE, axis=-1)
            case "sigmoid":
                return jax.nn.sigmoid(logits_BxLxE)
            case unknown:
                assert_never(unknown)

    def _statistics(self, logits: Array, score: Array, expert: Array, valid: Array | None) -> Routing:
        valid_BxL = jnp.ones(logits.shape[:2]) if valid is None else valid.astype(jnp.float32)
        # Choices of padding have the number of experts and count nowhere.
        chosen_BxLxkxE = expert[..., None] == jnp.arange(self.experts.num_experts)
        return Routing(
            tokens_per_expert=jnp.sum(chosen_BxLxkxE.astype(jnp.float32), axis=(0, 1, 2)),
            # Sigmoid scores do not add up to 1; divided by their sum they are comparable to softmax probabilities.
            probability=jnp.einsum("ble,bl->e", score / jnp.sum(score, axis=-1, keepdims=True), valid_BxL),
            squared_log_z=jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * valid_BxL),
            tokens=jnp.sum(valid_BxL),
        )
