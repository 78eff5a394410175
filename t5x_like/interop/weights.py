"""The tensors of a directory of Hugging Face's, by name: safetensors, or else PyTorch's own files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from t5x_like.config.errors import DataError
from t5x_like.interop.safetensors import INDEX, SINGLE, Stored, TensorFile
from t5x_like.interop.torch_file import TorchFile


class Tensors(Protocol):
    """A file of tensors: where each is, or was, and the tensor itself, read-only."""

    @property
    def tensors(self) -> Mapping[str, Stored]: ...

    def read(self, name: str) -> npt.NDArray[Any]: ...


class Weights(Mapping[str, Stored]):
    """The tensors of a directory by name, in one file or in several with an index."""

    def __init__(self, directory: Path):
        """Raises DataError where there are none, or the index and the files do not agree."""
        self.directory = directory
        files: Mapping[str, Tensors] | None = None
        for single, index, suffix, open_file in _FORMS:
            if (directory / index).is_file():
                files = _indexed(directory / index, suffix, open_file)
            elif (directory / single).is_file():
                whole = open_file(directory / single)
                files = dict.fromkeys(whole.tensors, whole)
            if files is not None:
                break
        else:
            raise DataError(f"{directory}: neither {SINGLE} nor {INDEX}, nor pytorch_model.bin")
        self._files = files

    def __getitem__(self, name: str) -> Stored:
        return self._files[name].tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, name: str) -> npt.NDArray[Any]:
        return self._files[name].read(name)


_FORMS: tuple[tuple[str, str, str, Callable[[Path], Tensors]], ...] = (
    (SINGLE, INDEX, ".safetensors", TensorFile),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin", TorchFile),
)


def _indexed(path: Path, suffix: str, open_file: Callable[[Path], Tensors]) -> dict[str, Tensors]:
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(mapping.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: expected a JSON object with weight_map, found {type(error).__name__}: {error}"
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(suffix):
            raise DataError(f"{path}: names the file {name!r}, expected a plain name that ends in {suffix}")
    files = {name: open_file(path.parent / name) for name in names}
    for tensor, name in mapping.items():
        if tensor not in files[name].tensors:
            raise DataError(f"{path}: tensor {tensor!r} is not in {name}, where the index has it")
    for name, file in files.items():
        unlisted = sorted(tensor for tensor in file.tensors if mapping.get(tensor) != name)
        if unlisted:
            raise DataError(f"{path}: {name} holds {unlisted[0]!r}, which the index has not there")
    return {tensor: files[name] for tensor, name in mapping.items()}
