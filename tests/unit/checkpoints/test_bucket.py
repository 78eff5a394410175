"""Checkpoints in an object store, here in memory: what is listed, restored, found damaged and removed.

tests/buckets does the same with servers and kills.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.checkpoint_states import abstract, assert_same_bits, make_state
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.checkpoints import bucket_arrays
from t5x_like.checkpoints.bucket import BucketCheckpoints
from t5x_like.config import CheckpointConfig
from t5x_like.errors import ConfigError, SafetyError
from t5x_like.storage import locations
from t5x_like.storage.locations import Url, location


@pytest.fixture
def url(tmp_path: Path) -> Url:
    url = location(f"memory://{tmp_path.name}/checkpoints")
    assert isinstance(url, Url)
    return url


def opened(url: Url, read_only: bool = False, **config: Any) -> BucketCheckpoints:
    return BucketCheckpoints(url, CheckpointConfig(**config), directory=Path("runs/a/checkpoints"), read_only=read_only)


def save(checkpoints: BucketCheckpoints, step: int, **files: bytes) -> dict[str, Any]:
    state = make_state(step)
    assert checkpoints.save(step, state, {"step": step}, files)
    checkpoints.wait()
    return state


def flip(key: Url, position: int = 0) -> None:
    data = bytearray(locations.read_bytes(key) or b"")
    data[position] ^= 1
    locations.write_bytes(key, bytes(data))


def test_parameters_in_bfloat16_are_read_in_float32(url: Url) -> None:
    checkpoints = opened(url)
    values = jax.random.normal(jax.random.key(0), (8, 4)).astype(jax.numpy.bfloat16)
    assert checkpoints.save(7, {"params": {"kernel": values}, "step": jax.numpy.int32(7)}, {})
    wanted = {"kernel": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=values.sharding)}
    _, found, _ = checkpoints.restore_params(wanted)
    assert_same_bits(found, {"kernel": values.astype(np.float32)})


def test_restored_state_is_the_saved_one(url: Url) -> None:
    checkpoints = opened(url)
    state = make_state(7)
    expected, wanted = jax.tree.map(np.array, state), abstract(state)
    assert checkpoints.latest() is None
    assert checkpoints.save(7, state, {"data": float("nan")}, {"host": b"position"})
    # The arrays may be donated to the next step.
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 3, tree), donate_argnums=0)(state))
    assert not checkpoints.save(7, make_state(7), {}), "it is saved already"
    step, restored, meta = checkpoints.restore(wanted)
    assert step == checkpoints.latest() == 7 and np.isnan(meta["data"]) and np.isnan(checkpoints.read_meta()["data"])
    assert_same_bits(restored, expected)
    assert checkpoints.read_files(7) == {"host": b"position"}
    step, params, _ = opened(url, read_only=True).restore_params(wanted["params"])
    assert_same_bits(params, expected["params"])
    with pytest.raises(ConfigError, match="no checkpoint of step 8"):
        checkpoints.restore(wanted, 8)


def test_shards_are_chunks_and_are_restored_on_another_mesh(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_arrays, "CHUNK_BYTES", 96)
    mesh = jax.make_mesh((4, 2), ("a", "b"), devices=jax.devices()[:8])
    values = np.arange(16 * 12, dtype=np.float32).reshape(16, 12)

    def split(*names: str | None) -> dict[str, Any]:
        return {"params": {"w": jax.device_put(values, NamedSharding(mesh, PartitionSpec(*names)))}}

    checkpoints = opened(url)
    checkpoints.save(1, split("a", None), {})
    checkpoints.wait()
    keys = [key for key in locations.keys(url / "data") if "params/w/c/" in key]
    # Four shards of 4 x 12, each in two chunks of 96 bytes; the copies on axis b are not written.
    assert len(keys) == 8
    for names in (("a", "b"), (None, "a"), (None, None), ("b", None)):
        _, restored, _ = checkpoints.restore(abstract(split(*names)))
        assert restored["params"]["w"].sharding.spec == PartitionSpec(*names)
        np.testing.assert_array_equal(restored["params"]["w"], values)
        broadcast = opened(url, read_only=True, load_and_broadcast=True)
        _, restored, _ = broadcast.restore(abstract(split(*names)))
        np.testing.assert_array_equal(restored["params"]["w"], values)


def test_step_is_listed_only_when_its_record_is_written(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    written, go_on, write = threading.Event(), threading.Event(), bucket_arrays.write

    def slow(*arguments: Any) -> None:
        write(*arguments)
        written.set()
        assert go_on.wait(timeout=240)

    monkeypatch.setattr(bucket_arrays, "write", slow)
    checkpoints = opened(url)
    checkpoints.save(1, make_state(), {})
    assert written.wait(timeout=240) and checkpoints.steps() == []
    # Another process, which has taken over, removes the data of the first one, whose checkpoint must not appear intact.
    other = opened(url)
    assert not locations.children(url / "data")
    go_on.set()
    checkpoints.wait()
    with pytest.raises(SafetyError, match="missing"):
        other.restore(abstract(make_state()))


def test_save_of_another_process_is_not_replaced(url: Url) -> None:
    first, second = opened(url), opened(url, max_to_keep=5)
    state = save(first, 1)
    second._commit({"step": 2, "data": "2.x", "format": 1, "meta": {}}, [{"files": {}}])
    with pytest.raises(SafetyError, match="another process has saved step 1"):
        second._commit({"step": 1, "data": "1.x"}, [{"files": {}}])
    assert_same_bits(first.restore(abstract(state), 1)[1], state)


def test_commit_whose_answer_is_lost_is_one(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    write = locations.write_new

    def write_without_answer(path: Url, value: bytes) -> bool:
        assert write(path, value)
        return False

    monkeypatch.setattr(locations, "write_new", write_without_answer)
    checkpoints = opened(url)
    expected = save(checkpoints, 1)
    assert_same_bits(checkpoints.restore(abstract(expected))[1], expected)

    def write_and_fail(path: Url, value: bytes) -> bool:
        write(path, value)
        raise SafetyError("no answer")

    monkeypatch.setattr(locations, "write_new", write_and_fail)
    expected = make_state(2)
    checkpoints.save(2, expected, {})
    with pytest.raises(SafetyError, match="no answer"):
        checkpoints.wait()
    step, restored, _ = opened(url).restore(abstract(expected))
    assert step == 2, "the data of a record are never removed"
    assert_same_bits(restored, expected)


def test_checkpoint_without_the_lease_is_not_committed(url: Url) -> None:
    def lost() -> None:
        raise SafetyError("another process has taken the lease")

    checkpoints = BucketCheckpoints(url, CheckpointConfig(), directory=Path("a"), before_commit=lost)
    checkpoints.save(1, make_state(), {})
    with pytest.raises(SafetyError, match="has taken the lease"):
        checkpoints.close()
    assert checkpoints.steps() == [] and not locations.children(url / "data")


@pytest.mark.parametrize("kind", ["array", "file", "record", "missing chunk", "truncated chunk"])
def test_flipped_byte_is_found_named_and_fallen_back_from(
    url: Url, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    checkpoints = opened(url, max_to_keep=5)
    expected = save(checkpoints, 1)
    save(checkpoints, 2, host=b"position")
    (folder,) = locations.children(url / "data", "2.")
    chunk = url / "data" / folder / "params/head/kernel/c/0/0"
    match kind:
        case "array":
            flip(chunk, 5)
        case "file":
            flip(url / "data" / folder / "files/host", 1)
        case "record":
            flip(url / "committed" / "2.json", 9)
        case "missing chunk":
            locations.remove_key(chunk)
        case "truncated chunk":
            locations.write_bytes(chunk, (locations.read_bytes(chunk) or b"")[:7])
    with pytest.raises(SafetyError, match=r"there is no intact checkpoint(.|\n)*step 2: "):
        opened(url, read_only=True).restore(abstract(expected), 2)
    assert checkpoints.steps() == [1, 2]
    with caplog.at_level(logging.ERROR):
        step, restored, _ = checkpoints.restore(abstract(expected))
    assert step == 1 and checkpoints.steps() == [1]
    assert_same_bits(restored, expected)
    named = {"file": "files/host", "record": "committed/2.json"}.get(kind, "params/head/kernel")
    assert named in caplog.text and "Restoring step 1 instead" in caplog.text
    # The damaged checkpoint stays until its step is saved again.
    opened(url)
    assert locations.children(url / "data", "2.") == [folder]
    save(checkpoints, 2)
    assert folder not in locations.children(url / "data") and checkpoints.steps() == [1, 2]


def test_old_checkpoints_and_leftovers_are_removed(url: Url) -> None:
    checkpoints = opened(url, max_to_keep=2, keep_period=4)
    checkpoints.protected = 1
    for step in range(1, 8):
        save(checkpoints, step)
    assert checkpoints.steps() == [1, 4, 6, 7]
    locations.write_bytes(url / "data" / "9.killed" / "params/w/c/0", b"1")
    opened(url, read_only=True)
    assert len(locations.children(url / "data")) == 5
    opened(url)
    assert {name.partition(".")[0] for name in locations.children(url / "data")} == {"1", "4", "6", "7"}
    checkpoints.remove_after(4)
    assert checkpoints.steps() == [1, 4] and len(locations.children(url / "data")) == 2


def test_values_that_changed_between_memory_and_storage_are_found(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks have right checksums, of wrong bytes."""
    copy = bucket_arrays.copy_own_shards

    def copy_with_an_error(leaves: Any) -> Any:
        pieces = copy(leaves)
        data = next(data for path, _, data in pieces if path == "params/head/kernel")
        data.view(np.uint32)[3, 2] ^= 1 << 20
        return pieces

    checkpoints = opened(url)
    expected = save(checkpoints, 1)
    monkeypatch.setattr(bucket_arrays, "copy_own_shards", copy_with_an_error)
    save(checkpoints, 2)
    with pytest.raises(SafetyError, match="other values than were in memory when it was saved, in params/head/kernel"):
        opened(url, read_only=True).restore(abstract(expected), 2)
    assert checkpoints.restore(abstract(expected))[0] == 1


def test_another_state_is_refused_before_it_is_read(url: Url) -> None:
    checkpoints = opened(url)
    state = save(checkpoints, 1)
    del state["params"]["head"]
    with pytest.raises(SafetyError, match=r"params/head/bias: found bfloat16\[8\], expected nothing"):
        checkpoints.restore(abstract(state))
