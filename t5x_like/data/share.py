"""Which rows of a global batch a process loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows that the devices of a process hold. Processes whose devices hold the same rows are of one group.

    Attributes:
      group, groups: Which group, of how many; each row belongs to one of them.
      picks: Of a global batch of so many rows, the numbers of those of this group, ascending. None: the groups' parts
        are contiguous and in order.
      keeps_state: Whether this is the process of its group that saves the position of the data, where it has one.
    """

    group: int = 0
    groups: int = 1
    picks: Callable[[int], Integers] | None = None
    keeps_state: bool = True

    def rows(self, rows: int) -> Integers:
        """The numbers of this group's rows in a global batch of `rows`."""
        if self.picks is not None:
            return self.picks(rows)
        return np.arange(rows * self.group // self.groups, rows * (self.group + 1) // self.groups, dtype=np.int64)


WHOLE = Share()
