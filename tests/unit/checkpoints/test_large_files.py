"""Large files of array data are not hashed: what changes in them is found by size, fingerprint or TensorStore."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.checkpoint_states import abstract, assert_same_bits

from t5x_like.checkpoints import checksums, orbax_arrays
from t5x_like.checkpoints.fingerprints import Summand, weighted
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig
from t5x_like.errors import SafetyError


def state_of(step: int) -> dict[str, Any]:
    random = np.random.default_rng(step)
    arrays = {name: jax.numpy.asarray(random.standard_normal((64, 32), np.float32)) for name in ("a", "b")}
    return {"params": arrays, "opt_state": {"count": jax.numpy.int32(step)}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large") / "checkpoints"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checksums, "LARGE_BYTES", 4096)
        manager = CheckpointManager(directory, CheckpointConfig())
        for step in (1, 2):
            manager.save(step, state_of(step), {})
        manager.close()
    return directory


def large_files(step: Path) -> dict[str, int]:
    lines = (step / checksums.SIZES).read_text().splitlines()
    return {name: int(size) for size, _, name in (line.partition("  ") for line in lines)}


def test_only_array_data_are_not_hashed(saved: Path) -> None:
    found = large_files(saved / "2")
    assert found and all("/d/" in name and (saved / "2" / name).stat().st_size == found[name] for name in found)
    hashed = {line.partition("  ")[2] for line in (saved / "2" / checksums.SUMS).read_text().splitlines()}
    assert {checksums.SIZES, "meta.json", "params/manifest.ocdbt"} <= hashed and not hashed & found.keys()
    assert CheckpointManager(saved, CheckpointConfig(), read_only=True).find_damage(2) == []


def test_a_flipped_bit_in_a_large_file_falls_back(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bits of a file that no array is read from may change: then the state is the one that was saved."""
    wanted = abstract(state_of(0))
    fell_back = total = 0
    for name, size in large_files(saved / "2").items():
        for position in range(7, size, size // 8):
            directory = tmp_path / f"{total}"
            shutil.copytree(saved, directory)
            content = bytearray((directory / "2" / name).read_bytes())
            content[position] ^= 4
            (directory / "2" / name).write_bytes(content)
            reader = CheckpointManager(directory, CheckpointConfig(), read_only=True)
            is_damaged = bool(reader.find_damage(2))
            assert reader.restore(wanted)[0] == (1 if is_damaged else 2) and reader.steps() == [1, 2]
            caplog.clear()
            step, state, _ = CheckpointManager(directory, CheckpointConfig()).restore(wanted)
            assert_same_bits(state, state_of(step))
            assert step == (1 if is_damaged else 2)
            if is_damaged:
                assert "2 is damaged and was renamed to 2.damaged" in caplog.text
            fell_back, total = fell_back + is_damaged, total + 1
    assert fell_back >= total // 2


def test_an_array_that_cannot_be_read_is_not_reported_as_changed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert orbax_arrays.stored_fingerprint(saved / "2", "params/none", weighted) is None
    stored = orbax_arrays.stored_fingerprint

    def found(path: Path, array: str, summand: Summand) -> str | None:
        return {"params/a": None, "params/b": "0"}.get(array, stored(path, array, summand))

    monkeypatch.setattr(orbax_arrays, "stored_fingerprint", found)
    assert CheckpointManager(saved, CheckpointConfig(), read_only=True).find_damage(2) == [
        "params/a: cannot be read",
        "params/b: found other values than were in memory when it was saved",
    ]


@pytest.mark.parametrize("kind", ["cut", "missing", "list"])
def test_large_files_of_another_size_are_found_before_they_are_read(saved: Path, tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    name = next(iter(large_files(directory / "2")))
    file = directory / "2" / (checksums.SIZES if kind == "list" else name)
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-3])
    expected = {"cut": r"found [\d,]+ bytes, expected", "missing": "missing", "list": f"{checksums.SIZES}: "}[kind]
    manager = CheckpointManager(directory, CheckpointConfig())
    with pytest.raises(SafetyError, match=expected):
        manager.restore(abstract(state_of(0)), 2)
    assert manager.restore(abstract(state_of(0)))[0] == 1 and manager.steps() == [1]
