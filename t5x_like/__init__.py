"""t5x_like: training for encoder, decoder, prefix-LM and encoder-decoder models with a mixture of denoisers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t5x_like.api import PretrainedModel, load, train

__version__ = "0.1.0"
__all__ = ["PretrainedModel", "__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import the Python API when one of its names is first used, so that `import t5x_like` imports no jax."""
    if name in ("PretrainedModel", "load", "train"):
        return getattr(importlib.import_module("t5x_like.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
