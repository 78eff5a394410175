"""Shardings of activations, by logical name, for model code that knows no mesh."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from t5x_like.kernels.masks import Split
from t5x_like.partitioning.rules import LogicalAxes, Rules, spec, split_axes


class Constrained(NamedTuple):
    """An activation that `constrain` was called with.

    Attributes:
      place: The method in which it was called.
    """

    place: str
    names: LogicalAxes
    shape: tuple[int, ...]
    dtype: Any
    sharding: NamedSharding


_RECORD: contextvars.ContextVar[list[Constrained] | None] = contextvars.ContextVar("constrained", default=None)
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


@contextlib.contextmanager
def recorded() -> Iterator[list[Constrained]]:
    """Within: what `constrain` is called with, in order, as the function in here is traced."""
    found: list[Constrained] = []
    token = _RECORD.set(found)
    try:
        yield found
    finally:
        _RECORD.reset(token)


def is_split() -> bool:
    """Whether activations are split over the devices of an active mesh."""
    active = _ACTIVE.get()
    return active is not None and active[0].size > 1


def sequence_split(rows: int, lengths: Sequence[int], heads: int, kv_heads: int) -> Split | None:
    """How the arrays of an attention lie on the active mesh if "length" is split there, for `kernels.masks.prepare`.

    None outside a context, where no axis splits the lengths or one of them is no multiple of it, and where the rules
    choose to gather keys and values.

    Args:
      rows: Of the batch.
      lengths: Of the queries, and of other keys than theirs.
      heads, kv_heads: Of queries, and of keys and values.
    """
    active = _ACTIVE.get()
    if active is None or active[1].context_attention != "ring":
        return None
    mesh, rules = active
    over = [split_axes("length", rules.activations, length, mesh) for length in lengths]
    if not over[0] or any(axes != over[0] for axes in over):
        return None
    sizes = {"batch": rows, "heads": heads, "kv_heads": kv_heads}
    axes = {name: split_axes(name, rules.activations, size, mesh) for name, size in sizes.items()}
    return Split(mesh, axes["batch"], over[0], axes["heads"], axes["kv_heads"])


def _caller() -> str:
    """The method that has called `constrain`, by way of functions that it shares with others."""
    frame = sys._getframe(2)
    while "." not in frame.f_code.co_qualname and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_qualname.removesuffix(".<lambda>")


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
    sharding = NamedSharding(mesh, spec(names, rules.activations, x.shape, mesh))
    record = _RECORD.get()
    if record is not None:
        record.append(Constrained(_caller(), names, tuple(x.shape), x.dtype, sharding))
    return jax.lax.with_sharding_constraint(x, sharding)
