"""Rows that are the same in every epoch, visited in another order in each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from t5x_like.data import keys as rng

Integers = npt.NDArray[np.int64]


class WholeRows:
    """What the readers of whole examples have in common.

    Attributes:
      num_rows: Rows of an epoch.
    """

    num_rows: int
    _shuffle_key: rng.Keys

    def visited(self, number_N: Integers) -> Integers:
        """Which row each is, by number from 0 over all epochs."""
        epoch_N, place_N = np.divmod(number_N, self.num_rows)
        return rng.permute(place_N, self.num_rows, rng.fold_in(self._shuffle_key, epoch_N))

    @property
    def superblocks_per_epoch(self) -> int:
        return self.num_rows

    def epochs(self, stretch: int, superblocks: float) -> float:
        """Passes over the rows that end behind so many of them."""
        del stretch
        return superblocks / self.num_rows
