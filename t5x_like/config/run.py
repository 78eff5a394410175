"""Configuration of a run: everything that decides what `train` computes and where results are kept."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from t5x_like.config.bounds import NonEmptyStr, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from t5x_like.config.data import DataConfig
from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.initialization import InitializeFrom
from t5x_like.config.model import ModelConfig
from t5x_like.config.seqio_task import EvaluationTask
from t5x_like.config.sharding import ShardingConfig
from t5x_like.config.training import TrainingConfig

RunName = Annotated[
    str,
    pydantic.Field(
        pattern=r"^[A-Za-z0-9][\w.-]*$", description="letters, digits, '-', '_' and '.', for the run directory's name"
    ),
]


Direction = Literal["min", "max"]
"""Direction of a metric: the smaller ("min") or the larger score ("max") is better."""


@config_dataclass
class KeepBest:
    """Checkpoints that are kept for their scores on held-out data, beside the newest ones."""

    metric: NonEmptyStr
    """Name of the score as in TensorBoard: "loss/S", "accuracy/S", "bits_per_byte" (of an encoder
    "bits_per_byte_bound"), "squad/em"."""
    direction: Direction = "min"
    """min: a smaller score is better. max: a larger score is better."""
    count: PositiveInt = 1
    """Number of best checkpoints that are kept."""


@config_dataclass
class EarlyStopping:
    """End of a run whose score on held-out data does not improve any more."""

    metric: NonEmptyStr
    """Name of the score, as in KeepBest."""
    direction: Direction = "min"
    """min: a smaller score is better. max: a larger score is better."""
    patience: PositiveInt = 5
    """Number of evaluations in a row without an improvement after which the run ends."""
    min_delta: NonNegativeFloat = 0.0
    """A smaller improvement does not count."""


@config_dataclass
class CheckpointConfig:
    save_every_steps: PositiveInt = 1000
    """Save a checkpoint at multiples of this step; the last step is always saved."""
    save_every_minutes: PositiveFloat | None = None
    """Save as well at the first multiple of monitoring.log_every_steps that is so many minutes after the last save."""
    max_to_keep: PositiveInt = 3
    """Number of newest checkpoints that are kept."""
    keep_period: PositiveInt | None = None
    """Checkpoints at multiples of this step are kept forever."""
    load_and_broadcast: bool = False
    """In a bucket: one replica of each array reads a checkpoint and sends it to the others over the network of the
    devices. False: each replica, such as each slice with data parallelism between slices, reads all of it. On a disk
    it has no effect, which is reported."""
    grace_seconds: PositiveFloat = 120.0
    """Time between the signal to stop and the kill of the processes, as the launcher sets it. A save that takes longer
    is reported: a run that is stopped then loses the steps since the save before."""
    keep_best: KeepBest | None = None
    """Keep the best of the checkpoints whose step is evaluated during training (evaluation.every_steps)."""


@config_dataclass
class EvaluationConfig:
    every_steps: PositiveInt | None = None
    """Evaluate on held-out text at multiples of this step; None: only after the last step."""
    num_batches: PositiveInt = 8
    """Number of held-out batches per objective, and for the bits per byte of the prefix-LM loss."""
    continuation: tuple[PositiveInt, PositiveInt] | None = None
    """Numbers of raw tokens of the held-out text that are given and that are scored after them, in windows that are the
    same for runs of every architecture and row length; None: no such score. `compare` and studies pair the windows."""
    continuation_windows: PositiveInt = 256
    """Largest number of these windows, a sample of the whole split."""
    tasks: tuple[EvaluationTask, ...] = ()
    """seqio Tasks and Mixtures whose metric functions also score the model. They import TensorFlow."""
    early_stopping: EarlyStopping | None = None
    """End the run, as finished, when the evaluations during training do not improve; None: train all steps."""


@config_dataclass
class MonitoringConfig:
    log_every_steps: PositiveInt = 10
    """Number of steps between two lines of metrics; the values are sums over those steps."""
    writers: tuple[str, ...] = ("tensorboard",)
    """Registered metric writers besides metrics.jsonl, which is always written: "tensorboard", "wandb", "mlflow"."""
    callbacks: tuple[str, ...] = ()
    """Registered trainer callbacks."""
    num_decoded_samples: NonNegativeInt = 4
    """Number of held-out examples that are decoded for the run report."""
    norms_every_steps: PositiveInt | None = None
    """Interval of the norms of parameters, gradients and updates by module and by layer; None: none. They are computed
    within the compiled step."""
    profile_steps: tuple[NonNegativeInt, PositiveInt] | None = None
    """First step of a profile, and the one after its last, as numbers of steps taken before. None: only on request."""
    determinism_check_every: PositiveInt | None = None
    """Compute every so many steps one twice, and compare the bits of the results and of all copies of the state. It
    costs the time of a step and, meanwhile, the memory of a second state. None: never."""
    record_rows: bool = False
    """Record the rows of each step, by index and checksum, in rows.jsonl and rows.N.jsonl in the run directory."""
    max_starts_without_progress: PositiveInt | None = 5
    """Number of starts from one checkpoint after which the run is refused once, so that a fault which returns at every
    start does not restart for ever. None: no limit."""
    maintenance_notices: bool = True
    """Save and stop when Google Compute Engine announces that a machine of the run will be stopped. Only its machines,
    and processes with the variable GCE_METADATA_HOST, ask for such notices."""


@config_dataclass
class TimeoutsConfig:
    """Limits of the stages of a process, in seconds; None: no limit.

    A process that stays in a stage for longer writes the stacks of its threads to the run directory, and all processes
    end with exit code 42.
    """

    rendezvous: PositiveInt = 600
    """Until all processes are connected; --initialization-timeout takes precedence."""
    start: PositiveFloat | None = 7200.0
    """From the start of the process until the run directory is claimed; again until data and program are opened, where
    packing documents takes the longest; and from the last save and evaluation to the end of the process."""
    restore: PositiveFloat | None = 7200.0
    """Reading of a checkpoint."""
    compile: PositiveFloat | None = 7200.0
    """Compilation of the training step."""
    step: PositiveFloat | None = 1800.0
    """A training step: its dispatch, or the wait for the metrics of earlier steps."""
    data: PositiveFloat | None = 1800.0
    """The next batch."""
    save: PositiveFloat | None = 7200.0
    """Saving of a checkpoint, as far as training waits for it."""
    evaluation: PositiveFloat | None = 7200.0
    """One evaluation during training."""
    measured_factor: PositiveFloat = 20.0
    """After 20 steps, batches, saves or evaluations, the limit is this multiple of the longest one, but at least 120
    seconds for a step and 600 for the others, and never more than the limit above."""


@config_dataclass
class CompilationCacheConfig:
    """Compiled programs on disk, so that a restarted process does not compile them again."""

    enabled: bool = True
    """Use the cache. False: each start of a process compiles its programs again."""
    directory: NonEmptyStr | None = None
    """Local folder, or URL of an object store; None: `compilation_cache` in the run directory. The variable
    JAX_COMPILATION_CACHE_DIR takes precedence. Loading a program executes code: nobody else may write there."""
    max_bytes: PositiveInt = 4 * 2**30
    """Size above which the least recently used programs are removed. Object stores are not limited."""


@config_dataclass
class RunConfig:
    name: RunName
    """Name of the run; the run directory is `runs/NAME` unless `--workdir` names another one."""
    model: ModelConfig
    """Architecture and types of the model."""
    data: DataConfig
    """Corpora, tokenizer, objectives and the shape of the rows."""
    training: TrainingConfig
    """Number of steps, batch size, optimizer, learning-rate schedule and loss."""
    initialize_from: InitializeFrom | None = None
    """Source of the initial parameters; None: random initialization."""
    sharding: ShardingConfig = ShardingConfig()
    """Distribution of parameters and batches over devices."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """When checkpoints are saved, and which ones are kept."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation on held-out data during training, and of `t5x-like eval`."""
    monitoring: MonitoringConfig = MonitoringConfig()
    """Metrics, writers, callbacks, profiles and checks."""
    compilation_cache: CompilationCacheConfig = CompilationCacheConfig()
    """Compiled programs on disk."""
    timeouts: TimeoutsConfig = TimeoutsConfig()
    """Limits after which a process that hangs is ended."""
    xla_flags: bool = True
    """Set the compiler flags of the platform (`hardware/xla_flags.py`) before jax starts; your own take precedence."""
    cpu_allocator: bool = True
    """On CPUs, keep the memory that each step frees in the process (`hardware/cpu_allocator.py`), as long as memory is
    not scarce."""
    plugins: tuple[str, ...] = ()
    """Code that registers extensions: files (`NAME.py`) relative to the recipe, or installed modules."""
