"""Log-probabilities of the answers of preference pairs under the model that a run starts from, kept in its directory.

reference_log_probs.jsonl:
    {"model": ..., "data": ...}    fingerprint of the start model's parameters, and digest of the rows
    {"split": "files/train", "first": 0, "chosen": [...], "rejected": [...]}    of the pairs from `first` on

A line is one batch, in the order of the pairs in the store. A run that is interrupted continues after the last whole
line, with the same batches and so with the same numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.batch_spec import RowShape, sub_batch_spec
from t5x_like.config.data import DataConfig
from t5x_like.data.store.token_store import Split, Store
from t5x_like.data.stream import rng
from t5x_like.data.stream.feature_converters import Features
from t5x_like.data.stream.preference_rows import PreferenceRows
from t5x_like.errors import SafetyError
from t5x_like.faults import fault_of_os_error
from t5x_like.utils.digests import json_digest
from t5x_like.utils.json_reader import parse_json

FILE = "reference_log_probs.jsonl"
Values = dict[str, npt.NDArray[np.float32]]
"""float32 [pairs, 2] by "CORPUS/SPLIT": log-probabilities of the chosen and rejected answers; NaN: not made yet."""


def data_identity(data: DataConfig, stores: Sequence[Store]) -> str:
    """Return a digest of the stores and of the settings that determine the token ids of prompts and answers."""
    assert data.preference is not None
    lengths = [data.inputs_length, data.targets_length]
    form = [data.preference.mode, data.preference.dialogues]
    return json_digest([[store.fingerprint for store in stores], data.layout, lengths, form])[:32]


def missing_values(data: DataConfig, stores: Sequence[Store]) -> Values:
    """Return values for all pairs of all splits, none of which is made yet."""
    return {name: np.full((split.num_documents, 2), np.nan, np.float32) for name, _, split in _splits(data, stores)}


def _splits(data: DataConfig, stores: Sequence[Store]) -> Iterator[tuple[str, Store, Split]]:
    for share, store in zip(data.sources, stores, strict=True):
        for name in store.splits:
            if (split := store.split(name)).num_documents:
                yield f"{share.name}/{name}", store, split


def read_lines(path: Path, values: Values) -> dict[str, Any]:
    """Write the log-probabilities of a file into `values`, and return the file's first line.

    Raises:
      SafetyError: the file cannot be read, or is not of these pairs.
    """
    try:
        header, *lines = [parse_json(line) for line in path.read_bytes().splitlines()]
        if not isinstance(header, dict):
            raise ValueError("its first line is no object")
        for line in lines:
            pairs = np.array([line["chosen"], line["rejected"]], np.float32).T
            values[line["split"]][line["first"] : line["first"] + len(pairs)] = pairs
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        if isinstance(error, OSError) and fault_of_os_error(error) is not None:
            raise  # A fault of the storage has an exit code of its own: after a restart the file may be readable.
        raise SafetyError(
            f"{path}: cannot be read ({type(error).__name__}: {error}), expected the log-probabilities of the "
            "reference; bring the file back"
        ) from None
    return header


def format_header(header: Mapping[str, str]) -> str:
    """Return the first line of a file."""
    return json.dumps(dict(header))


def format_line(name: str, first: int, log_probs_Nx2: npt.NDArray[np.float32]) -> str:
    """Return the line of the pairs from `first` on. Each number is read back with the same bits."""
    chosen, rejected = log_probs_Nx2.astype(np.float64).T.tolist()
    return json.dumps({"split": name, "first": first, "chosen": chosen, "rejected": rejected})


def missing_batches(
    data: DataConfig, stores: Sequence[Store], rows: int, done: Mapping[str, int]
) -> Iterator[tuple[str, int, int, Features]]:
    """Yield (split, first pair, number of pairs, features) of the pairs whose log-probabilities are to be made.

    Args:
      rows: Rows of a batch. The last one of a split is completed with rows of padding.
      done: Number of pairs of each split that are made.
    """
    assert data.preference is not None
    spec = sub_batch_spec(data, RowShape(data.inputs_length, data.targets_length, packed=False), rows)
    for name, store, split in _splits(data, stores):
        reader = PreferenceRows(store, split, data, data.preference, rng.fold_in(0, 0))
        for first in range(done[name], reader.num_rows, rows):
            pair_n = np.arange(first, min(first + rows, reader.num_rows))
            out: Features = {name: np.zeros(array.shape, array.dtype) for name, array in spec.items()}
            reader.put(out, pair_n - first, pair_n)
            yield name, first, len(pair_n), out


def digest(values: Values) -> str:
    """Return a digest of the log-probabilities of all pairs."""
    found = hashlib.sha256()
    for name, array in sorted(values.items()):
        found.update(f"{name} {len(array)} ".encode() + array.astype("<f4").tobytes())
    return found.hexdigest()[:32]


def is_complete(values: Values) -> bool:
    """Return whether all pairs have their log-probabilities."""
    return not any(np.isnan(array).any() for array in values.values())


def attach(values: Values, data: DataConfig, stores: Sequence[Store]) -> None:
    """Give the splits of the stores their log-probabilities, which rows are then made with."""
    for name, _, split in _splits(data, stores):
        split.reference_log_probs = values[name]


def attach_from(directory: Path, data: DataConfig, stores: Sequence[Store]) -> None:
    """Give the stores of a run the log-probabilities that it has written; do nothing if they are not complete.

    Raises:
      SafetyError: the file is damaged, or belongs to other data.
    """
    path = directory / FILE
    if not path.is_file():
        return
    values = missing_values(data, stores)
    found = read_lines(path, values).get("data")
    if found != data_identity(data, stores):
        raise SafetyError(f"{path}: found pairs with the digest {found}, expected {data_identity(data, stores)}")
    if is_complete(values):
        attach(values, data, stores)
