"""Shardings of activations, by logical name, for model code that knows no mesh."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.sharding import Mesh, NamedSharding

from t5x_like.partitioning.rules import LogicalAxes, Rules, spec

_ACTIVE: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("activation_context", default=None)


@contextlib.contextmanager
def activation_context(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Makes `constrain` place activations on `mesh`. Entered inside the traced function, so that it holds while it is
    traced. A function that is jitted on its own within must not be shared by programs with different meshes: JAX's
    cache does not know of this context."""
    token = _ACTIVE.set((mesh, rules))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def is_split() -> bool:
    """Whether activations are split over the devices of an active mesh."""
    active = _ACTIVE.get()
    return active is not None and active[0].size > 1


def constrain(x: jax.Array, names: LogicalAxes) -> jax.Array:
    """`x`, split over the active mesh by the activation table; `x` itself outside a context or on one device.

    Args:
      x: Any array, traced or not.
      names: The logical axis of each dimension; None for a dimension that stays whole.
    """
    active = _ACTIVE.get()
    if active is None or active[0].size == 1:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names, rules.activations, x.shape, mesh)))
