"""The configuration half of an objective: its fields and the exact arithmetic of its lengths, in plain Python.

A recipe is validated when it is read, before NumPy or a device is needed: the number of sentinels that a denoiser can
need and the number of raw tokens that fill a row are functions of the configuration alone. The NumPy half, which makes
the examples, is `t5x_like.data.objectives.base.ObjectiveImplementation`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple, Self

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.layouts import Layout, row_positions
from t5x_like.errors import ConfigProblem

Mode = Literal["R", "S", "X"]
ExampleSource = Literal["text", "pairs", "labelled", "dialogues", "preferences"]
"""Origin of an objective's examples. text: windows or documents of plain text. pairs: supervised (inputs, targets)
pairs. labelled: texts with labels for a task head. dialogues: messages, of which the assistant's are predicted.
preferences: a prompt with two answers, of which one was chosen."""
MODES: tuple[Mode, ...] = ("R", "S", "X")


class ExampleLengths(NamedTuple):
    """Maximum number of token positions of an example, with mode token, sentinels and EOS.

    Attributes:
      inputs, targets: Maximum of each part.
      total: Maximum of both parts together. It is less than their sum where a longer part makes the other one shorter,
        or where both occupy the same positions (masked LM).
    """

    inputs: int
    targets: int
    total: int


@config_dataclass
class ObjectiveConfig(abc.ABC):
    """Base class of all objectives: how a window of raw tokens becomes one or more training examples.

    A subclass is decorated with `config_dataclass`, gives `kind` a `Literal` type, sets `has_inputs` and implements the
    abstract methods. `register_objective` makes it known together with its NumPy half.

    Attributes:
      kind: Name of the class in config.json.
      name: Name of this objective in the mixture; its loss curve is stored under it.
      rate: Share of the examples, relative to the other objectives of the mixture.
      mode: Mode token at the start of the inputs; None: no mode token.
      has_inputs: True if an example has inputs for an encoder or a prefix, False if the whole stream is predicted.
      predicts_in_place: True if the target of a position is the raw token of that same position (masked LM,
        masked diffusion).
      reads_masked_targets: True if the decoder of an encoder-decoder reads the targets with masked tokens, and attends
        to all of them in both directions (block diffusion).
      example_source: Origin of the examples.
      unscored_first_targets: Number of tokens at the start of the targets that the loss never covers.
      fractional_loss_weights: True if the weight of a scored token can differ from 1. The loss weights of the whole run
        are then float32.
    """

    has_inputs: ClassVar[bool]
    predicts_in_place: ClassVar[bool] = False
    reads_masked_targets: ClassVar[bool] = False
    targets_are_text: ClassVar[bool] = False
    example_source: ClassVar[ExampleSource] = "text"
    unscored_first_targets: ClassVar[int] = 0
    fractional_loss_weights: ClassVar[bool] = False

    kind: str
    name: str
    rate: float = 1.0
    mode: Mode | None = None

    @property
    @abc.abstractmethod
    def description(self) -> str:
        """A few words for reports, such as "masked LM, 15 %"."""

    @property
    @abc.abstractmethod
    def min_raw_length(self) -> int:
        """Number of tokens of the shortest window that can become an example."""

    @abc.abstractmethod
    def longest_example(self, raw_length: int) -> ExampleLengths:
        """Return the lengths of the longest example of one window of `raw_length` tokens.

        Each of the three lengths must be non-decreasing in `raw_length`, and `total` must be increasing:
        `raw_window_length` searches by bisection.
        """

    @abc.abstractmethod
    def sentinels_needed(self, raw_length: int) -> int:
        """Return the maximum number of different sentinels in an example of `raw_length` raw tokens.

        A mask token counts as one sentinel. `raw_length` is 0 where no window fits the row.
        """

    @abc.abstractmethod
    def expected_loss_tokens(self, raw_length: int) -> float:
        """Return the mean number of scored tokens of a window of `raw_length` raw tokens, with sentinels and EOS."""

    def prefix_lengths(self, raw_length: int) -> tuple[tuple[int, float], ...]:
        """Return the numbers of positions of a window that attend in both directions in layout prefix_lm, and how
        likely each of them is.

        These are the inputs and the position that reads the last of them, or the whole window if it is predicted in
        place. Where the number of inputs is random, this is the longest one, unless the objective knows better.
        """
        if not self.has_inputs:
            return ()
        if self.predicts_in_place:
            return ((raw_length, 1.0),)
        return ((self.longest_example(raw_length).inputs + 1, 1.0),)

    def problems(self, where: str) -> Iterator[ConfigProblem]:
        """Yield the problems that concern several fields; bounds of single fields are part of their types.

        Args:
          where: Dotted path of this objective in the run configuration.
        """
        return iter(())

    @property
    def mode_tokens(self) -> int:
        """Number of mode tokens of an example: 1 or 0."""
        return 0 if self.mode is None else 1

    @property
    def needs_token_traits(self) -> bool:
        """True if denoising reads which pieces of the vocabulary begin words and end sentences."""
        return False

    @property
    def reserved_sentinels(self) -> int:
        """Number of sentinels at the end of the vocabulary's range that serve as markers.

        The other objectives of the mixture must not use them.
        """
        return 0

    @property
    def windows_per_row(self) -> int:
        """Number of windows of raw tokens, hence of examples, in one row before any packing of documents."""
        return 1

    @property
    def changes_with_steps(self) -> bool:
        """True if the noise of a row depends on the step that reads it: `at_step` is defined."""
        return False

    def at_step(self, step: int) -> Self:
        """Return the objective whose noise the rows of a training step have."""
        return self

    def single_window(self) -> Self:
        """Return the same objective with one window per row, as held-out evaluation uses it."""
        return self

    def row_lengths(self, raw_length: int) -> ExampleLengths:
        """Return the maximum lengths of a row of `windows_per_row` windows of `raw_length` tokens each.

        Non-decreasing in `raw_length`, as `longest_example`.
        """
        return self.longest_example(raw_length)

    def raw_window_length(self, layout: Layout, inputs_length: int, targets_length: int) -> int:
        """Return the largest number of raw tokens per window whose row always fits the lengths; 0 if 2 do not fit.

        For span corruption in an encoder-decoder this is T5's `random_spans_helper` with the mode token and EOS inside
        the budget. In layouts with a single stream, a row has inputs_length + targets_length positions and holds inputs
        and targets one after the other, whatever the length of each. Where a row holds several windows
        (`windows_per_row`), this is the length of one of them.
        """

        positions = row_positions(layout, inputs_length, targets_length)

        def fits(raw_length: int) -> bool:
            lengths = self.row_lengths(raw_length)
            # Inputs and targets of two stacks must each fit their own row; in a single row their sum counts, which can
            # be less than the sum of the two maxima.
            if len(positions) == 2:
                return lengths.inputs <= positions["encoder"] and lengths.targets <= positions["decoder"]
            return lengths.total <= sum(positions.values())

        if not fits(2):
            return 0
        # Double the length until it does not fit, then bisect.
        # No closed form: the lengths contain rounded counts of tokens and spans. They do not decrease with the window,
        # so a search finds the largest.
        fitting, too_long = 2, 4
        while fits(too_long):
            fitting, too_long = too_long, 2 * too_long
        while too_long - fitting > 1:
            middle = (fitting + too_long) // 2
            fitting, too_long = (middle, too_long) if fits(middle) else (fitting, middle)
        return fitting
