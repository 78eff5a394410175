"""Training: number of steps, batch size, optimizer, learning-rate schedule and loss."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from t5x_like.config.bounds import (
    ClosedUnitFloat,
    NonEmptyStr,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    UnitFloatAboveZero,
    UnitFloatBelowOne,
)
from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.model import ModelConfig
from t5x_like.config.optimizers import AdafactorConfig, Optimizer

ParameterType = Literal["float32", "bfloat16"]
NonEmptyPatterns = Annotated[
    tuple[str, ...], pydantic.Field(min_length=1, description="one regular expression or more")
]


@config_dataclass
class ScheduleConfig:
    """Learning-rate schedule.

    constant: linear warm-up, then `learning_rate`.
    rsqrt: learning_rate / sqrt(max(step, warmup_steps)), T5's schedule: constant, without a ramp, until warmup_steps.
    cosine: linear warm-up, then half a cosine down to `final_fraction` of the peak at `decay_steps`.
    wsd: linear warm-up, stable, then a cooldown over the last `cooldown_fraction` of `decay_steps` to `final_fraction`.
    """

    kind: Literal["constant", "rsqrt", "cosine", "wsd"] = "rsqrt"
    """Shape of the schedule; the formulas are above."""
    learning_rate: PositiveFloat = 1.0
    """Peak of the schedule. For rsqrt the factor of the formula: the rate is learning_rate / sqrt(warmup_steps) until
    warmup_steps."""
    warmup_steps: NonNegativeInt = 10_000
    """Number of steps of the warm-up. For rsqrt the number of steps with a constant rate."""
    decay_steps: PositiveInt | None = None
    """Step at which the decay ends; None: training.num_train_steps."""
    cooldown_fraction: UnitFloatAboveZero = 0.2
    """wsd: part of `decay_steps` that the cooldown takes."""
    cooldown_shape: Literal["linear", "one_minus_sqrt", "cosine", "square"] = "linear"
    """Decay of wsd as a function of the fraction x of the cooldown that has passed: linear: 1 - x. one_minus_sqrt:
    1 - sqrt(x), the best shape in the comparison of Hägele et al. 2024. cosine: (1 + cos(pi x)) / 2. square:
    1 - x**2."""
    final_fraction: ClosedUnitFloat = 0.0
    """cosine and wsd: learning rate at the end of the decay, as a fraction of the peak."""


@config_dataclass
class BatchSizeStage:
    """Stage of a run with smaller batches."""

    until_step: PositiveInt
    """First step after the stage."""
    batch_size: PositiveInt
    """Number of rows of each step of the stage, at most training.global_batch_size."""


@config_dataclass
class FreezeConfig:
    """Frozen parameters: they have no optimizer state and are excluded from the gradient norm."""

    paths: NonEmptyPatterns
    """Regular expressions for whole paths of parameters, such as `encoder/layers/self_attention/query/kernel`. A
    pattern that matches no parameter is refused."""
    until_step: PositiveInt | None = None
    """Step at which the parameters start to train, as in a run that starts there; None: never."""


@config_dataclass
class LearningRateGroup:
    """Parameters with a learning rate of their own."""

    paths: NonEmptyPatterns
    """Regular expressions for whole paths of parameters, such as `token_embedder/.*`. A pattern that matches no
    parameter is refused."""
    factor: PositiveFloat
    """Factor on the learning rate of the schedule."""


@config_dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): kernels W + (alpha / rank) A B, of which only A and B are trained.

    Checkpoints contain the adapters and their optimizer state. The base is identified by the values of its parameters,
    not by its path.
    """

    base: NonEmptyStr
    """Directory of the parameters W: a run, or the output of `t5x-like convert`."""
    rank: PositiveInt = 8
    """Number of columns of A and of rows of B."""
    alpha: PositiveFloat = 16.0
    """Numerator of the factor alpha / rank on A B."""
    base_type: Literal["float32", "int8"] = "float32"
    """Type of the frozen kernels on the devices. int8: they are rounded when they are read, with a scale for each
    output, and dequantized where they are used (QLoRA: Dettmers et al. 2023, which has 4 bits); embeddings, heads,
    routers and norms stay float32. Merging adds the adapters to the rounded kernels, to which they belong."""
    paths: NonEmptyPatterns = (r".*attention/(query|value)/kernel",)
    """Regular expressions for whole paths of kernels, such as `decoder/layers/mlp/wo/kernel`. The kernels of all layers
    of a stack are one array, and so are the arrays of all experts."""


@config_dataclass
class DistillationConfig:
    """Distillation from a frozen teacher (Hinton et al. 2015).

    The loss of a target is (1 - weight) * cross-entropy + weight * temperature**2 * KL(teacher | model), where KL is
    the divergence of the two distributions over the vocabulary, each the softmax of logits / temperature. The teacher
    is computed in each step, or once for all rows (`top_k`), and identified by the values of its parameters, not by its
    path.
    """

    teacher: NonEmptyStr
    """Directory of the teacher: a run, or the output of `t5x-like convert`. It has the tokenizer, the vocabulary size
    and the architecture of the model."""
    model: ModelConfig | None = None
    """Model of the teacher. None: it is read from the directory when training starts."""
    weight: ClosedUnitFloat = 0.5
    """Share of the divergence in the loss; with 1 the cross-entropy of the targets does not count."""
    temperature: PositiveFloat = 1.0
    """Divisor of the logits of both models in the divergence; above 1, unlikely tokens count more."""
    top_k: PositiveInt | None = None
    """Number of the teacher's most likely tokens that are stored for each target, for all rows of the run, before its
    first step; the steps then need no teacher. All other tokens count as one outcome of the divergence, which is a
    lower bound of the whole one and equals it if `top_k` is the vocabulary size. None: the teacher is computed in each
    step."""


@config_dataclass
class GuardConfig:
    """Guard of the training state: steps that are rejected, and what follows.

    A step is rejected, and leaves parameters and optimizer state as they are, if its loss, its gradient or its update
    is not finite, or if it is a spike.
    """

    policy: Literal["skip", "abort", "rollback"] = "skip"
    """skip: go on with the next step. abort: end the run. rollback: restore the newest healthy checkpoint and go on
    after the rows of the rejected step. A run also ends when all steps of a logging interval are rejected."""
    spike_threshold: PositiveFloat | None = None
    """A step is a spike if its loss or the norm of its update exceeds the median of the applied steps before it by more
    than this number of standard deviations, estimated as 1.4826 times the median absolute deviation. None: no step. A
    median loss of `spike_window` steps that exceeds the lowest one before it by as much is reported as a slow
    divergence. It ends the run if the policy is abort, and no further checkpoint becomes healthy until it falls."""
    spike_window: Annotated[int, pydantic.Field(ge=8, le=4096)] = 128
    """Number of applied steps of that median. There are no spikes before it is full."""
    max_rollbacks: NonNegativeInt = 3
    """Number of rollbacks after which the run ends instead."""


@config_dataclass
class TrainingConfig:
    num_train_steps: Annotated[int, pydantic.Field(ge=1, le=2**31 - 1)]
    """Number of optimizer steps of the whole run; a resumed run continues to the same step."""
    global_batch_size: PositiveInt
    """Number of rows of one optimizer step, over all devices and gradient accumulation steps."""
    batch_size_ramp: tuple[BatchSizeStage, ...] = ()
    """Stages with smaller batches before those of `global_batch_size`. Rows are read in the same order as without a
    ramp, and the learning rate is that of the step. The step is compiled once for each size."""
    gradient_accumulation_steps: PositiveInt = 1
    """Number of parts in which a step's batch is processed. The result equals that of the whole batch."""
    optimizer: Optimizer = AdafactorConfig()
    """Optimizer with its parameters; `kind` selects it."""
    optimizer_state_type: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrices of the optimizer's state, such as Adam's moments. bfloat16 halves their memory: the update
    is computed in float32, and the new state is rounded stochastically, so that changes that are smaller than the
    distance of two numbers are kept on average."""
    parameter_type: ParameterType = "float32"
    """Type of the parameters, and of their gradients on the devices. bfloat16 halves the memory of both: the update is
    computed in float32, and the new parameters are rounded stochastically. Sums over the parts of
    gradient_accumulation_steps and the average of `ema_decay` stay float32."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate as a function of the step."""
    max_gradient_norm: PositiveFloat | None = 1.0
    """Global norm to which the gradient of the mean loss is clipped; None: no clipping."""
    z_loss: ClosedUnitFloat = 1e-4
    """Coefficient of log(Z)**2, which keeps the normalizer Z of the softmax near 1."""
    label_smoothing: UnitFloatBelowOne = 0.0
    """Probability that the target distribution spreads over the other tokens of the vocabulary. Evaluation has none."""
    loss_chunk_tokens: NonNegativeInt | None = None
    """Number of tokens per device whose logits exist at once in the loss of training and evaluation; 0: those of all
    tokens of a sub-batch. None: 0 if these take 256 MiB per device or less, else those of 64 MiB, but at least as many
    as the head is wide. The loss is the same but for rounding. Losses that need all logits have them: those of a
    teacher, of preference pairs and of a generator."""
    learning_rate_groups: tuple[LearningRateGroup, ...] = ()
    """Parameters with another learning rate. If several entries match a parameter, the first one applies."""
    layer_decay: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 1.0
    """Factor on the learning rate from each layer of a stack to the one below it: layer l of L has
    layer_decay**(L + 1 - l), the embeddings have layer_decay**(L + 1), and other parameters 1 (Howard and Ruder 2018,
    with the exponents of ELECTRA's fine-tuning)."""
    ema_decay: UnitFloatBelowOne | None = None
    """Decay of an exponential moving average of the parameters, at most (1 + step) / (10 + step); None: no average. The
    average is evaluated, and other commands read it from checkpoints."""
    guard: GuardConfig = GuardConfig()
    """Policy for a loss, a gradient or an update that is not finite or is far above earlier ones."""
    freeze: tuple[FreezeConfig, ...] = ()
    """Parameters that do not train. If several entries match a parameter, the first one applies."""
    lora: LoraConfig | None = None
    """Train adapters on a frozen base model instead of all parameters."""
    distillation: DistillationConfig | None = None
    """Learn from the distribution of a teacher beside the targets."""
    seed: Seed = 0
    """Seed of the initial parameters and of dropout."""
