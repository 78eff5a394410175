"""A run: everything that decides what `train` computes and where it keeps it."""

from __future__ import annotations

from t5x_like.config.adaptation import InitializeFrom
from t5x_like.config.base import configuration
from t5x_like.config.data import DataConfig
from t5x_like.config.model import ModelConfig
from t5x_like.config.partitioning import PartitioningConfig
from t5x_like.config.seqio import EvaluationTask
from t5x_like.config.training import TrainingConfig


@configuration
class CheckpointConfig:
    save_every_steps: int = 1000
    keep_last: int = 3
    """Newest checkpoints that stay."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this stay for good."""


@configuration
class EvaluationConfig:
    every_steps: int | None = None
    """Evaluate on held-out text during training, at multiples of this; None only after the last step."""
    num_batches: int = 8
    """Held-out batches per objective and for the prefix-LM bits per byte."""
    tasks: tuple[EvaluationTask, ...] = ()
    """seqio Tasks and Mixtures whose metric functions score the model too. They bring TensorFlow into the process."""


@configuration
class MonitoringConfig:
    log_every_steps: int = 10
    """Steps between two lines of metrics; the values are sums over those steps."""
    tensorboard: bool = True
    samples: int = 4
    """Held-out examples that are decoded into the run report."""
    hang_timeout_seconds: float | None = 1800.0
    """A process without a training step for so long prints its stacks and ends with exit code 42. Compiling, saving,
    restoring and evaluating may take ten times as long. None: it waits for ever."""


@configuration
class RunConfig:
    name: str
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    initialize_from: InitializeFrom | None = None
    """None: random numbers."""
    partitioning: PartitioningConfig = PartitioningConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
