"""Transfer of hyperparameters from a narrow model to a wide one (muP: Yang et al. 2022, table 3, for Adam)."""

from __future__ import annotations

import dataclasses

from t5x_like.config.optimizers import AdamWConfig
from t5x_like.config.run import RunConfig
from t5x_like.config.training import LearningRateGroup
from t5x_like.errors import ConfigError, ConfigProblem

_MATRICES = (r".*/layers/.*kernel", "head/.*kernel")


def width_transfer(run: RunConfig, base_width: int) -> RunConfig:
    """Return the run with the learning rates and initial values that its width needs if `base_width` was tuned.

    Outputs of all layers and their changes in a step are then of the same size at all widths, so that the learning rate
    that is best at `base_width` is about the best for this run. Kernels of the layers and of the head have the learning
    rate of the schedule times base_width / d_model, and the head's initial values are smaller by
    (base_width / d_model)**0.5 than those of the kernels. Embeddings, norms and biases keep the learning rate. At
    d_model = base_width nothing changes.

    Widths are assumed to grow together: more heads of the same head_dim, and d_ff in proportion to d_model. The
    embeddings must not depend on the width (`embedding_stddev`), which is left to the run.

    Raises:
      ConfigError: the optimizer is not AdamW without `rms_scaled`, the head is tied to the embeddings, the stacks have
        different widths, or the run has groups of learning rates already.
    """
    model, training = run.model, run.training
    widths = {stack.d_model for stack in model.stacks.values()}
    problems = []
    if not isinstance(training.optimizer, AdamWConfig) or training.optimizer.rms_scaled:
        problems.append(ConfigProblem("training.optimizer", training.optimizer.kind, "adamw without rms_scaled"))
    if model.tie_embeddings:
        found = "true: one array would need the values of an embedding and of a head"
        problems.append(ConfigProblem("model.tie_embeddings", found, "false"))
    if len(widths) > 1:
        problems.append(ConfigProblem("model", f"stacks of widths {sorted(widths)}", "stacks of one width"))
    if training.learning_rate_groups:
        problems.append(ConfigProblem("training.learning_rate_groups", "groups", "none: width transfer defines them"))
    if problems:
        raise ConfigError(problems)
    (width,) = widths
    factor = base_width / width
    groups = (LearningRateGroup(paths=_MATRICES, factor=factor),)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(model, head_init_scale=model.head_init_scale * factor**0.5),
        training=dataclasses.replace(training, learning_rate_groups=groups),
    )
