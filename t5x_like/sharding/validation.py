"""Checks of a run's sharding before anything is compiled; all problems are reported at once."""

from __future__ import annotations

import math

from jax.sharding import Mesh

from t5x_like.config import RunConfig, batch_spec
from t5x_like.config.batch_spec import rows_per_sub_batch
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.kernels.attention import get_backend
from t5x_like.kernels.attention_backend import AttentionRequest
from t5x_like.kernels.auto_attention import choose
from t5x_like.sharding.attention_choice import sequence_split_of
from t5x_like.sharding.host_memory import host_memory_problems
from t5x_like.sharding.rules import AnyMesh, Rules, problems, spec
from t5x_like.sharding.saved_activations import accumulation_part, activation_kinds
from t5x_like.sharding.shardings import LogicalArray, logical_leaves
from t5x_like.utils.type_aliases import PyTree

LARGE = 2**24
"""Number of elements (64 MiB in float32) above which a parameter must not be replicated on a mesh that shards
parameters."""


def validate_sharding(
    run: RunConfig, mesh: AnyMesh, rules: Rules, logical_axes: PyTree, abstract_params: PyTree
) -> list[ConfigProblem]:
    """Return all problems of `run` on `mesh`; an empty list if it can be compiled.

    The checks: each logical axis has a rule, no mesh axis splits an array twice, mesh axes divide the dimensions that
    they split (except key/value heads, see `rules.MAY_STAY_WHOLE`), no large parameter is replicated on a mesh that
    shards parameters, every mesh axis splits something, the rows of every sub-batch are divisible by the data axes and
    its lengths by the context axis, no mesh axis splits an activation twice, and the devices reach the host memory that
    arrays are to be kept in.

    Args:
      run: The run.
      mesh: Its mesh.
      rules: Its rules.
      logical_axes: A tuple of names per parameter, in a tree like `abstract_params`.
      abstract_params: The parameters or their shapes.
    """
    table = rules.parameters
    parameter_problems = []
    leaves = logical_leaves(logical_axes, abstract_params)
    for leaf in leaves:
        leaf_problems = problems(leaf.path, leaf.axes, table, leaf.array.shape, mesh)
        parameter_problems += leaf_problems
        if not leaf_problems and _is_large_and_replicated(leaf, rules, mesh):
            size = " x ".join(map(str, leaf.array.shape))
            expected = f"parameters of more than {LARGE} elements to be split on a mesh that shards parameters"
            parameter_problems.append(
                ConfigProblem(leaf.path, f"{size} whole on every device", expected, "give one of its axes a rule")
            )
    # The parameters say whether there are experts; the run's configuration is not asked again.
    names = {name for leaf in leaves for name in leaf.axes}
    return [
        *parameter_problems,
        *_unused_axes(mesh, rules, has_experts="experts" in names),
        *_batch_problems(run, mesh, rules),
        *_length_problems(run, mesh, rules),
        *_activation_problems(run, mesh, rules),
        *(host_memory_problems(run, mesh) if isinstance(mesh, Mesh) else ()),
    ]


def _is_large_and_replicated(leaf: LogicalArray, rules: Rules, mesh: AnyMesh) -> bool:
    shards_parameters = any(mesh.shape[axis] > 1 for axes in rules.parameters.values() for axis in axes)
    replicated = not any(spec(leaf.axes, rules.parameters, leaf.array.shape, mesh))
    return shards_parameters and replicated and math.prod(leaf.array.shape) > LARGE


def _unused_axes(mesh: AnyMesh, rules: Rules, *, has_experts: bool) -> list[ConfigProblem]:
    tables = (rules.parameters, rules.activations)
    used = {axis for table in tables for axes in table.values() for axis in axes}
    if not has_experts:
        # The expert axis splits the batch as well, but without experts that is the purpose of data and fsdp.
        used -= set(rules.parameters["experts"])
    return [
        ConfigProblem(
            f"sharding.{axis}",
            str(degree),
            "1",
            "nothing in this model is split over this axis: its devices would all do the same work",
        )
        for axis, degree in mesh.shape.items()
        if degree > 1 and axis not in used
    ]


def _batch_problems(run: RunConfig, mesh: AnyMesh, rules: Rules) -> list[ConfigProblem]:
    parts = run.training.gradient_accumulation_steps
    axes = [axis for axis in rules.activations["batch"] if mesh.shape[axis] > 1]
    shards = math.prod(mesh.shape[axis] for axis in axes)
    batch_problems = []
    for index, stage in enumerate(run.training.batch_size_ramp):
        for name, rows in rows_per_sub_batch(run.data, stage.batch_size).items():
            if rows % (parts * shards):
                where = f"training.batch_size_ramp.{index}.batch_size"
                found = f"{rows} rows" if name == "main" else f"{rows} rows in the sub-batch '{name}'"
                batch_problems.append(ConfigProblem(where, found, f"a multiple of {parts * shards}"))
    for name, features in batch_spec(run).items():
        rows = next(iter(features.values())).shape[0]
        # Accumulation divides the rows first, and each part must still be split evenly.
        if rows % (parts * shards):
            split = " x ".join([*(f"{axis}={mesh.shape[axis]}" for axis in axes), f"{parts} accumulation steps"])
            where = "training.global_batch_size" if name == "main" else f"rows of the sub-batch '{name}'"
            batch_problems.append(ConfigProblem(where, str(rows), f"a multiple of {parts * shards} ({split})"))
    return batch_problems


def _length_problems(run: RunConfig, mesh: AnyMesh, rules: Rules) -> list[ConfigProblem]:
    axes = [axis for axis in rules.activations["length"] if mesh.shape[axis] > 1]
    shards = math.prod(mesh.shape[axis] for axis in axes)
    split = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
    length_problems = []
    for name, features in batch_spec(run).items():
        for feature, array in features.items():
            # Targets, weights and segments have the length of the input tokens of their stack.
            if feature.endswith("_input_tokens") and array.shape[1] % shards:
                where = f"length of {feature}" + ("" if name == "main" else f" in the sub-batch '{name}'")
                fix = "choose another length (data.inputs_length, data.targets_length) or degree"
                expected = f"a multiple of {shards} ({split})"
                length_problems.append(ConfigProblem(where, str(array.shape[1]), expected, fix))
    request = AttentionRequest(split=sequence_split_of(mesh, rules))
    if request.split is not None:
        # Every platform has a candidate of "auto" for a split sequence.
        backend = choose(run.model.attention, None, request).backend
        reason = get_backend(backend).supports(request)
        if reason is not None:
            where = f'model.attention with {split} and context_attention="{request.split.form}"'
            expected = f"a backend that attends over a sequence that is split over devices: {reason}"
            length_problems.append(ConfigProblem(where, run.model.attention, expected))
    return length_problems


def _activation_problems(run: RunConfig, mesh: AnyMesh, rules: Rules) -> list[ConfigProblem]:
    """Return the activations that some mesh axis splits twice, each once whatever the number of sub-batches."""
    by_message: dict[str, ConfigProblem] = {}
    parts = run.training.gradient_accumulation_steps
    for sub_batch in batch_spec(run).values():
        for stack, arrays in activation_kinds(run.model, accumulation_part(sub_batch, parts)).items():
            for array in arrays:
                try:
                    spec(array.axes, rules.activations, array.shape, mesh)
                except ConfigError as error:
                    for problem in error.problems:
                        where = f"activation {stack}/{array.name}, axes {', '.join(map(str, array.axes))}"
                        fix = "change sharding.activation_rules"
                        # By message: sub-batches share layers, and the same problem would be listed once for each.
                        by_message[f"{where}{problem.found}"] = ConfigProblem(
                            where, problem.found, problem.expected, fix
                        )
    return list(by_message.values())
