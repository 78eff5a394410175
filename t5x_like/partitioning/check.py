"""What is wrong with a partitioning, all of it, before anything is compiled."""

from __future__ import annotations

import math
from typing import Any

from t5x_like.config import ConfigError, Problem, RunConfig, batch_spec
from t5x_like.partitioning.activations import activations
from t5x_like.partitioning.rules import AnyMesh, Rules, problems, spec
from t5x_like.partitioning.shardings import Leaf, leaves

Tree = Any

LARGE = 2**24
"""Elements (64 MiB in float32) above which a parameter may not be whole on every device of a mesh that shares
parameters out."""


def check_partitioning(
    run: RunConfig, mesh: AnyMesh, rules: Rules, logical_axes: Tree, abstract_params: Tree
) -> list[Problem]:
    """All problems of `run` on `mesh`; empty if it can be compiled.

    Checked: each logical axis has a rule, no mesh axis splits an array twice, mesh axes divide the dimensions they
    split (key/value heads excepted: see `rules.MAY_STAY_WHOLE`), no large parameter is left whole where parameters are
    shared out, no mesh axis is without work, the rows of every part of a batch divide by the data axes and the lengths
    of its rows by the context axis, and no mesh axis splits an activation twice.

    Args:
      run: The run.
      mesh: Its mesh.
      rules: Its rules.
      logical_axes: A tuple of names per parameter, in a tree like `abstract_params`.
      abstract_params: The parameters or their shapes.
    """
    table = rules.parameters
    found = []
    for leaf in leaves(logical_axes, abstract_params):
        here = problems(leaf.path, leaf.axes, table, leaf.array.shape, mesh)
        found += here
        if not here and _left_whole(leaf, rules, mesh):
            size = " x ".join(map(str, leaf.array.shape))
            expected = f"parameters of more than {LARGE} elements to be split on a mesh that shares parameters out"
            found.append(Problem(leaf.path, f"{size} whole on every device", expected, "give one of its axes a rule"))
    names = {name for leaf in leaves(logical_axes, abstract_params) for name in leaf.axes}
    return [
        *found,
        *_idle_axes(mesh, rules, has_experts="experts" in names),
        *_batch_problems(run, mesh, rules),
        *_length_problems(run, mesh, rules),
        *_activation_problems(run, mesh, rules),
    ]


def _left_whole(leaf: Leaf, rules: Rules, mesh: AnyMesh) -> bool:
    sharing = any(mesh.shape[axis] > 1 for axes in rules.parameters.values() for axis in axes)
    whole = not any(spec(leaf.axes, rules.parameters, leaf.array.shape, mesh))
    return sharing and whole and math.prod(leaf.array.shape) > LARGE


def _idle_axes(mesh: AnyMesh, rules: Rules, *, has_experts: bool) -> list[Problem]:
    tables = (rules.parameters, rules.activations)
    used = {axis for table in tables for axes in table.values() for axis in axes}
    if not has_experts:
        # Their axis splits the batch as well, but that is what data and fsdp are for.
        used -= set(rules.parameters["experts"])
    return [
        Problem(
            f"partitioning.{axis}",
            str(degree),
            "1",
            "nothing in this model is split over it: its devices would repeat each other",
        )
        for axis, degree in mesh.shape.items()
        if degree > 1 and axis not in used
    ]


def _batch_problems(run: RunConfig, mesh: AnyMesh, rules: Rules) -> list[Problem]:
    parts = run.training.gradient_accumulation_steps
    axes = [axis for axis in rules.activations["batch"] if mesh.shape[axis] > 1]
    ways = math.prod(mesh.shape[axis] for axis in axes)
    found = []
    for name, features in batch_spec(run).items():
        rows = next(iter(features.values())).shape[0]
        if rows % (parts * ways):
            split = " x ".join([*(f"{axis}={mesh.shape[axis]}" for axis in axes), f"{parts} accumulation steps"])
            where = "training.batch_size" if name == "main" else f"rows of the sub-batch '{name}'"
            found.append(Problem(where, str(rows), f"a multiple of {parts * ways} ({split})"))
    return found


def _length_problems(run: RunConfig, mesh: AnyMesh, rules: Rules) -> list[Problem]:
    axes = [axis for axis in rules.activations["length"] if mesh.shape[axis] > 1]
    ways = math.prod(mesh.shape[axis] for axis in axes)
    split = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
    found = []
    for name, features in batch_spec(run).items():
        for feature, array in features.items():
            if feature.endswith("_input_tokens") and array.shape[1] % ways:
                where = f"length of {feature}" + ("" if name == "main" else f" in the sub-batch '{name}'")
                fix = "choose another length (data.inputs_length, data.targets_length) or degree"
                found.append(Problem(where, str(array.shape[1]), f"a multiple of {ways} ({split})", fix))
    if ways > 1 and rules.context_attention == "ring" and run.model.attention != "reference":
        fix = 'set model.attention="reference", or partitioning.context_attention="all_gather" to keep the backend'
        where = f'model.attention with {split} and context_attention="ring"'
        found.append(Problem(where, run.model.attention, "reference: the ring attends by blocks of its own", fix))
    return found


def _activation_problems(run: RunConfig, mesh: AnyMesh, rules: Rules) -> list[Problem]:
    found: dict[str, Problem] = {}
    for activation in activations(run):
        try:
            spec(activation.axes, rules.activations, activation.shape, mesh)
        except ConfigError as error:
            for problem in error.problems:
                where = f"activation {activation.path.partition('/')[2]}, axes {', '.join(map(str, activation.axes))}"
                fix = "change partitioning.activation_rules"
                found[f"{where}{problem.found}"] = Problem(where, problem.found, problem.expected, fix)
    return list(found.values())
