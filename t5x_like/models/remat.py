"""Recomputation of layers in the backward pass, by the policies of `config.remat`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, assert_never

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from t5x_like.config.remat import Product, Remat, kept_products
from t5x_like.sharding.host_memory import HOST

_LAYER_INPUT = "layer_input"
"""Name of the states between two layers for the policy that keeps them in host memory."""


def name_product(x: Array, product: Product) -> Array:
    """Return the result of a product, with its name for the policies that keep it."""
    return checkpoint_name(x, product)


def name_layer_input(x: Array, remat: Remat) -> Array:
    """Return the states before a layer, with a name if the policy treats them apart."""
    return checkpoint_name(x, _LAYER_INPUT) if remat == "offload" else x


def recompute(layer: Callable[..., Any], remat: Remat, *, is_scanned: bool) -> Callable[..., Any]:
    """Return a layer that keeps for its backward pass what the policy says, and computes the rest again.

    Args:
      layer: The function of one layer.
      remat: The policy.
      is_scanned: The layer is the body of a scan, which keeps the recomputation apart from the forward pass. Otherwise
        a barrier against common-subexpression elimination does.
    """
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return layer
        case "full":
            policy = None
        case "dots":
            # Products of activations with parameters, the routers of experts included, by their form and not by name.
            policy = policies.dots_with_no_batch_dims_saveable
        case "mlp" | "attention" | "qkv" | "outputs":
            policy = policies.save_only_these_names(*kept_products(remat))
        case "offload":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[_LAYER_INPUT],
                offload_src="device",
                offload_dst=HOST,
            )
        case unknown:
            assert_never(unknown)
    return jax.checkpoint(layer, prevent_cse=not is_scanned, policy=policy)
