"""A registered seqio Task or Mixture as the data of a run, read live."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from t5x_like.config.base import configuration
from t5x_like.config.errors import Problem

if TYPE_CHECKING:
    from t5x_like.config.data import DataConfig


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


def packed_features(data: DataConfig) -> dict[str, int]:
    """Length of each further feature of packed rows, under seqio's names."""
    decoder = data.targets_length if data.layout == "encoder_decoder" else data.row_length
    stacks = {
        "encoder_decoder": {"encoder": data.inputs_length, "decoder": decoder},
        "prefix_lm": {"decoder": decoder},
        "causal_lm": {"decoder": decoder},
        "encoder": {"encoder": data.inputs_length},
    }[data.layout]
    return {f"{stack}_{what}": length for stack, length in stacks.items() for what in ("segment_ids", "positions")}


def seqio_problems(data: DataConfig) -> Iterator[Problem]:
    """What is wrong with the data of a run that is read live."""
    assert data.seqio is not None
    if not data.seqio.mixture_or_task:
        yield Problem("data.seqio.mixture_or_task", "nothing", "the name of a registered seqio Task or Mixture")
    if data.layout == "encoder" and data.seqio.mask_id is None:
        expected = "the id of the Task's mask token: seqio scores the positions where the inputs have it"
        yield Problem("data.seqio.mask_id", "None with the layout encoder", expected)
    if data.seqio.num_epochs is not None and data.seqio.num_epochs < 1:
        yield Problem("data.seqio.num_epochs", str(data.seqio.num_epochs), "at least 1, or None for no end")
    if data.mixture:
        expected = "(): the Task makes inputs and targets itself"
        yield Problem("data.mixture", f"{len(data.mixture)} objectives beside data.seqio", expected)
    for name in ("corpora", "schedule", "short_targets_lengths"):
        if getattr(data, name):
            yield Problem(f"data.{name}", "a value beside data.seqio", "(): it is for prepared stores")
