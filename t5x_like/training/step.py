"""The training step and the evaluation step: pure functions, without a mesh, that never wait for the host.

The gradient is that of the summed loss of all sub-batches and accumulation parts, divided once by the sum of the loss
weights: how a batch is packed or cut into parts does not change the update. Further losses of the model are means over
the whole batch as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_like.config import RunConfig
from t5x_like.monitoring.metrics import Mean, add
from t5x_like.partitioning.constrain import constrain
from t5x_like.training import freezing
from t5x_like.training.losses import Apply, Batch, batch_metrics, summed_loss
from t5x_like.training.schedules import ScheduleFn

Tree = Any
Metrics = dict[str, Mean]
State = dict[str, Tree]


def make_train_step(
    run: RunConfig, apply: Apply, optimizer: optax.GradientTransformationExtraArgs, schedule: ScheduleFn
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step (state, batch) -> (state, metrics), to be jitted.

    A gradient that is not finite is not applied: parameters and optimizer state stay, the step counts, and the metric
    `nonfinite` says so. That includes gradients whose norm overflows float32 (above 1e19).

    Metrics, besides those of `losses.batch_metrics`: loss_tokens (sum of the loss weights, per step),
    learning_rate, gradient_norm (of the mean loss and what is not frozen, before clipping; of finite steps), nonfinite.
    """
    training = run.training
    parts = training.gradient_accumulation_steps
    denoisers = [objective.name for objective in run.data.objectives]

    def loss_and_metrics(
        params: Tree, batch: Batch, rng: jax.Array, part: jax.Array | int
    ) -> tuple[Metrics, dict[str, float]]:
        return batch_metrics(
            apply,
            params,
            batch,
            jax.random.fold_in(rng, part) if run.model.draws else None,
            z_loss=training.z_loss,
            label_smoothing=training.label_smoothing,
            denoisers=denoisers,
        )

    def part_gradient(
        params: Tree, frozen: Tree, batch: Batch, rng: jax.Array, part: jax.Array | int, of_batch: Metrics | None = None
    ) -> tuple[Tree, Metrics]:
        """`of_batch`: the losses of the whole batch, for their weights; None where the part is all of it."""

        def loss(params: Tree) -> tuple[jax.Array, Metrics]:
            metrics, coefficients = loss_and_metrics(freezing.joined(params, frozen), batch, rng, part)
            return summed_loss(metrics, coefficients, of_batch or metrics), metrics

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, metrics

    def summed_gradient(params: Tree, frozen: Tree, batch: Batch, rng: jax.Array) -> tuple[Tree, Metrics]:
        if parts == 1:
            return part_gradient(params, frozen, batch, rng, 0)

        # Of these sums only weights are used, which depend on the batch alone: the model is traced, but not run.
        metrics, coefficients = loss_and_metrics(freezing.joined(params, frozen), batch, rng, 0)
        of_batch = {name: Mean(jnp.zeros(()), metrics[name].weight) for name in ("loss", *coefficients)}

        def add_part(total: tuple[Tree, Metrics], part: tuple[jax.Array, Batch]) -> tuple[tuple[Tree, Metrics], None]:
            index, batch_part = part
            grads, metrics = part_gradient(params, frozen, batch_part, rng, index, of_batch)
            return (jax.tree.map(jnp.add, total[0], grads), add(total[1], metrics)), None

        split = jax.tree.map(lambda x: split_rows(x, parts), batch)
        shapes = jax.eval_shape(part_gradient, params, frozen, jax.tree.map(lambda x: x[0], split), rng, 0)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add_part, zeros, (jnp.arange(parts), split))[0]

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])
        of = freezing.starts(training.freeze, freezing.paths_of(state["params"]))
        trained, frozen = freezing.split(state["params"], of)
        grads, metrics = summed_gradient(trained, frozen, batch, rng)
        grads = freezing.not_yet(grads, of, state["step"])
        weight = metrics["loss"].weight
        per_token = jnp.where(weight > 0, 1.0 / weight, 0.0)
        norm = optax.tree.norm(grads) * per_token
        finite = jnp.isfinite(norm)
        scale = per_token
        if training.max_gradient_norm is not None:
            scale = per_token * jnp.minimum(1.0, training.max_gradient_norm / jnp.maximum(norm, 1e-30))
        learning_rate = schedule(state["step"])
        at_step = {"step": state["step"]} if training.freeze else {}
        updates, opt_state = optimizer.update(
            jax.tree.map(lambda g: g * scale, grads),
            state["opt_state"],
            trained,
            learning_rate=learning_rate,
            **at_step,
        )
        params = freezing.joined(optax.apply_updates(trained, updates), frozen)

        def unless_skipped(new: Tree, old: Tree) -> Tree:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        one = jnp.ones(())
        is_finite = finite.astype(jnp.float32)
        metrics |= {
            "loss_tokens": Mean(weight, one),
            "learning_rate": Mean(learning_rate, one),
            "gradient_norm": Mean(jnp.where(finite, norm, 0.0), is_finite),
            "nonfinite": Mean(1.0 - is_finite, one),
        }
        new_state = {
            "params": unless_skipped(params, state["params"]),
            "opt_state": unless_skipped(opt_state, state["opt_state"]),
            "step": state["step"] + 1,
            "rng": state["rng"],
        }
        return new_state, metrics

    return step


def make_eval_step(run: RunConfig, apply: Apply) -> Callable[[Tree, Batch], Metrics]:
    """The evaluation (params, batch) -> metrics, to be jitted: no dropout, no label smoothing, the metrics of
    `losses.batch_metrics` and loss_tokens."""
    denoisers = [objective.name for objective in run.data.objectives]

    def step(params: Tree, batch: Batch) -> Metrics:
        metrics, _ = batch_metrics(
            apply, params, batch, None, z_loss=run.training.z_loss, label_smoothing=0.0, denoisers=denoisers
        )
        return metrics | {"loss_tokens": Mean(metrics["loss"].weight, jnp.ones(()))}

    return step


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[rows] or [rows, length] -> [parts, rows / parts, ...], where part p has the rows p, p + parts, p + 2 parts, ...

    With this stride, a device that holds a contiguous share of the rows holds the same share of each part.
    """
    split = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
    return constrain(split, (None, "batch", "length")[: split.ndim])
