"""Training step and evaluation step: pure functions, without a mesh, that never wait for the host.

The gradient is that of the summed loss of all sub-batches and accumulation parts, divided once by the sum of the loss
weights. So the update does not depend on how a batch is packed or cut into parts. Further losses of the model are means
over the whole batch as well.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from t5x_like.config import GuardConfig, RunConfig
from t5x_like.config.training import ParameterType
from t5x_like.monitoring.metrics import WeightedMean, add
from t5x_like.sharding.constrain import constrain
from t5x_like.training import freezing, router_bias
from t5x_like.training.guard import init_guard, is_spike, with_values
from t5x_like.training.losses import Apply, Batch, batch_metrics, summed_loss
from t5x_like.training.norms import PREFIXES, norm_metrics
from t5x_like.training.optimizers.make_optimizer import takes_step
from t5x_like.training.optimizers.schedule_free import gradient_point
from t5x_like.training.schedules import ScheduleFn
from t5x_like.training.stochastic_rounding import rounded_like, widened
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

Metrics = dict[str, WeightedMean]
State = dict[str, PyTree]

_DROPOUT = 0xD509
"""Number folded into the key of the seed. It is part of the meaning of a seed: do not change it."""
_ROUNDING = 0xB1600000
"""Number folded into the run's key for the rounding of parameters; above all numbers of steps, which are folded into
the same key. It is part of the meaning of a seed, too."""


def init_state(
    params: PyTree,
    optimizer: optax.GradientTransformationExtraArgs,
    seed: int,
    *,
    parameter_type: ParameterType = "float32",
    averaged: bool = False,
    guard: GuardConfig | None = None,
) -> State:
    """Return the state before the first step.

    Args:
      params: Initial parameters, float32.
      optimizer: Optimizer of the run.
      seed: Seed of the run.
      parameter_type: Type that the parameters are kept in.
      guard: Guard of the run; None: steps are not compared with earlier ones.
      averaged: True if the run keeps an average of its parameters (`training.ema_decay`).

    Returns:
      A dict of "params"; "opt_state"; "step", int32 [], the number of steps taken; and "rng", uint32 [2], the data of
      the key of all dropout masks; "ema", the average in float32, if there is one; and "guard" (`init_guard`) if steps
      are compared with earlier ones. The key never changes: the key of a step is folded from it and the step.
    """
    # A stream of its own: fold_in(key, n) of the seed's own key is also the key of the n-th parameter's initial values.
    rng = jax.random.fold_in(jax.random.key(seed), _DROPOUT)
    kept = jax.tree.map(lambda x: x.astype(parameter_type), params)
    return {
        "params": kept,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
        "rng": jax.random.key_data(rng),
        **({"ema": widened(kept)} if averaged else {}),
        **({} if guard is None or guard.spike_threshold is None else {"guard": init_guard(guard)}),
    }


def make_train_step(
    run: RunConfig, apply: Apply, optimizer: optax.GradientTransformationExtraArgs, schedule: ScheduleFn
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Return the step (state, batch) -> (state, metrics), to be jitted.

    A step whose loss, gradient or update is not finite, or that is a spike (`GuardConfig`), is not applied: parameters
    and optimizer state keep their values, the step is counted, and the metric `skipped_steps` is 1. That includes
    gradients and updates whose norm overflows float32 (above 1e19).

    Metrics, besides those of `losses.batch_metrics`:
      loss_tokens: Sum of the loss weights per step.
      learning_rate: That of the schedule.
      grad_norm: Global norm of the gradient of the mean loss before clipping, without frozen parameters; finite steps
        only.
      update_norm: Global norm of the change of the parameters, before they are rounded; applied steps only.
      skipped_steps: Fraction of steps that were not applied.
      spikes: Fraction of steps that were not applied because they were spikes; with `guard.spike_threshold` only.
      param_norm/..., gradient_norm/..., update_norm/...: Norms by module and layer (`norms.norm_metrics`) at multiples
        of `monitoring.norms_every_steps`: of the parameters before the step, of the gradient of the mean loss before
        clipping, and of the update. The last two are without frozen parameters.
    """
    training = run.training
    parts = training.gradient_accumulation_steps
    every = run.monitoring.norms_every_steps
    denoisers = [objective.name for objective in run.data.objectives]

    def loss_and_metrics(
        params: PyTree, batch: Batch, rng: jax.Array, part: jax.Array | int
    ) -> tuple[Metrics, dict[str, float]]:
        return batch_metrics(
            apply,
            params,
            batch,
            jax.random.fold_in(rng, part) if run.model.uses_rng else None,
            z_loss=training.z_loss,
            label_smoothing=training.label_smoothing,
            denoisers=denoisers,
            chunk_tokens=training.loss_chunk_tokens,
        )

    def part_gradient(
        params: PyTree,
        frozen: PyTree,
        batch: Batch,
        rng: jax.Array,
        part: jax.Array | int,
        of_batch: Metrics | None = None,
    ) -> tuple[PyTree, Metrics]:
        """Return gradient and metrics of a part; `of_batch` has the weights of the whole batch, None: it is all."""

        def loss(params: PyTree) -> tuple[jax.Array, Metrics]:
            metrics, coefficients = loss_and_metrics(freezing.joined(params, frozen), batch, rng, part)
            return summed_loss(metrics, coefficients, of_batch or metrics), metrics

        # Frozen parameters are no argument of `loss`, so XLA computes no gradient of them.
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, metrics

    def summed_gradient(params: PyTree, frozen: PyTree, batch: Batch, rng: jax.Array) -> tuple[PyTree, Metrics]:
        if parts == 1:
            return part_gradient(params, frozen, batch, rng, 0)

        # Only the weights of these sums are used. They depend on the batch alone, so XLA removes the model itself.
        metrics, coefficients = loss_and_metrics(freezing.joined(params, frozen), batch, rng, 0)
        of_batch = {name: WeightedMean(jnp.zeros(()), metrics[name].weight) for name in ("loss", *coefficients)}

        # The carry holds one gradient and one set of metrics, whatever the number of parts: memory does not grow with
        # accumulation.
        def add_part(
            total: tuple[PyTree, Metrics], part: tuple[jax.Array, Batch]
        ) -> tuple[tuple[PyTree, Metrics], None]:
            index, batch_part = part
            grads, metrics = part_gradient(params, frozen, batch_part, rng, index, of_batch)
            return (jax.tree.map(jnp.add, total[0], widened(grads)), add(total[1], metrics)), None

        split = jax.tree.map(lambda x: split_rows(x, parts), batch)
        # The scan's carry needs zeros of the shapes of a part's gradient and metrics. `eval_shape` finds them without
        # computing.
        shapes = jax.eval_shape(part_gradient, params, frozen, jax.tree.map(lambda x: x[0], split), rng, 0)
        zeros = widened(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
        return jax.lax.scan(add_part, zeros, (jnp.arange(parts), split))[0]

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        # The state keeps one key for the whole run, and each step folds its number in. A resumed run therefore draws
        # the same dropout masks as one that was not interrupted.
        rng = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])
        paths = tree_paths.paths(state["params"])
        of = freezing.unfreeze_steps(training.freeze, paths)
        trained, frozen = freezing.split(state["params"], of)
        grads, metrics = summed_gradient(gradient_point(optimizer, trained, state["opt_state"]), frozen, batch, rng)
        metrics, loads = router_bias.without_counts(metrics)
        # Gradients have the type of their parameters. What is computed from them is float32.
        grads = widened(grads)
        # Parameters that are frozen until a later step have gradients, which are 0 until then: one compiled step serves
        # the whole run.
        grads = freezing.mask_frozen_grads(grads, of, state["step"])
        # A batch without loss tokens has weight 0 and a gradient of 0. The division is skipped, or the update would be
        # NaN.
        weight = metrics["loss"].weight
        per_token = jnp.where(weight > 0, 1.0 / weight, 0.0)
        # The norm of the mean gradient, from that of the summed one. The sum of squares is taken before the division;
        # it overflows float32 for norms above 1e19, which counts as not finite.
        norm = optax.tree.norm(grads) * per_token
        # One factor turns the gradient of the summed loss into that of the mean, and clips it.
        scale = per_token
        if training.max_gradient_norm is not None:
            scale = per_token * jnp.minimum(1.0, training.max_gradient_norm / jnp.maximum(norm, 1e-30))
        # The schedule reads the trainer's step, not the optimizer's count of updates: a skipped update does not shift
        # it.
        learning_rate = schedule(state["step"])
        wide = widened(trained)
        at_step = {"step": state["step"]} if takes_step(training, state["params"]) else {}
        updates, opt_state = optimizer.update(
            jax.tree.map(lambda g: g * scale, grads),
            state["opt_state"],
            wide,
            learning_rate=learning_rate,
            **at_step,
        )
        frozen = router_bias.moved(frozen, loads, run, paths, state["step"])
        params = freezing.joined(optax.apply_updates(wide, updates), frozen)
        rounding = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), _ROUNDING)
        params = rounded_like(params, state["params"], jax.random.fold_in(rounding, state["step"]))
        watched = {"loss": metrics["loss"].sum * per_token, "update_norm": optax.tree.norm(updates)}
        applied = jnp.isfinite(norm) & jnp.isfinite(watched["loss"]) & jnp.isfinite(watched["update_norm"])
        guarded: State = {}
        one = jnp.ones(())
        if "guard" in state:
            spike = applied & is_spike(state["guard"], training.guard, watched)
            applied &= ~spike
            metrics |= {"spikes": WeightedMean(spike.astype(jnp.float32), one)}
            guarded["guard"] = with_values(state["guard"], watched)

        # A `where` over all arrays and not a `cond`: XLA fuses it into the update, and the step stays one program on
        # all devices. The test is of one scalar that all devices have, so they take the same side.
        def unless_skipped(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, old)

        is_applied = applied.astype(jnp.float32)
        metrics |= {
            "loss_tokens": WeightedMean(weight, one),
            "learning_rate": WeightedMean(learning_rate, one),
            # Skipped steps have weight 0 in the mean of the norm. Their inf or NaN must not enter the sum, where it
            # would hide the norms of all steps that are logged together.
            "grad_norm": WeightedMean(jnp.where(applied, norm, 0.0), is_applied),
            "update_norm": WeightedMean(jnp.where(applied, watched["update_norm"], 0.0), is_applied),
            "skipped_steps": WeightedMean(1.0 - is_applied, one),
        }
        if every is not None:

            def trees() -> dict[str, PyTree]:
                gradient = jax.tree.map(lambda g: g * per_token, grads)
                return dict(zip(PREFIXES, (state["params"], gradient, updates), strict=True))

            metrics |= norm_metrics(trees, (state["step"] + 1) % every == 0, applied)
        new_state = {
            "params": unless_skipped(params, state["params"]),
            "opt_state": unless_skipped(opt_state, state["opt_state"]),
            "step": state["step"] + 1,
            "rng": state["rng"],
        }
        if training.ema_decay is not None:
            new_state["ema"] = unless_skipped(
                moving_average(state["ema"], params, training.ema_decay, state["step"]), state["ema"]
            )
        new_state |= {name: unless_skipped(new, state[name]) for name, new in guarded.items()}
        return new_state, metrics

    return step


def moving_average(average: PyTree, params: PyTree, decay: float, step: jax.Array) -> PyTree:
    """Return the exponential moving average after a step.

    Args:
      average: The average before.
      params: Parameters after the step.
      decay: Weight of the old average, which is at most (1 + step) / (10 + step), so that the initial parameters are
        forgotten soon, as in TensorFlow's ExponentialMovingAverage with `num_updates`.
      step: Number of steps taken before.
    """
    weight = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    # In this form, parameters that do not change have exactly their own value as average.
    return jax.tree.map(lambda a, p: a + (weight * (p - a)).astype(a.dtype), average, params)


def make_eval_step(run: RunConfig, apply: Apply) -> Callable[[PyTree, Batch], Metrics]:
    """Return the evaluation (params, batch) -> metrics, to be jitted.

    There is no dropout and no label smoothing. It returns the metrics of `losses.batch_metrics`, and loss_tokens.
    """
    denoisers = [objective.name for objective in run.data.objectives]

    def step(params: PyTree, batch: Batch) -> Metrics:
        metrics, _ = batch_metrics(
            apply,
            params,
            batch,
            None,
            z_loss=run.training.z_loss,
            label_smoothing=0.0,
            denoisers=denoisers,
            chunk_tokens=run.training.loss_chunk_tokens,
        )
        metrics, _ = router_bias.without_counts(metrics)
        return metrics | {"loss_tokens": WeightedMean(metrics["loss"].weight, jnp.ones(()))}

    return step


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """Return [rows] or [rows, length] as [parts, rows / parts, ...]; part p has the rows p, p + parts, p + 2 parts, ...

    With this stride, a device that holds a contiguous share of the rows holds the same share of each part, so that
    accumulation moves no data between devices.
    """
    # [rows] -> [rows / parts, parts] -> [parts, rows / parts]: row r goes to part r mod parts.
    split = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
    return constrain(split, (None, "batch", "length", None)[: split.ndim])
