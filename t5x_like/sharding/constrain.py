"""Sharding constraints of activations by logical axis name, for model code that knows no mesh."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from t5x_like.kernels.attention_masks import SequenceSharding
from t5x_like.kernels.expert_dispatch import ExpertSharding
from t5x_like.kernels.linear_cross_entropy import LossSharding
from t5x_like.kernels.table_lookup import LookupSharding
from t5x_like.sharding.rules import LogicalAxes, Rules, spec, split_axes


class Constrained(NamedTuple):
    """Record of one call of `constrain`.

    Attributes:
      caller: Qualified name of the method that made the call.
    """

    caller: str
    names: LogicalAxes
    shape: tuple[int, ...]
    dtype: Any
    sharding: NamedSharding


_RECORD: contextvars.ContextVar[list[Constrained] | None] = contextvars.ContextVar("constrained", default=None)
_ACTIVE: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("activation_context", default=None)


@contextlib.contextmanager
def activation_context(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Make `constrain` shard activations over `mesh` while the context is active.

    Enter it inside the traced function, so that it is active during tracing. A function that is jitted on its own
    within must not be shared by programs with different meshes, because JAX's compilation cache does not know of this
    context.
    """
    # A context variable and not a global: two programs may be traced in different threads.
    token = _ACTIVE.set((mesh, rules))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextlib.contextmanager
def record_constraints() -> Iterator[list[Constrained]]:
    """Collect the calls of `constrain`, in order, that are made while the context is active."""
    calls: list[Constrained] = []
    token = _RECORD.set(calls)
    try:
        yield calls
    finally:
        _RECORD.reset(token)


def is_split() -> bool:
    """Return whether activations are split over the devices of an active mesh."""
    active = _ACTIVE.get()
    return active is not None and active[0].size > 1


def active_platform() -> str | None:
    """Return the platform of the devices of an active mesh, such as "tpu"; None outside a context."""
    active = _ACTIVE.get()
    return None if active is None else active[0].devices.flat[0].platform


def sequence_split(rows: int, lengths: Sequence[int], heads: int, kv_heads: int) -> SequenceSharding | None:
    """Return the sharding of the arrays of an attention if "length" is split, for `AttentionBackend.prepare_mask`.

    None outside a context, and if no mesh axis splits the lengths or does not divide one of them.

    Args:
      rows: Rows of the batch.
      lengths: Length of the queries, and of keys from another sequence.
      heads: Number of query heads.
      kv_heads: Number of key and value heads.
    """
    active = _ACTIVE.get()
    if active is None:
        return None
    mesh, rules = active
    over = [split_axes("length", rules.activations, length, mesh) for length in lengths]
    # Blocks are exchanged between the devices of the same axes: queries and keys must be split alike.
    if not over[0] or any(axes != over[0] for axes in over):
        return None
    return _attention_sharding(mesh, rules, over[0], rows, heads, kv_heads)


def attention_placement(rows: int, heads: int, kv_heads: int) -> SequenceSharding | None:
    """Return the sharding of the arrays of an attention whose sequences are whole on each device.

    None outside a context and on a single device. For backends with `needs_placement`; arguments as in
    `sequence_split`.
    """
    active = _ACTIVE.get()
    if active is None or active[0].size == 1:
        return None
    mesh, rules = active
    return _attention_sharding(mesh, rules, (), rows, heads, kv_heads)


def _attention_sharding(
    mesh: Mesh, rules: Rules, length: tuple[str, ...], rows: int, heads: int, kv_heads: int
) -> SequenceSharding:
    sizes = {"batch": rows, "heads": heads, "kv_heads": kv_heads}
    axes = {name: split_axes(name, rules.activations, size, mesh) for name, size in sizes.items()}
    return SequenceSharding(mesh, axes["batch"], length, axes["heads"], axes["kv_heads"], rules.context_attention)


def expert_sharding(rows: int, length: int, experts: int, mlp: int) -> ExpertSharding | None:
    """Return the placement of the tokens [rows, length] and of kernels of experts on the active mesh.

    None outside a context.
    """
    active = _ACTIVE.get()
    if active is None:
        return None
    mesh, rules = active
    sizes = {"batch": rows, "length": length, "experts": experts, "mlp": mlp}
    return ExpertSharding(
        mesh, **{name: split_axes(name, rules.activations, size, mesh) for name, size in sizes.items()}
    )


def loss_sharding(rows: int, length: int, width: int, vocabulary: int) -> LossSharding | None:
    """Return the placement of the states [rows, length, width] and of the kernel [width, vocabulary] of the loss.

    None outside a context and on a single device.
    """
    active = _ACTIVE.get()
    if active is None or active[0].size == 1:
        return None
    mesh, rules = active
    sizes = {"batch": rows, "length": length, "vocab": vocabulary}
    axes = {name: split_axes(name, rules.activations, size, mesh) for name, size in sizes.items()}
    stored = split_axes("embed", rules.parameters, width, mesh)
    summed = (*axes["batch"], *axes["length"])
    return LossSharding(mesh, **axes, embed=tuple(axis for axis in stored if axis in summed))


def lookup_sharding(ids: Sequence[int], table: Sequence[int], names: LogicalAxes) -> LookupSharding | None:
    """Return the placement of ids of the shape `ids`, [rows, length], and of a table from which rows are looked up.

    None outside a context, if the mesh does not split the table, and without ids. Rows of the table that are split over
    axes of the tokens, by a rule of the user, are gathered before the lookup.

    Args:
      ids: Shape of the ids.
      table: Shape of the table.
      names: Logical axes of the table.
    """
    active = _ACTIVE.get()
    if active is None or 0 in ids:
        return None
    mesh, rules = active
    rows, columns = (split_axes(name, rules.parameters, size, mesh) for name, size in zip(names, table, strict=True))
    if not rows and not columns:
        return None
    batch, length, along = (
        split_axes(name, rules.activations, size, mesh)
        for name, size in (("batch", ids[0]), ("length", ids[1]), ("residual_length", ids[1]))
    )
    rows = tuple(axis for axis in rows if axis not in (*batch, *length))
    # As the states between the layers are split.
    scattered = tuple(axis for axis in along if axis in rows) if along[: len(length)] == length else ()
    return LookupSharding(mesh, batch, length, rows, columns, scattered)


def _caller() -> str:
    """Return the name of the method that called `constrain`, skipping plain functions between them."""
    # Methods have a dot in their qualified name, and helpers such as `gather_states` have none: a report names the
    # layer.
    frame = sys._getframe(2)
    while "." not in frame.f_code.co_qualname and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_qualname.removesuffix(".<lambda>")


def constrain(x: jax.Array, names: LogicalAxes) -> jax.Array:
    """Return `x` split over the active mesh by the activation table; `x` unchanged outside a context or on one device.

    Args:
      x: Any array, traced or not.
      names: The logical axis of each dimension; None for a dimension that stays whole.

    Raises:
      ConfigError: A name has no rule, or a mesh axis would split the array twice.
    """
    active = _ACTIVE.get()
    # One device: no constraint enters the program, which then is the plain one.
    if active is None or active[0].size == 1:
        return x
    # Without the constraint XLA chooses the sharding, and where neighbouring operations disagree the array is gathered
    # and split again.
    mesh, rules = active
    sharding = NamedSharding(mesh, spec(names, rules.activations, x.shape, mesh))
    record = _RECORD.get()
    if record is not None:
        record.append(Constrained(_caller(), names, tuple(x.shape), x.dtype, sharding))
    return jax.lax.with_sharding_constraint(x, sharding)
