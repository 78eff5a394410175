"""Names of what the layers keep for the backward pass."""

from __future__ import annotations

from typing import Literal, assert_never

Remat = Literal["none", "dots", "mlp", "attention", "qkv", "outputs", "full", "offload"]
"""Policy of recomputation: "none" computes nothing again, "full" and "offload" everything, and the others all but some
products."""
Product = Literal["qkv", "outputs", "mlp"]
"""Products of a layer with its parameters, by what they compute: queries, keys, values and gates of attention; the
outputs of attention, and of an MLP if a norm reads them; the inner activations of an MLP."""


def kept_products(remat: Remat) -> frozenset[Product]:
    """Return the products whose results are kept. Those of routed experts are never among them."""
    match remat:
        case "none" | "dots":
            return frozenset({"qkv", "outputs", "mlp"})
        case "mlp" | "qkv" | "outputs":
            return frozenset({remat})
        case "attention":
            return frozenset({"qkv", "outputs"})
        case "full" | "offload":
            return frozenset()
        case unknown:
            assert_never(unknown)
