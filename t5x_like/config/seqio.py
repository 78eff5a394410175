"""A registered seqio Task or Mixture as the data of a run, read live."""

from __future__ import annotations

from t5x_like.config.base import configuration


@configuration
class SeqioConfig:
    """A seqio Task or Mixture that tf.data runs while the model trains, in place of a prepared store.

    Its own preprocessors make inputs and targets; seqio's feature converter of the layout makes the rows. For those who
    fine-tune, or who bring Tasks as they are; pre-training from a prepared store is many times faster.
    """

    mixture_or_task: str
    """Name in seqio's registries."""
    module: str | None = None
    """Module to import so that it is registered."""
    pack: bool = True
    """Several examples in a row, with segment ids and positions."""
    shuffle: bool = True
    num_epochs: int | None = None
    """Passes over the data, after which training ends with an error; None: as many as the run takes."""
    use_cached: bool = False
    """Read what seqio's own caching has written."""
    mask_id: int | None = None
    """Layout encoder: the id of the mask token. seqio scores the positions where the inputs have it."""


@configuration
class EvaluationTask:
    """A seqio Task or Mixture whose own metric functions score the model."""

    mixture_or_task: str
    """Name in seqio's registries. Of a Mixture each Task is scored by itself."""
    module: str | None = None
    """Module to import so that it is registered."""
    split: str = "validation"
    num_examples: int | None = None
    """The first examples of each Task; None: all."""
    inputs_length: int | None = None
    """Tokens of the inputs; what is longer is cut. None: as in training."""
    targets_length: int | None = None
    """Tokens of the targets, and of what the model says, EOS included. None: as in training."""
    use_cached: bool = False
    """Read what seqio's own caching has written."""
