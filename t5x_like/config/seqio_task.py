"""seqio Tasks and Mixtures: as the data of a run, and for evaluation."""

from __future__ import annotations

from t5x_like.config.bounds import NonEmptyStr, PositiveInt
from t5x_like.config.dataclass import config_dataclass


@config_dataclass
class SeqioConfig:
    """A seqio Task or Mixture that tf.data runs during training, in place of a prepared store.

    The Task's own preprocessors produce inputs and targets; seqio's feature converter of the layout produces the rows.
    Use it for fine-tuning, or for existing Tasks that must not change; pre-training from a prepared store is many times
    faster.
    """

    mixture_or_task: NonEmptyStr
    """Name in seqio's registries."""
    module: str | None = None
    """Module to import so that the Task or Mixture is registered."""
    pack: bool = True
    """Put several examples into a row, with segment ids and positions."""
    shuffle: bool = True
    """Shuffle files and examples, with `data.seed`."""
    num_epochs: PositiveInt | None = None
    """Number of passes over the data, after which training ends with an error; None: unlimited."""
    use_cached: bool = False
    """Read the output of seqio's own offline caching."""
    mask_id: int | None = None
    """Layout encoder: id of the mask token. seqio computes the loss at the positions where the inputs have it."""


@config_dataclass
class EvaluationTask:
    """A seqio Task or Mixture that is evaluated by its own metric functions."""

    mixture_or_task: str
    """Name in seqio's registries. The Tasks of a Mixture are evaluated separately."""
    module: str | None = None
    """Module to import so that the Task or Mixture is registered."""
    split: str = "validation"
    """Split of the Task that is evaluated."""
    num_examples: PositiveInt | None = None
    """Evaluate only this many examples from the beginning of each Task; None: all."""
    inputs_length: PositiveInt | None = None
    """Maximum number of tokens of the inputs; longer inputs are cut. None: as in training."""
    targets_length: PositiveInt | None = None
    """Maximum number of tokens of the targets and of the generated text, EOS included. None: as in training."""
    use_cached: bool = False
    """Read the output of seqio's own offline caching."""
