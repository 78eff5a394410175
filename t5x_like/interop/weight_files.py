"""Tensors of a Hugging Face directory by name: safetensors, or PyTorch's own files if there are none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from t5x_like.errors import DataError
from t5x_like.interop.safetensors_file import INDEX, SINGLE, Stored, TensorFile
from t5x_like.interop.torch_file import TorchFile
from t5x_like.utils.json_reader import read_json


class Tensors(Protocol):
    """File of tensors: the description of each, and the tensors themselves, read-only."""

    @property
    def tensors(self) -> Mapping[str, Stored]: ...

    def read(self, name: str) -> npt.NDArray[Any]: ...


class Weights(Mapping[str, Stored]):
    """Tensors of a directory by name, in one file or in several with an index."""

    def __init__(self, directory: Path):
        """Open the files.

        Raises:
          DataError: there are no files of tensors, or the index and the files do not match.
        """
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
            raise DataError(f"{directory}: neither {SINGLE} nor {INDEX}, nor pytorch_model.bin{_others(directory)}")
        self._files = files

    def __getitem__(self, name: str) -> Stored:
        return self._files[name].tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor, read-only."""
        return self._files[name].read(name)


_FORMS: tuple[tuple[str, str, str, Callable[[Path], Tensors]], ...] = (
    (SINGLE, INDEX, ".safetensors", TensorFile),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin", TorchFile),
)


def refuse_not_finite(directory: Path, names: Collection[str]) -> None:
    """Raise DataError if `names`, those of the tensors that hold NaN or infinity, is not empty."""
    if names:
        shown = "".join(f"\n  - {name}" for name in sorted(names)[:20])
        more = f"\n  and {len(names) - 20} more" if len(names) > 20 else ""
        raise DataError(f"{directory}: found NaN or infinity, expected finite numbers, in the tensors{shown}{more}")


def has_weights(directory: Path) -> bool:
    """Return whether a directory has files of tensors that `Weights` reads."""
    return any((directory / name).is_file() for single, index, _, _ in _FORMS for name in (single, index))


def _others(directory: Path) -> str:
    """Return what the files of weights in the directory are that cannot be read, or an empty string."""
    found = [f"{name}, {meaning}" for name, meaning in _UNREADABLE.items() if (directory / name).is_file()]
    known = {SINGLE, *_UNREADABLE}
    found += [
        f"{file.name}, a variant: rename it to {SINGLE} to read it"
        for file in sorted(directory.glob("*.safetensors"))
        if file.name not in known
    ]
    return f"; found {'; '.join(found)}" if found else ""


_UNREADABLE = {
    "flax_model.msgpack": "weights of Flax, which are not read: save the model with PyTorch as safetensors",
    "tf_model.h5": "weights of TensorFlow, which are not read: save the model with PyTorch as safetensors",
    "adapter_model.safetensors": "adapters without their base model: merge them into it first",
}


def _indexed(path: Path, suffix: str, open_file: Callable[[Path], Tensors]) -> dict[str, Tensors]:
    try:
        mapping = read_json(path)["weight_map"]
        names = sorted(set(mapping.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: expected a JSON object with weight_map, found {type(error).__name__}: {error}"
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(suffix):
            raise DataError(f"{path}: names the file {name!r}, expected a plain name that ends in {suffix}")
    files = {name: open_file(path.parent / name) for name in names}
    for tensor, name in mapping.items():
        if tensor not in files[name].tensors:
            raise DataError(f"{path}: tensor {tensor!r} is not in {name}, where the index lists it")
    for name, file in files.items():
        unlisted = sorted(tensor for tensor in file.tensors if mapping.get(tensor) != name)
        if unlisted:
            raise DataError(f"{path}: {name} holds {unlisted[0]!r}, which the index does not list there")
    return {tensor: files[name] for tensor, name in mapping.items()}
