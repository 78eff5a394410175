"""Optimization: the loss, the optimizer, its schedule, and how long to train."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from t5x_like.config.base import configuration


@configuration
class Adafactor:
    """Adafactor with T5X's semantics: no momentum, second moments factored by logical axis, update clipping, and steps
    relative to each parameter's own scale (Shazeer and Stern 2018; T5X's `adafactor.py`)."""

    kind: Literal["adafactor"] = "adafactor"
    decay_rate: float = 0.8
    """beta2 at step t is 1 - t**-decay_rate."""
    clipping_threshold: float | None = 1.0
    """Upper bound on the root mean square of an update."""
    multiply_by_parameter_scale: bool = True
    epsilon1: float = 1e-30
    epsilon2: float = 1e-3
    """Lower bound on a parameter's scale."""
    min_dim_size_to_factor: int = 128
    momentum: float | None = None
    weight_decay: float = 0.0


@configuration
class AdamW:
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only, not to norms, biases and relative-position tables."""
    rms_scaled: bool = False
    """Scale each update by the root mean square of its parameter, which T5 needs to train with Adam (nanoT5)."""


Optimizer = Annotated[Adafactor | AdamW, pydantic.Field(discriminator="kind")]


@configuration
class Schedule:
    """Learning rate by step.

    constant: linear warm-up, then `learning_rate`.
    rsqrt: learning_rate / sqrt(max(step, warmup_steps)), T5's law: flat, with no ramp, until warmup_steps.
    cosine: linear warm-up, then half a cosine down to `final_fraction` of the peak at `decay_steps`.
    wsd: linear warm-up, stable, then linear over the last `cooldown_fraction` of `decay_steps` to `final_fraction`.
    """

    kind: Literal["constant", "rsqrt", "cosine", "wsd"] = "rsqrt"
    learning_rate: float = 1.0
    warmup_steps: int = 10_000
    decay_steps: int | None = None
    """Step at which the decay ends; None means training.num_train_steps."""
    cooldown_fraction: float = 0.2
    final_fraction: float = 0.0


@configuration
class Freeze:
    """Parameters that do not train: they have no optimizer state and no part in the gradient's norm."""

    paths: tuple[str, ...]
    """Regular expressions; a parameter is meant whose whole path one of them matches, as in
    `encoder/layers/self_attention/query/kernel`. One that matches none is refused."""
    until_step: int | None = None
    """The step at which they begin to train, as in a run that begins there; None: never."""


@configuration
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): kernels W + (alpha / rank) A B, of which only A and B are trained.

    Checkpoints hold the adapters and the optimizer's state of them. The base is known by its numbers, not by its place.
    """

    base: str
    """Directory of the parameters W: a run, or what `t5x-like convert` wrote."""
    rank: int = 8
    alpha: float = 16.0
    paths: tuple[str, ...] = (r".*attention/(query|value)/kernel",)
    """Regular expressions for whole paths of kernels, as in `decoder/layers/mlp/wo/kernel`. All layers of a stack are
    one kernel, and so are all experts."""


@configuration
class TrainingConfig:
    num_train_steps: int
    batch_size: int
    """Rows of a global batch: of one optimizer step, over all devices and accumulation steps."""
    gradient_accumulation_steps: int = 1
    """Parts in which a step's batch goes through the model. The result is that of the whole batch."""
    optimizer: Optimizer = Adafactor()
    schedule: Schedule = Schedule()
    max_gradient_norm: float | None = 1.0
    """Global norm to which the gradient of the mean loss is clipped; None for no clipping."""
    z_loss: float = 1e-4
    """Coefficient of log(Z)**2, which keeps the logits' normaliser near 1."""
    label_smoothing: float = 0.0
    freeze: tuple[Freeze, ...] = ()
    """What does not train. Where several entries name a parameter, the first counts."""
    lora: LoraConfig | None = None
    """Train adapters beside a frozen base instead of all parameters."""
    seed: int = 0
    """Of the parameters' initial values and of dropout."""
