"""Saving and restoring: what comes back, when a save counts, which ones stay, and what is refused."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.checkpoint_states import abstract, assert_same_bits, make_state

from t5x_like.checkpoints import checksums
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig
from t5x_like.errors import ConfigError, SafetyError
from t5x_like.utils import tree_paths


def snapshot(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def manager(tmp_path: Path):
    manager = CheckpointManager(tmp_path / "checkpoints", CheckpointConfig())
    yield manager
    manager.close()


def test_restored_state_is_the_saved_one(manager: CheckpointManager):
    state, meta = make_state(7), {"config": {"name": "a"}, "data": {"step": 7, "fingerprint": "f"}}
    assert manager.latest() is None
    manager.save(7, state, meta)
    step, restored, restored_meta = manager.restore(abstract(state))
    assert (step, restored_meta, manager.latest()) == (7, meta, 7)
    assert_same_bits(restored, state)
    assert manager.read_meta() == meta


def test_parameters_in_bfloat16_are_read_in_float32(manager: CheckpointManager):
    values = jax.random.normal(jax.random.key(0), (8, 4)).astype(jnp.bfloat16)
    state = {"params": {"kernel": values, "count": jnp.int32(3)}, "step": jnp.int32(7)}
    manager.save(7, state, {})
    same = abstract(state)["params"]
    wide = same | {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=values.sharding)}
    for wanted, expected in ((same, values), (wide, values.astype(jnp.float32))):
        _, found, _ = manager.restore_params(wanted)
        assert_same_bits(found, {"kernel": expected, "count": jnp.int32(3)})
    # Training goes on with the very state.
    with pytest.raises(SafetyError, match="kernel: found bfloat16"):
        manager.restore({"params": wide, "step": abstract(state)["step"]})


def test_metadata_may_hold_values_that_are_not_numbers(manager: CheckpointManager):
    """A loss that is not finite must not end the run in the middle of a save."""
    manager.save(1, make_state(), {"interval": {"loss": [float("nan"), 3.0]}})
    (loss, weight) = manager.read_meta()["interval"]["loss"]
    assert np.isnan(loss) and weight == 3.0


def test_save_survives_donation(manager: CheckpointManager):
    state = make_state(1)
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 + 3, tree), donate_argnums=0)
    manager.save(1, state, {})
    jax.block_until_ready(overwrite(state))
    _, restored, _ = manager.restore(abstract(state))
    assert_same_bits(restored, expected)


def test_step_is_listed_only_when_its_checksums_are_there(manager: CheckpointManager, monkeypatch):
    """`save` returns while the checkpoint is being finished; until then nobody sees it."""
    go_on, write_checksums = threading.Event(), checksums.write_checksums

    def slow(directory: Path) -> None:
        assert go_on.wait(timeout=240)
        write_checksums(directory)

    monkeypatch.setattr(checksums, "write_checksums", slow)
    manager.save(1, make_state(), {})
    assert manager.steps() == []
    go_on.set()
    manager.wait()
    assert manager.steps() == [1]


def test_a_directory_that_vanishes_during_a_save_is_an_error_with_its_name(tmp_path: Path, monkeypatch):
    """As when its file system is unmounted; the directory below the mount point may be missing, too."""
    manager = CheckpointManager(tmp_path / "checkpoints", CheckpointConfig())
    write = checksums.write_checksums

    def vanish(directory: Path) -> None:
        manager.directory.rename(tmp_path / "elsewhere")
        write(directory)

    monkeypatch.setattr(checksums, "write_checksums", vanish)
    manager.save(1, make_state(), {})
    with pytest.raises(SafetyError, match="found no such directory at the end of the save of step 1"):
        manager.wait()
    manager.close()


def test_checksums_are_those_of_sha256sum(manager: CheckpointManager):
    manager.save(1, make_state(), {})
    manager.wait()
    directory = manager.directory / "1"
    check = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=directory, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr
    listed = {line.removesuffix(": OK") for line in check.stdout.splitlines()}
    assert listed == set(snapshot(directory)) - {"SHA256SUMS"}


@pytest.mark.parametrize(
    ("max_to_keep", "every", "expected"),
    [(2, None, [50, 60]), (1, None, [60]), (2, 20, [20, 40, 50, 60]), (1, 30, [30, 60])],
)
def test_newest_and_periodic_checkpoints_are_kept(
    tmp_path: Path, max_to_keep: int, every: int | None, expected: list[int]
):
    config = CheckpointConfig(max_to_keep=max_to_keep, keep_period=every)
    manager, state = CheckpointManager(tmp_path, config), make_state()
    for step in range(10, 70, 10):
        manager.save(step, state, {})
    manager.close()
    assert manager.steps() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, expected))


def test_same_step_twice_is_saved_once(manager: CheckpointManager):
    first = make_state(1)
    assert manager.save(5, first, {"n": 1})
    assert not manager.save(5, make_state(2), {"n": 2})
    _, restored, meta = manager.restore(abstract(first))
    assert meta == {"n": 1}
    assert_same_bits(restored, first)


def test_other_parameters_are_refused_with_all_paths(manager: CheckpointManager):
    state = make_state()
    manager.save(1, state, {})
    wanted = abstract(state)
    head, kernel = wanted["params"]["head"], wanted["params"]["decoder"]["layers"]["mlp"]["wi"]["kernel"]
    wanted["params"]["head"] = {
        "kernel": jax.ShapeDtypeStruct((16, 9), head["kernel"].dtype, sharding=head["kernel"].sharding),
        "bias": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=head["bias"].sharding),
        "scale": head["bias"],
    }
    del wanted["params"]["decoder"]
    wanted["params"]["encoder"] = {"kernel": kernel}
    manager.wait()
    # The arrays are damaged too: the refusal comes before they are looked at, and no fallback is tried.
    damage_one_array(manager.directory / "1")
    with pytest.raises(SafetyError) as refusal:
        manager.restore(wanted)
    lines = [line.strip() for line in str(refusal.value).splitlines() if line.startswith("  - ")]
    assert lines == [
        "- params/decoder/layers/mlp/wi/kernel: found float32[2,16,32], expected nothing",
        "- params/encoder/kernel: found nothing, expected float32[2,16,32]",
        "- params/head/bias: found bfloat16[8], expected float32[8]",
        "- params/head/kernel: found float32[16,8], expected float32[16,9]",
        "- params/head/scale: found nothing, expected bfloat16[8]",
    ]
    assert manager.steps() == [1]


def test_other_optimizer_is_refused(manager: CheckpointManager):
    state = make_state()
    manager.save(1, state, {})
    other = abstract({**state, "opt_state": optax.sgd(0.1, momentum=0.9).init(state["params"])})
    with pytest.raises(SafetyError, match=r"opt_state/1/0/mu/head/kernel: found float32\[16,8\], expected nothing"):
        manager.restore(other)


def test_parameters_are_restored_without_the_other_items(manager: CheckpointManager):
    state = make_state(3)
    manager.save(3, state, {"n": 3})
    manager.wait()
    for path in (manager.directory / "3" / "training").rglob("*"):
        if path.is_file():
            path.unlink()
    step, params, meta = manager.restore_params(abstract(state["params"]))
    assert (step, meta) == (3, {"n": 3})
    assert_same_bits(params, state["params"])
    with pytest.raises(SafetyError, match="training/.*missing"):
        manager.restore(abstract(state))


def test_asked_for_step_is_that_step_or_refused(manager: CheckpointManager):
    states = {step: make_state(step) for step in (1, 2, 3)}
    for step, state in states.items():
        manager.save(step, state, {"n": step})
    step, restored, _ = manager.restore(abstract(states[2]), step=2)
    assert step == 2
    assert_same_bits(restored, states[2])
    damage_one_array(manager.directory / "2")
    with pytest.raises(SafetyError, match="step 2"):
        manager.restore(abstract(states[2]), step=2)
    with pytest.raises(ConfigError, match="no checkpoint of step 9"):
        manager.restore(abstract(states[2]), step=9)
    assert manager.steps() == [1, 2, 3]
    assert manager.read_meta(step=1) == {"n": 1}


def test_folder_with_the_name_of_another_step_is_refused(manager: CheckpointManager):
    state = make_state(1)
    manager.save(1, state, {})
    manager.wait()
    (manager.directory / "1").rename(manager.directory / "2")
    for read in (lambda: manager.restore(abstract(state)), lambda: manager.read_meta()):
        with pytest.raises(SafetyError, match="holds step 1, expected 2"):
            read()


def test_empty_directory_is_refused(manager: CheckpointManager):
    with pytest.raises(SafetyError, match="no checkpoint"):
        manager.restore(abstract(make_state()))
    with pytest.raises(SafetyError, match="no checkpoint"):
        manager.read_meta()


def test_damaged_step_is_reported_and_can_be_saved_again(manager: CheckpointManager, caplog):
    states = {step: make_state(step) for step in (10, 20)}
    for step, state in states.items():
        manager.save(step, state, {})
    manager.wait()
    name = damage_one_array(manager.directory / "20")
    step, restored, _ = manager.restore(abstract(states[10]))
    assert step == 10
    assert_same_bits(restored, states[10])
    report = caplog.text
    assert str(manager.directory / "20") in report and name in report and "10 steps are lost" in report
    assert (manager.directory / "20.damaged").is_dir()

    assert manager.save(20, states[20], {})
    step, restored, _ = manager.restore(abstract(states[20]))
    assert step == 20
    assert_same_bits(restored, states[20])
    assert not (manager.directory / "20.damaged").exists()


def test_reader_changes_no_files(tmp_path: Path):
    writer, state = CheckpointManager(tmp_path, CheckpointConfig()), make_state()
    writer.save(1, state, {})
    writer.save(2, state, {})
    writer.close()
    (tmp_path / "3.saving.orbax-checkpoint-tmp").mkdir()
    damage_one_array(tmp_path / "2")
    before = snapshot(tmp_path)
    reader = CheckpointManager(tmp_path, CheckpointConfig(), read_only=True)
    assert reader.restore_params(abstract(state["params"]))[0] == 1
    reader.close()
    assert snapshot(tmp_path) == before
    assert (tmp_path / "3.saving.orbax-checkpoint-tmp").is_dir()


def test_only_leftovers_are_removed(tmp_path: Path):
    stay = ["notes", "7.damaged", "12", "5.saving-me"]
    go = ["12.saving", "12.saving.files", "12.saving.orbax-checkpoint-tmp", "3.deleting"]
    for name in stay + go:
        (tmp_path / name / "params").mkdir(parents=True)
    CheckpointManager(tmp_path, CheckpointConfig()).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)


def test_files_belong_to_the_step_and_to_its_checksums(manager: CheckpointManager, caplog):
    state = make_state()
    for step in (1, 2):
        manager.save(step, state, {}, {f"host-{host}": bytes([step, host]) * 9 for host in range(2)})
    step, _, _ = manager.restore(abstract(state))
    assert manager.read_files(step) == {"host-0": b"\2\0" * 9, "host-1": b"\2\1" * 9}
    assert sorted(path.name for path in manager.directory.iterdir()) == ["1", "2"], "nothing waits beside them"

    (manager.directory / "2" / "files" / "host-1").write_bytes(b"\2\1" * 8 + b"\2\3")
    assert manager.restore_params(abstract(state["params"]))[0] == 2, "parameters alone need no files"
    step, _, _ = manager.restore(abstract(state))
    assert step == 1 and manager.read_files(step) == {"host-0": b"\1\0" * 9, "host-1": b"\1\1" * 9}
    assert "files/host-1: not the content that was saved" in caplog.text


def test_a_step_without_files_has_none(manager: CheckpointManager):
    manager.save(1, make_state(), {})
    manager.wait()
    assert manager.read_files(1) == {}


def test_another_format_is_refused(manager: CheckpointManager):
    state = make_state()
    manager.save(1, state, {})
    manager.wait()
    file = manager.directory / "1" / "meta.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    (manager.directory / "1" / "SHA256SUMS").unlink()
    checksums.write_checksums(manager.directory / "1")
    with pytest.raises(SafetyError, match="format 99, expected 1"):
        manager.restore(abstract(state))


def test_paths_must_be_unique():
    with pytest.raises(ValueError, match="same path"):
        tree_paths.by_path({"a": {"b": 1}, "a/b": 2})


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (simulated) devices")
def test_restores_onto_another_mesh(manager: CheckpointManager):
    names = jax.sharding.PartitionSpec
    saved_on = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    state = {"params": {"kernel": jnp.arange(16.0 * 8).reshape(16, 8)}, "step": jnp.int32(4)}
    sharding = jax.sharding.NamedSharding(saved_on, names("fsdp"))
    manager.save(4, {**state, "params": jax.device_put(state["params"], sharding)}, {})
    other = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for mesh, spec in [(other, names(None, "tensor")), (other, names("tensor", "data")), (other, names())]:
        sharding = jax.sharding.NamedSharding(mesh, spec)
        wanted = jax.tree.map(
            lambda leaf, sharding=sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding if leaf.ndim else leaf.sharding
            ),
            state,
        )
        _, restored, _ = manager.restore(wanted)
        assert restored["params"]["kernel"].sharding.is_equivalent_to(sharding, 2)
        assert_same_bits(restored, state)


def damage_one_array(step_directory: Path) -> str:
    """Flip one bit in the largest file below params/ and return its name."""
    file = max((p for p in (step_directory / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.relative_to(step_directory).as_posix()
