"""Host shard: the rows of a global batch that a process loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from t5x_like.utils.type_aliases import IntArray


@dataclasses.dataclass(frozen=True)
class HostShard:
    """Rows that the devices of a process hold. Processes whose devices hold the same rows form a group.

    Attributes:
      group: Index of the group.
      groups: Number of groups. Each row belongs to one of them.
      picks: Function from the number of rows of a global batch to the ascending indices of this group's rows. None: the
        groups have contiguous rows, in order.
      keeps_state: Whether this process of its group saves the state of the data pipeline, if there is any.
    """

    group: int = 0
    groups: int = 1
    picks: Callable[[int], IntArray] | None = None
    keeps_state: bool = True

    def rows(self, rows: int) -> IntArray:
        """Return the indices of this group's rows in a global batch of `rows` rows."""
        if self.picks is not None:
            return self.picks(rows)
        # Rounded bounds of neighbouring groups are equal, so every row is in exactly one group, even if `groups` does
        # not divide `rows`.
        return np.arange(rows * self.group // self.groups, rows * (self.group + 1) // self.groups, dtype=np.int64)


WHOLE = HostShard()
"""All rows."""
