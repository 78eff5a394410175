"""Detection of a slow divergence: a loss that rises over many steps, none of which is a spike."""

from __future__ import annotations

import dataclasses
import statistics

_DEVIATIONS = 1.4826
"""Standard deviation of a normal distribution, in units of its median absolute deviation."""
_MIN_RELATIVE_DEVIATION = 1e-3
"""Smallest standard deviation, relative to the median, as for spikes."""


@dataclasses.dataclass(frozen=True)
class Rise:
    """Rise of the loss.

    Attributes:
      since: Last step of the window with the lowest median.
      lowest: That median.
      median: Median of the newest window.
    """

    since: int
    lowest: float
    median: float


class DivergenceDetector:
    """Compares the median loss of each window of applied steps with the lowest one before it.

    A rise is a median that exceeds the lowest one by more than `threshold` standard deviations of a step's loss in that
    window. It is returned when it begins and whenever it has doubled, until the median is below that limit again.

    Attributes:
      is_rising: True from the window with a rise on, until a window without one.
    """

    def __init__(self, window: int, threshold: float):
        self._window, self._threshold = window, threshold
        self._losses: list[float] = []
        self._lowest: tuple[int, float, float] | None = None  # Step, median and standard deviation.
        self._reported = 0.0
        self.is_rising = False

    def add(self, step: int, loss: float) -> Rise | None:
        """Note the loss of an applied step; return a rise that is to be reported."""
        self._losses.append(loss)
        if len(self._losses) < self._window:
            return None
        median = statistics.median(self._losses)
        deviation = _DEVIATIONS * statistics.median(abs(value - median) for value in self._losses)
        self._losses = []
        if self._lowest is None or median < self._lowest[1]:
            self._lowest = (step, median, max(deviation, _MIN_RELATIVE_DEVIATION * abs(median)))
        since, lowest, noise = self._lowest
        self.is_rising = median - lowest > self._threshold * noise
        if not self.is_rising:
            self._reported = 0.0
        elif median - lowest > 2 * self._reported:
            self._reported = median - lowest
            return Rise(since, lowest, median)
        return None

    def restart(self) -> None:
        """Forget the window in progress, because training continues from an earlier step."""
        self._losses = []
