"""The configuration tree. Knows the standard library, tyro and pydantic; never jax."""

from t5x_like.config.adaptation import InitializeFrom
from t5x_like.config.batch import ArraySpec, BatchSpec, batch_spec, evaluation_spec
from t5x_like.config.corpora import CorpusConfig, TokenizerConfig
from t5x_like.config.data import CorpusShare, DataConfig, RatePhase, SamplingConfig
from t5x_like.config.errors import (
    EXIT_OK,
    EXIT_REFUSED,
    EXIT_RESUMABLE,
    EXIT_UNEXPECTED,
    EXIT_USAGE,
    ConfigError,
    DataError,
    Problem,
    RefusedError,
    UserError,
)
from t5x_like.config.mixtures import ul2
from t5x_like.config.model import Experts, ModelConfig, RopeScaling, StackConfig, TaskHead
from t5x_like.config.objectives import (
    Bart,
    BlankInfilling,
    CausalLM,
    CausalMasking,
    FillInTheMiddle,
    Labelled,
    MaskedLM,
    Objective,
    PrefixLM,
    SpanCorruption,
    Supervised,
)
from t5x_like.config.partitioning import DcnConfig, PartitioningConfig
from t5x_like.config.run import (
    CheckpointConfig,
    EvaluationConfig,
    MonitoringConfig,
    RunConfig,
)
from t5x_like.config.seqio import EvaluationTask, SeqioConfig
from t5x_like.config.training import Adafactor, AdamW, Freeze, LoraConfig, Schedule, TrainingConfig

__all__ = [
    "SamplingConfig",
    "RatePhase",
    "CorpusShare",
    "EXIT_OK",
    "EXIT_REFUSED",
    "EXIT_RESUMABLE",
    "EXIT_UNEXPECTED",
    "EXIT_USAGE",
    "Adafactor",
    "AdamW",
    "ArraySpec",
    "Bart",
    "BatchSpec",
    "BlankInfilling",
    "CausalLM",
    "CausalMasking",
    "CheckpointConfig",
    "ConfigError",
    "CorpusConfig",
    "DataConfig",
    "DcnConfig",
    "DataError",
    "EvaluationConfig",
    "EvaluationTask",
    "FillInTheMiddle",
    "Freeze",
    "InitializeFrom",
    "Labelled",
    "LoraConfig",
    "MaskedLM",
    "ModelConfig",
    "MonitoringConfig",
    "Objective",
    "PartitioningConfig",
    "PrefixLM",
    "Problem",
    "RefusedError",
    "RunConfig",
    "Schedule",
    "SeqioConfig",
    "SpanCorruption",
    "StackConfig",
    "RopeScaling",
    "Experts",
    "Supervised",
    "TaskHead",
    "TokenizerConfig",
    "TrainingConfig",
    "UserError",
    "batch_spec",
    "evaluation_spec",
    "ul2",
]
