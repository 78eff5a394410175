"""Learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from t5x_like.config import TrainingConfig

ScheduleFn = Callable[[jax.Array | int], jax.Array]
_COOLDOWNS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: 1.0 - x,
    "one_minus_sqrt": lambda x: 1.0 - jnp.sqrt(x),
    "cosine": lambda x: 0.5 * (1.0 + jnp.cos(jnp.pi * x)),
    "square": lambda x: 1.0 - x**2,
}


def make_schedule(config: TrainingConfig) -> ScheduleFn:
    """Return the function step -> learning rate, a float32 scalar; `ScheduleConfig` has the formulas.

    Steps count from 0. A warm-up of n steps reaches the peak in its last step, n - 1. The rate of its first step, 0, is
    peak / n, so that this step trains as well.
    """
    schedule = config.schedule
    peak, warmup = schedule.learning_rate, schedule.warmup_steps
    end = schedule.decay_steps if schedule.decay_steps is not None else config.num_train_steps

    def progress(step: jax.Array, start: float) -> jax.Array:
        return jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)

    def ramp(step: jax.Array) -> jax.Array:
        return jnp.minimum(1.0, (step + 1) / max(warmup, 1))

    def constant(step: jax.Array) -> jax.Array:
        return ramp(step)

    def rsqrt(step: jax.Array) -> jax.Array:
        return jax.lax.rsqrt(jnp.maximum(step, max(warmup, 1)))

    def cosine(step: jax.Array) -> jax.Array:
        half_cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress(step, warmup)))
        return ramp(step) * (schedule.final_fraction + (1.0 - schedule.final_fraction) * half_cosine)

    def wsd(step: jax.Array) -> jax.Array:
        cooldown_start = end * (1.0 - schedule.cooldown_fraction)
        decay = _COOLDOWNS[schedule.cooldown_shape](progress(step, cooldown_start))
        return ramp(step) * (schedule.final_fraction + (1.0 - schedule.final_fraction) * decay)

    schedule_fn = {"constant": constant, "rsqrt": rsqrt, "cosine": cosine, "wsd": wsd}[schedule.kind]
    return lambda step: jnp.float32(peak) * schedule_fn(jnp.asarray(step, jnp.float32))
