"""Packing plans beside the tokens of a store, made once and read by index.

    SPLIT/packing/KEY/examples        uint64; the words of the examples in the order of their rows
    SPLIT/packing/KEY/first_example   uint64; the examples of row r are first_example[r]:first_example[r + 1]
    SPLIT/packing/KEY/plan.json       identity, totals and records of the arrays, written last

KEY is a digest of the plan's identity: everything that the plan is a function of. A plan without plan.json is not
finished, and is made again.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic

from t5x_like.config.bounds import NonNegativeInt
from t5x_like.data.store import token_arrays
from t5x_like.data.store.token_arrays import ArrayRecord, ArrayWriter, ReadOptions
from t5x_like.errors import DataError
from t5x_like.storage import locations
from t5x_like.storage.locations import Location
from t5x_like.utils.atomic_write import sync_directory, sync_tree
from t5x_like.utils.digests import json_digest

FOLDER = "packing"
IN_MEMORY_BYTES = 2**26
"""An array up to this size is read completely. Of a larger one, only the chunks that a row needs are read."""
_CACHE_BYTES = 2**26
_RECORD = "plan.json"
_ARRAYS = ("examples", "first_example")
_FORMAT_VERSION = 1

Words = npt.NDArray[np.uint64]


class ObjectiveTotals(pydantic.BaseModel, extra="forbid", frozen=True):
    """Counts of one objective in a plan.

    Attributes:
      rows: Rows under it. In a row of k examples each example counts 1 / k.
      raw_tokens: Tokens of its examples.
      loss_tokens: Expected number of their tokens that are in the loss.
    """

    rows: float
    raw_tokens: NonNegativeInt
    loss_tokens: float


class PlanTotals(pydantic.BaseModel, extra="forbid", frozen=True):
    """Counts of a plan.

    Attributes:
      rows, examples: Its rows and its examples.
      objectives: Counts of each objective.
      cut_inputs, cut_targets: Pairs whose inputs, or targets, are truncated to fit a row.
      truncated: Pairs of which either is truncated.
      too_short: Documents of fewer than two tokens, and pairs without targets, which are left out.
    """

    rows: int = pydantic.Field(ge=0, lt=2**48)
    examples: int = pydantic.Field(ge=0, lt=2**48)
    objectives: tuple[ObjectiveTotals, ...]
    cut_inputs: NonNegativeInt = 0
    cut_targets: NonNegativeInt = 0
    truncated: NonNegativeInt = 0
    too_short: NonNegativeInt = 0


class _Array(pydantic.BaseModel, extra="forbid"):
    size: int = pydantic.Field(ge=0, lt=2**50)
    dtype: Literal["uint64"]
    metadata: str
    content: str


class _Record(pydantic.BaseModel, extra="forbid"):
    format_version: Literal[1]
    identity: dict[str, Any]
    totals: PlanTotals
    arrays: dict[Literal["examples", "first_example"], _Array]


@dataclasses.dataclass(frozen=True)
class StoredPlan:
    """Plan that is open for reading. Its arrays have the words of `data.stream.packing_plan`."""

    totals: PlanTotals
    examples: StoredWords
    first_example: StoredWords


class StoredWords:
    """Array of words beside a store, read by index."""

    def __init__(self, path: Location, record: ArrayRecord):
        in_memory = record.num_bytes <= IN_MEMORY_BYTES
        self._path, self._size = path, record.size
        options = ReadOptions(cache_bytes=0 if in_memory else _CACHE_BYTES)
        self._array = token_arrays.open_array(path, record, options)
        self._memory = token_arrays.read(self._array, path) if in_memory else None

    def __getitem__(self, index: npt.NDArray[np.int64]) -> Words:
        """Return the words with these indices.

        Raises:
          DataError: an index is outside of the array, or the array is damaged.
        """
        # Indices are computed from words and totals, which may come from others.
        if len(index) and not (0 <= index.min() and index.max() < self._size):
            raise _damaged(self._path, f"{self._size:,} words, and places of rows outside of them")
        if self._memory is not None:
            found: Words = self._memory[index]
            return found
        return token_arrays.read(self._array[index], self._path)


class StoredPlanWriter:
    """Writer of a plan. One process at a time may write the plans of a store.

    Attributes:
      examples, first_example: Arrays to which words are appended.
    """

    def __init__(self, split: Location, identity: dict[str, Any]):
        """
        Args:
          split: Location of a split of a store.
          identity: JSON object with everything that the plan is a function of.
        """
        self._path = _plan_path(split, identity)
        self._identity = identity
        locations.remove(self._path)
        self.examples, self.first_example = (ArrayWriter(self._path / name, "uint64") for name in _ARRAYS)

    def commit(self, totals: PlanTotals) -> None:
        """Complete the plan."""
        writers = {"examples": self.examples, "first_example": self.first_example}
        for writer in writers.values():
            writer.close()
        record = {
            "format_version": _FORMAT_VERSION,
            "identity": self._identity,
            "totals": totals.model_dump(),
            "arrays": {name: dataclasses.asdict(writer.record()) for name, writer in writers.items()},
        }
        if isinstance(self._path, Path):
            sync_tree(self._path)
        # It comes last: without it there is no plan.
        locations.write_bytes(self._path / _RECORD, (json.dumps(record, indent=2) + "\n").encode())
        if isinstance(self._path, Path):
            sync_tree(self._path)
            sync_directory(self._path.parent)


def open_plan(split: Location, identity: dict[str, Any]) -> StoredPlan | None:
    """Return the plan of a split with this identity; None if it has not been made.

    Raises:
      DataError: its files are damaged, or belong to another plan.
    """
    path = _plan_path(split, identity)
    text = _read_record(path)
    if text is None:
        return None
    record = _parse(text, path)
    if record.identity != json.loads(json.dumps(identity)):
        raise _damaged(path, "another identity than that of its name")
    arrays = {name: ArrayRecord(**array.model_dump()) for name, array in record.arrays.items()}
    if arrays["first_example"].size != record.totals.rows + 1:
        raise _damaged(path, f"{record.totals.rows:,} rows and {arrays['first_example'].size:,} of their limits")
    examples, first_example = (StoredWords(path / name, array) for name, array in sorted(arrays.items()))
    return StoredPlan(record.totals, examples, first_example)


def find_damage(split: Location) -> list[str]:
    """Read the plans of a split completely, and return what is not as it was written. Unfinished plans are passed."""
    problems = []
    for key in locations.children(split / FOLDER):
        path = split / FOLDER / key
        try:
            text = _read_record(path)
            arrays = {} if text is None else _parse(text, path).arrays
        except DataError as error:
            problems.append(str(error))
            continue
        for name, array in arrays.items():
            problems += token_arrays.find_damage(path / name, ArrayRecord(**array.model_dump()))
    return problems


def _plan_path(split: Location, identity: dict[str, Any]) -> Location:
    return split / FOLDER / json_digest(identity)[:16]


def _read_record(path: Location) -> bytes | None:
    try:
        return locations.read_bytes(path / _RECORD)
    except IsADirectoryError:
        raise _damaged(path / _RECORD, "a folder") from None


def _parse(text: bytes, path: Location) -> _Record:
    try:
        record = _Record.model_validate_json(text)
    except pydantic.ValidationError as error:
        detail = error.errors()[0]
        raise _damaged(path / _RECORD, f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}") from None
    if missing := set(_ARRAYS) - set(record.arrays):
        raise _damaged(path / _RECORD, f"no array {min(missing)}")
    return record


def _damaged(path: Location, problem: str) -> DataError:
    return DataError(f"{path}: found {problem}, expected a packing plan; delete it and run `t5x-like prepare RECIPE`")
