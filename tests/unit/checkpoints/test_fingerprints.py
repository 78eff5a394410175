"""Fingerprints: every bit and place counts, the sharding does not, and a restored state is compared with them."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoint_examples import digest, make_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_like.checkpoints import checksums, orbax_arrays
from t5x_like.checkpoints import fingerprints as module
from t5x_like.checkpoints.fingerprints import (
    FINGERPRINTS,
    FIRST_FINGERPRINTS,
    Summand,
    fingerprint,
    fingerprint_of_part,
    fingerprints,
    fingerprints_of_whole_arrays,
    mixed,
    weighted,
)
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig
from t5x_like.errors import SafetyError
from t5x_like.utils import tree_paths

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool")


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_and_every_place_counts(dtype: str) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 2, (3, 5)).astype(bool) if dtype == "bool" else jnp.asarray(rng.normal(size=(3, 5)) * 40)
    original = np.asarray(array).astype(jnp.dtype(dtype))
    variants = {"original": original, "rolled": np.roll(original, 1, axis=1), "flat": original.reshape(-1)}
    for place in range(original.size):
        for bit in range(1 if dtype == "bool" else 8 * original.itemsize):
            flipped = bytearray(original.tobytes())
            flipped[place * original.itemsize + bit // 8] ^= 1 << bit % 8
            variants[f"{place} {bit}"] = np.frombuffer(bytes(flipped), original.dtype).reshape(3, 5)
    found = {name: fingerprints({"x": jnp.asarray(variant)})["x"] for name, variant in variants.items()}
    # A reshaped array has the same words at the same places; its shape is compared elsewhere.
    assert found.pop("flat") == found["original"]
    assert len(set(found.values())) == len(found)


def test_sharding_does_not_count() -> None:
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    specs = (PartitionSpec(), PartitionSpec("a"), PartitionSpec("b", "a"), PartitionSpec(None, ("a", "b")))
    # Small shards, and large ones, whose rows are shorter or longer than a block of the loops on CPUs.
    for shape, few in (((8, 16), specs), ((64, 136, 88), specs[2:]), ((16, 40, 1680), specs[1:3])):
        x = jax.random.normal(jax.random.key(0), shape)
        placed = {str(spec): jax.device_put(x, NamedSharding(mesh, spec)) for spec in few}
        assert len(set(fingerprints(placed).values())) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_all_programs_compute_the_same(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops of CPUs, the program of accelerators and NumPy agree, also on what is no multiple of a block."""
    random = np.random.default_rng(0)
    shapes = ((70_001,), (2, 3, 23, 999))
    for summand in (weighted, mixed):
        arrays = [jnp.asarray(random.integers(0, 2**20, shape)).astype(dtype) for shape in shapes]
        found = [int(value, 16) for value in fingerprints({str(x.shape): x for x in arrays}, summand).values()]
        assert found == fingerprints_of_whole_arrays(arrays, summand).tolist()
        monkeypatch.setattr(module, "_SMALL_WORDS", 2**30)
        whole = [(np.asarray(x), [slice(None)] * x.ndim, x.shape, summand) for x in arrays]
        assert found == [fingerprint_of_part(*each) for each in whole]
        monkeypatch.undo()


@pytest.mark.parametrize("summand, value", [(weighted, "0a52d910"), (mixed, "4bb94f2e")])
def test_fingerprints_stay_what_they_are(summand: Summand, value: str) -> None:
    """Checkpoints exist that contain them."""
    x = np.arange(30, dtype=np.float32).reshape(5, 6)
    assert fingerprints({"x": jnp.asarray(x)}, summand) == {"x": value}


def test_exchanged_words_and_blocks_are_found() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal(2**18).astype(np.float32)
    changed = {"nothing": x}
    for distance in (1, 2, 2**10, 2**17):
        for length in (1, 2**10):
            one, other = slice(5, 5 + length), slice(5 + distance, 5 + distance + length)
            changed[f"{distance} {length}"] = exchanged = x.copy()
            exchanged[one], exchanged[other] = x[other].copy(), x[one].copy()
    # Two words that differ in their sign only.
    y = x.copy()
    y[7], y[99] = 1.5, -1.5
    changed["positive first"] = y
    changed["negative first"] = y.copy()
    changed["negative first"][[7, 99]] = -1.5, 1.5
    found = fingerprints({name: jnp.asarray(values) for name, values in changed.items()})
    assert len(set(found.values())) == len(changed)


def _with_changes(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Flip the lowest bit of an element that is loaded, as a bad memory cell would, the first `times` times."""
    load, left = orbax_arrays.load, [times]

    def changed(directory: Path, leaves: Any) -> dict[str, Any]:
        found = load(directory, leaves)
        if left[0]:
            left[0] -= 1
            kernel = found["params/head/kernel"]
            found["params/head/kernel"] = kernel.at[3, 4].set(jnp.nextafter(kernel[3, 4], jnp.inf))
        return found

    monkeypatch.setattr(orbax_arrays, "load", changed)


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    for step in (1, 2):
        manager.save(step, make_state(step), {})
    manager.wait()
    return manager


def test_values_that_changed_while_they_were_read_are_read_again(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _with_changes(monkeypatch, 1)
    step, state, _ = manager.restore(abstract(make_state(0)))
    assert step == 2 and digest(state) == digest(make_state(2))
    (message,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert "params/head/kernel" in message


def test_values_that_changed_before_they_were_written_fall_back(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are intact, so only the fingerprints show it."""
    _with_changes(monkeypatch, 2)
    step, state, _ = manager.restore(abstract(make_state(0)))
    assert step == 1 and digest(state) == digest(make_state(1)) and manager.steps() == [1]


def test_named_step_with_changed_values_is_refused(manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_changes(monkeypatch, 2)
    with pytest.raises(SafetyError, match=r"in memory when it was saved, in params/head/kernel\. Name another step"):
        manager.restore(abstract(make_state(0)), step=2)
    assert manager.steps() == [1, 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "uint8", "int32"])
@pytest.mark.parametrize("shape", [(), (5,), (6, 4, 3)])
def test_numpy_adds_the_parts_of_an_array_to_its_fingerprint(dtype: str, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(len(shape))
    array = jnp.asarray(random.integers(0, 255, shape)).astype(dtype)
    cuts = [[slice(start, min(start + 4, size)) for start in range(0, size, 4)] for size in shape]
    parts = (fingerprint_of_part(np.asarray(array)[place], place, shape) for place in itertools.product(*cuts))
    assert sum(parts) % 2**32 == int(fingerprint(array))


@pytest.mark.parametrize("dtype", ["float64", "int64", "float32"])
def test_array_without_dimensions_has_the_fingerprint_of_one_element(dtype: str) -> None:
    """NumPy does not view an array without dimensions as another type, which 64-bit elements need."""
    one = np.asarray([3], dtype)
    assert fingerprint_of_part(one.reshape(()), (), ()) == fingerprint_of_part(one, (slice(0, 1),), (1,))


def test_checkpoints_of_earlier_versions_are_verified(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = manager.directory / "2" / "meta.json"
    record = json.loads(meta.read_text())
    record[FIRST_FINGERPRINTS] = fingerprints(tree_paths.by_path(make_state(2)), mixed)
    del record[FINGERPRINTS]
    meta.write_text(json.dumps(record))
    checksums.write_checksums(meta.parent)
    assert manager.restore(abstract(make_state(0)))[0] == 2
    _with_changes(monkeypatch, 2)
    assert manager.restore(abstract(make_state(0)))[0] == 1
