"""pytorch_model.bin: a pickle, read only by torch with `weights_only`, which creates tensors and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from t5x_like.errors import DataError
from t5x_like.interop.safetensors_file import Stored, refuse_lfs_pointer


class TorchFile:
    """File of named tensors, mapped into memory if its format allows it."""

    def __init__(self, path: Path):
        """Open a file.

        Raises:
          DataError: torch is not installed, or the file holds anything but named tensors.
        """
        refuse_lfs_pointer(path)
        try:
            import torch
        except ImportError:
            raise DataError(
                f"{path}: reading it requires torch, which is not installed: pip install 't5x-like[hf]', or "
                "provide the tensors as model.safetensors"
            ) from None
        self.path = path
        try:
            try:
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # The format from before torch 1.6 cannot be mapped.
                found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # A malformed pickle can raise anything.
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"{path}: refused: expected a file of tensors only ({type(error).__name__}: {reason})"
            ) from None
        if not isinstance(found, dict):
            raise DataError(f"{path}: holds a {type(found).__name__}, expected named tensors")
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
                raise DataError(f"{path}: {str(name)[:200]!r} is a {type(value).__name__}, expected named tensors")
        self._found: dict[str, Any] = found
        self.tensors = {
            name: Stored(_as_array(value[:0] if value.ndim else value).dtype, tuple(value.shape), 0)
            for name, value in found.items()
        }

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor, read-only."""
        array = _as_array(self._found[name])
        array.flags.writeable = False
        return array


def _as_array(tensor: Any) -> npt.NDArray[Any]:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16.
        return np.asarray(tensor.contiguous().view(torch.int16)).view(jnp.bfloat16)
    return np.asarray(tensor.contiguous())
