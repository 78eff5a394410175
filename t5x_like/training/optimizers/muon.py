"""Muon (Jordan et al. 2024): momentum of each kernel's matrix, orthogonalized; Adam for all other parameters."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
import optax.contrib

from t5x_like.config import MuonConfig
from t5x_like.sharding.constrain import constrain
from t5x_like.sharding.rules import LogicalAxes
from t5x_like.training.optimizers.adamw import is_decayed
from t5x_like.training.optimizers.per_layer import averaged_dims
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

# Layers are split in place of the axis that FSDP splits.
_DISTRIBUTED = {"layers": "matrices"} | {name: name for name in ("experts", "mlp", "heads", "kv_heads")}


def matrix_dims(path: Any, axes: LogicalAxes) -> optax.contrib.MuonDimensionNumbers | None:
    """Return the (input, output) dimensions of a kernel as a matrix; None for parameters that Adam updates.

    Adam updates norms, biases, tables, and the kernels of heads, whose outputs are words or labels. Heads and head_dim
    are one side of a matrix. Dimensions of layers and experts count matrices.
    """
    if tree_paths.path_string(path[-1:]) not in ("kernel", "lora_a", "lora_b") or {"vocab", "labels"} & set(axes):
        return None
    sides: list[list[int]] = []
    for dim in averaged_dims(axes):
        if axes[dim] == "head_dim" and sides:
            sides[-1].append(dim)
        else:
            sides.append([dim])
    return optax.contrib.MuonDimensionNumbers(*sides) if len(sides) == 2 else None


def muon(config: MuonConfig, logical_axes: PyTree) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer for parameters with these logical axes; `update` takes the learning rate as a keyword.

    A kernel's matrix [inputs, outputs] is updated by p -= lr (scale o + weight_decay p), with o the orthogonalized
    momentum and scale `update_rms` * sqrt(max(inputs, outputs)), or sqrt(max(1, outputs / inputs)) if it is None.
    All other parameters are updated as by AdamW.

    The state is sharded as the parameters. For the orthogonalization the layers of a stack are distributed over the
    devices that split "embed" (the activation rule "matrices"), so that no device computes with all of them; dimensions
    that tensor parallelism splits stay split.
    """
    dims = jax.tree_util.tree_map_with_path(matrix_dims, logical_axes, is_leaf=lambda node: isinstance(node, tuple))

    def is_dims(node: Any) -> bool:
        return node is None or isinstance(node, optax.contrib.MuonDimensionNumbers)

    def of_matrices(leaf: Any) -> PyTree:
        """Return a tree with leaf(dimensions, axes) for matrices, in the form in which `optax.partition` masks."""
        masked = optax.MaskedNode()
        return jax.tree.map(
            lambda found, axes: masked if found is None else leaf(found, axes), dims, logical_axes, is_leaf=is_dims
        )

    labels = jax.tree.map(lambda found: "adam" if found is None else "muon", dims, is_leaf=is_dims)
    distributed_axes = of_matrices(lambda _, axes: tuple(_DISTRIBUTED.get(name) for name in axes))
    orthogonalized = optax.contrib.scale_by_muon(
        ns_steps=config.newton_schulz_steps,
        beta=config.beta,
        eps=config.eps,
        weight_dimension_numbers=of_matrices(lambda found, _: found),
    )

    def distributed(tree: PyTree) -> PyTree:
        return jax.tree.map(constrain, tree, distributed_axes)

    def update_matrices(grads: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        return orthogonalized.update(distributed(grads), state._replace(mu=distributed(state.mu)), params)

    directions_of = optax.partition(
        {
            "muon": optax.GradientTransformation(orthogonalized.init, update_matrices),
            "adam": optax.scale_by_adam(config.b1, config.b2, config.eps),
        },
        labels,
    )

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, *, learning_rate: jax.Array
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        directions, state = directions_of.update(grads, state, params)

        def one(path: Any, direction: jax.Array, param: jax.Array, axes: LogicalAxes) -> jax.Array:
            sides = matrix_dims(path, axes)
            # The orthogonalized matrix has singular values near 1, whatever the gradient: its RMS depends on the shape,
            # and the factor makes the updates of all shapes alike.
            if sides is not None:
                inputs, outputs = (math.prod(param.shape[dim] for dim in side) for side in sides)
                if config.update_rms is None:
                    direction = direction * max(1.0, outputs / inputs) ** 0.5
                else:
                    direction = direction * config.update_rms * max(inputs, outputs) ** 0.5
            if config.weight_decay and is_decayed(path, axes):
                direction = direction + config.weight_decay * param
            return -learning_rate * direction

        return jax.tree_util.tree_map_with_path(one, directions, params, logical_axes), state

    return optax.GradientTransformationExtraArgs(directions_of.init, update)
