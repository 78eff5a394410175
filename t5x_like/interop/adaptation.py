"""A run's first parameters from another model's, by assignment maps (`config.adaptation`)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from t5x_like import run_directory
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig, ConfigError, InitializeFrom, Problem
from t5x_like.interop import imported
from t5x_like.interop.adapted import restore_whole
from t5x_like.models.build import ModelSpec, abstract
from t5x_like.partitioning.shardings import tree_shardings
from t5x_like.program import Program

Tree = Any
Assignment = dict[str, str | None]
"""The path in the source of each parameter, None for one that keeps its initial value."""
NOISE = 0.1
"""Of a table's new rows, in standard deviations of the old ones."""
_SHOWN = 20


def initial_state(program: Program, report: Callable[[str], None]) -> Tree:
    """The state that a run begins with, sharded: fresh, or with the parameters that its configuration says.

    Raises:
      ConfigError: the maps and the two models do not fit; all that does not is listed.
      UserError: the source cannot be read.
    """
    source = program.run.initialize_from
    if source is None:
        return program.init()
    directory = Path(source.directory)
    spec = abstract(imported.read_model(directory)[0])
    shardings = tree_shardings(program.mesh, program.rules, spec.logical_axes, spec.params)
    wanted = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), spec.params, shardings
    )
    assignment = plan(source, spec, program.spec)
    manager = CheckpointManager(directory / run_directory.CHECKPOINTS, CheckpointConfig(), read_only=True)
    if source.optimizer:
        return _with_optimizer(program, manager, directory, source, report)
    step, params, _ = restore_whole(directory, imported.read_model(directory)[0], source.step, wanted)
    state = program.init()
    shapes = _shapes(spec.params)
    report(f"parameters of step {step} of {directory}:")
    for line in table(assignment, shapes, _shapes(program.spec.params)):
        report(line)
    out = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_params)
    adapted = jax.jit(
        lambda old, new: adapt(assignment, old, new, program.spec, program.run.training.seed), out_shardings=out
    )
    return {**state, "params": adapted(params, state["params"])}


def _with_optimizer(
    program: Program, manager: CheckpointManager, directory: Path, source: InitializeFrom, report: Callable[[str], None]
) -> Tree:
    """Parameters and optimizer state of the same model; step and random key are the run's own."""
    names = ("params", "opt_state") if (directory / imported.MODEL).is_file() else tuple(program.abstract_state)
    step, found, _ = manager.restore({name: program.abstract_state[name] for name in names}, source.step)
    report(f"parameters and optimizer state of step {step} of {directory}")
    return {**program.init(), "params": found["params"], "opt_state": found["opt_state"]}


def plan(source: InitializeFrom, old: ModelSpec, new: ModelSpec) -> Assignment:
    """Which parameter of the source each one of the new model is.

    Raises:
      ConfigError: a rule or pattern without effect, a parameter without a source, shapes that differ.
    """
    theirs, ours = _shapes(old.params), _shapes(new.params)
    assignment, problems = assign(source, theirs, ours)
    axes = _axes(new)
    for path, origin in assignment.items():
        if origin is None or theirs[origin] == ours[path]:
            continue
        may_grow = any(re.fullmatch(pattern, path) for pattern in source.grow)
        grows = _grows(theirs[origin], ours[path], axes[path])
        if not (may_grow and grows):
            found = f"{theirs[origin]} from {origin}"
            fix = f"name the table in initialize_from.grow: {path!r}" if grows else ""
            problems.append(Problem(path, found, str(ours[path]), fix))
    if problems:
        more = len(problems) - _SHOWN
        rest = [Problem("initialize_from", f"{more} more problems", "none")] if more > 0 else []
        raise ConfigError([*problems[:_SHOWN], *rest])
    return assignment


def assign(source: InitializeFrom, theirs: Iterable[str], ours: Iterable[str]) -> tuple[Assignment, list[Problem]]:
    """The rules, applied to the paths of the source's parameters and of the new model's. Knows no shapes."""
    theirs, ours = list(theirs), list(ours)
    problems: list[Problem] = []
    found: Assignment = {}
    for field, patterns in (("fresh", source.fresh), ("grow", source.grow)):
        for number, pattern in enumerate(patterns):
            matched = [path for path in ours if re.fullmatch(pattern, path)]
            if field == "fresh":
                found |= dict.fromkeys(matched)
            if not matched:
                expected = f"a regular expression for whole paths of the new model's parameters, such as {ours[0]}"
                problems.append(Problem(f"initialize_from.{field}.{number}", f"{pattern!r}, unused", expected))
    for number, (pattern, replacement) in enumerate(source.rules):
        used, matches = False, [match for path in theirs if (match := re.fullmatch(pattern, path))]
        for match in matches:
            path = match.expand(replacement)
            if path in ours and path not in found:
                found[path] = match.string
                used = True
        if not used:
            reason = "that match nothing of the source" if not matches else f"such as {matches[0].expand(replacement)}"
            expected = "a rule that leads to a parameter of the new model that no rule before it has led to"
            problems.append(
                Problem(f"initialize_from.rules.{number}", f"{pattern!r} -> {replacement!r}, paths {reason}", expected)
            )
    for path in ours:
        if path not in found:
            fix = "or name it in initialize_from.fresh to keep its initial values"
            problems.append(Problem(path, "no source", "a rule of initialize_from that leads there", fix))
    return {path: found.get(path) for path in ours}, problems


def table(
    assignment: Assignment, theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What comes from where, a line for each parameter; then what of the source is not used."""
    rows = []
    for path, origin in assignment.items():
        if origin is None:
            rows.append((path, str(ours[path]), "fresh"))
        else:
            grown = "" if theirs[origin] == ours[path] else f", grown from {theirs[origin]}"
            rows.append((path, str(ours[path]), f"from {origin}{grown}"))
    rows += [(path, str(theirs[path]), "of the source, not used") for path in theirs if path not in assignment.values()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"  {path:{widths[0]}}  {shape:{widths[1]}}  {origin}" for path, shape, origin in rows]


def adapt(assignment: Assignment, old: Tree, new: Tree, spec: ModelSpec, seed: int) -> Tree:
    """The parameters: copies of those of the source, with grown tables, and the fresh ones of `new`."""
    by_path = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(old)}
    axes = _axes(spec)

    def one(path: Any, fresh: jax.Array) -> jax.Array:
        name = _name(path)
        origin = assignment[name]
        if origin is None:
            return fresh
        value = by_path[origin]
        if value.shape != fresh.shape:
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
            value = grown(value, fresh.shape, axes[name].index("vocab"), key)
        # A parameter that goes to two places must not be one array, which a step would give away twice.
        return jnp.copy(value)

    return jax.tree_util.tree_map_with_path(one, new)


def grown(value: jax.Array, shape: tuple[int, ...], axis: int, key: jax.Array) -> jax.Array:
    """`value` with further rows along `axis`: mean + NOISE * standard deviation * normal, over the rows there are."""
    more = shape[axis] - value.shape[axis]
    mean, deviation = (of(value, axis=axis, keepdims=True) for of in (jnp.mean, jnp.std))
    noise = jax.random.normal(key, (*shape[:axis], more, *shape[axis + 1 :]))
    return jnp.concatenate([value, mean + NOISE * deviation * noise], axis=axis)


def _grows(old: tuple[int, ...], new: tuple[int, ...], axes: tuple[str | None, ...]) -> bool:
    if len(old) != len(new) or "vocab" not in axes:
        return False
    at = axes.index("vocab")
    return new[at] > old[at] and all(a == b for dim, (a, b) in enumerate(zip(old, new, strict=True)) if dim != at)


def _shapes(params: Tree) -> dict[str, tuple[int, ...]]:
    return {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _axes(spec: ModelSpec) -> dict[str, tuple[str | None, ...]]:
    found: dict[str, tuple[str | None, ...]] = {}
    jax.tree_util.tree_map_with_path(
        lambda path, _, axes: found.update({_name(path): axes}), spec.params, spec.logical_axes
    )
    return found


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
