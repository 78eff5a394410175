"""Type aliases that several packages share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

PyTree = Any
"""Nested containers of arrays, as `jax.tree` traverses them."""
IntArray = npt.NDArray[np.int64]
"""Array of int64 on the host."""
FloatArray = npt.NDArray[np.float64]
"""Array of float64 on the host."""
Features = Mapping[str, npt.NDArray[Any]]
"""Arrays of a batch or an example on the host, by feature name."""
