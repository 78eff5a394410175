"""Whole runs under faults, by the command line: after a fault the same command ends bit for bit as an uninterrupted
run, or refuses with the reason."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fault_plugin
from helpers.fault_runs import (
    LAST_STEP,
    RECIPE,
    Workspace,
    assert_same_end,
    fill,
    finish,
    logged,
    newest,
    records_of,
    wait_for,
)
from helpers.metadata_server import metadata_server
from helpers.recorded_rows import recorded_rows
from helpers.saved_state import saved_state

from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig
from t5x_like.errors import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE, EXIT_USAGE
from t5x_like.utils import tree_paths


def flip_one_bit(step_directory: Path) -> Path:
    file = max((p for p in (step_directory / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["recipe", "prefix_lm"])
def test_killed_run_ends_as_the_uninterrupted_run(
    workspace: Workspace, uninterrupted: Callable[[str], Path], recipe: str
):
    """The run is killed twice; the last process compiles its own program."""
    workdir = workspace.directory / f"twice_killed_{recipe}"
    workspace.train_and_kill(workdir, step=8, recipe=recipe)
    workspace.train_and_kill(workdir, step=newest(workdir) // 8 * 8 + 16, recipe=recipe)
    resumed_from = newest(workdir)
    assert resumed_from < LAST_STEP
    output = finish(workspace.train(workdir, recipe=recipe, compile_anew=True))
    assert f"step {resumed_from}" in output
    assert_same_end(workdir, uninterrupted(recipe))
    assert list((workspace.directory / "compiled").glob("*/jit_train-*-cache"))


def test_sigterm_saves_and_the_same_command_resumes(workspace: Workspace, uninterrupted: Callable[[str], Path]):
    workdir = workspace.directory / "terminated"
    process = workspace.train(workdir)
    wait_for(workdir / "checkpoints" / "8", process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=EXIT_RESUMABLE)
    left = json.loads((workdir / "exit.json").read_text())
    assert left["code"] == EXIT_RESUMABLE and "SIGTERM" in left["reason"]
    assert 8 <= left["step"] < LAST_STEP and newest(workdir) == left["step"]
    assert saved_state(workdir, left["step"])["step"] == left["step"]
    finish(workspace.train(workdir))
    assert_same_end(workdir, uninterrupted("recipe"))


def test_stopped_run_resumes_on_another_mesh(
    workspace: Workspace, uninterrupted: Callable[[str], Path], tmp_path: Path
):
    """The state is that of the checkpoint, which the restore compares by fingerprints; the rows and, but for the order
    of sums, the losses equal those on one device."""
    workdir, expected = tmp_path / "run", uninterrupted("recipe")
    shutil.copytree(expected, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(newest(workdir)))
    resumed_from = newest(workdir)
    assert resumed_from < LAST_STEP
    output = finish(workspace.train(workdir, "--devices", "2"))
    assert f"step {resumed_from}" in output and newest(workdir) == LAST_STEP
    assert recorded_rows(workdir) == recorded_rows(expected)
    lines, wanted = logged(workdir), logged(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["loss_tokens"] == other["loss_tokens"]


@pytest.mark.slow
def test_maintenance_notice_saves_and_the_same_command_resumes(
    workspace: Workspace, uninterrupted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    workdir = workspace.directory / "maintenance"
    with metadata_server() as server:
        monkeypatch.setenv("GCE_METADATA_HOST", server.host)
        process = workspace.train(workdir)
        wait_for(workdir / "checkpoints" / "8", process)
        server.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        finish(process, EXIT_RESUMABLE)
        record = json.loads((workdir / "exit.json").read_text())
        assert record["reason"] == "stopped by maintenance-event TERMINATE_ON_HOST_MAINTENANCE"
        assert record["step"] == newest(workdir) < LAST_STEP
        # The machine still announces its end: the restarted process uses the time that is left.
        finish(workspace.train(workdir))
    assert_same_end(workdir, uninterrupted("recipe"))


@pytest.mark.parametrize("phase", ["import", "compilation"])
def test_sigterm_before_the_first_step(workspace: Workspace, tmp_path: Path, phase: str):
    """No partial files, the exit code of a resumable run, and no exit.json of the process before."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    stale = workdir / "exit.json"
    stale.write_text('{"code": 0, "reason": "finished"}')
    os.utime(stale, (1e9, 1e9))
    process = workspace.train(workdir, compile_anew=True)
    if phase == "import":
        # The lock is created to remove the exit.json of the process before, when jax is not imported yet.
        wait_for(workdir / "lock", process)
    else:
        wait_for(workdir / "config.json", process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=EXIT_RESUMABLE)
    left = json.loads((workdir / "exit.json").read_text())
    assert left["code"] == EXIT_RESUMABLE and "SIGTERM" in left["reason"]
    assert phase == "import" or not logged(workdir)


@pytest.mark.slow
def test_damaged_newest_checkpoint_falls_back_to_the_previous_one(
    workspace: Workspace, killed_copy: Path, uninterrupted: Callable[[str], Path]
):
    step = newest(killed_copy)
    file = flip_one_bit(killed_copy / "checkpoints" / str(step))
    output = finish(workspace.train(killed_copy))
    assert str(file.relative_to(killed_copy / "checkpoints" / str(step))) in output
    assert f"Restoring step {step - 8} instead: 8 steps are lost" in output
    assert_same_end(killed_copy, uninterrupted("recipe"))


@pytest.mark.slow
def test_run_without_an_intact_checkpoint_is_refused(workspace: Workspace, killed_copy: Path):
    checkpoints = killed_copy / "checkpoints"
    steps = {path.name for path in checkpoints.iterdir() if path.name.isdecimal()}
    for step in steps:
        flip_one_bit(checkpoints / step)
    output = finish(workspace.train(killed_copy), code=EXIT_REFUSED)
    assert "there is no intact checkpoint" in output and "Traceback" not in output
    assert {path.name for path in checkpoints.iterdir() if path.name.isdecimal()} == steps
    assert json.loads((killed_copy / "exit.json").read_text())["code"] == EXIT_REFUSED


@pytest.mark.slow
@pytest.mark.parametrize("mixed_up", ["swapped", "foreign"])
def test_checkpoint_that_is_not_the_expected_one_is_refused(
    workspace: Workspace, killed_copy: Path, uninterrupted: Callable[[str], Path], mixed_up: str
):
    """Two checkpoints of the run with each other's names, and an intact checkpoint of another run."""
    checkpoints = killed_copy / "checkpoints"
    step = newest(killed_copy)
    if mixed_up == "swapped":
        (checkpoints / str(step)).rename(checkpoints / "other")
        (checkpoints / str(step - 8)).rename(checkpoints / str(step))
        (checkpoints / "other").rename(checkpoints / str(step - 8))
    else:
        shutil.copytree(uninterrupted("recipe") / "checkpoints" / "56", checkpoints / "56")
    before = (killed_copy / "metrics.jsonl").read_bytes()
    output = finish(workspace.train(killed_copy), code=EXIT_REFUSED)
    expected = f"holds step {step - 8}, expected {step}" if mixed_up == "swapped" else "found a checkpoint of run"
    assert expected in output and "Traceback" not in output
    assert json.loads((killed_copy / "exit.json").read_text())["code"] == EXIT_REFUSED
    assert (killed_copy / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_run_without_its_checkpoints_starts_over_only_if_allowed(workspace: Workspace, killed_copy: Path):
    """An empty folder of checkpoints, as if a file system were not mounted."""
    shutil.rmtree(killed_copy / "checkpoints")
    (killed_copy / "checkpoints").mkdir()
    before = (killed_copy / "metrics.jsonl").read_bytes()
    output = finish(workspace.train(killed_copy), code=EXIT_REFUSED)
    assert "is a file system not mounted" in output and "--allow-start-over" in output
    assert (killed_copy / "metrics.jsonl").read_bytes() == before
    process = workspace.train(killed_copy, "--allow-start-over")
    wait_for(killed_copy / "checkpoints" / "8", process)
    process.kill()
    process.communicate()
    (earlier,) = killed_copy.glob("before_*/metrics.jsonl")
    assert earlier.read_bytes() == before and logged(killed_copy)[0]["step"] == 3


@pytest.mark.slow
def test_checkpoints_that_vanish_during_a_run_end_it(workspace: Workspace, tmp_path: Path):
    """The folder of checkpoints is replaced by an empty one, as when its file system is unmounted."""
    process = workspace.train(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    wait_for(checkpoints / "8", process)
    checkpoints.rename(tmp_path / "elsewhere")
    checkpoints.mkdir()
    output = finish(process, code=EXIT_REFUSED)
    assert "Traceback" not in output
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == EXIT_REFUSED
    assert not any(path.name.isdecimal() for path in checkpoints.iterdir())


@pytest.mark.slow
def test_destructive_updates_are_neither_applied_nor_saved(workspace: Workspace, tmp_path: Path):
    """A learning rate with which each update is finite, and destroys the model."""
    output = finish(workspace.train(tmp_path / "run", "--training.schedule.learning-rate", "1e36"), code=EXIT_REFUSED)
    assert "was applied" in output and "Traceback" not in output
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == EXIT_REFUSED
    assert not any(path.name.isdecimal() for path in (tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_other_configuration_is_refused_with_the_difference(workspace: Workspace, killed_copy: Path):
    before = (killed_copy / "config.json").read_text()
    overrides = ("--training.schedule.learning-rate", "0.004", "--model.dtype", "bfloat16")
    output = finish(workspace.train(killed_copy, *overrides), code=EXIT_REFUSED)
    assert "training.schedule.learning_rate: 0.003 in the run, 0.004 now" in output
    assert "model.dtype: 'float32' in the run, 'bfloat16' now" in output
    assert "batch_size" not in output and "Traceback" not in output
    assert (killed_copy / "config.json").read_text() == before


@pytest.mark.slow
def test_other_data_is_refused(workspace: Workspace, killed_copy: Path, tmp_path: Path):
    """The configuration is the same, but a text of the corpus has changed."""
    other = Workspace(tmp_path / "other")
    (other.directory / "texts" / "0.txt").write_text("another text\n" * 50)
    finish(other.start("prepare", RECIPE))
    output = finish(other.train(killed_copy), code=EXIT_REFUSED)
    assert "fingerprint" in output and "Traceback" not in output


def test_finished_run_is_unchanged(workspace: Workspace, uninterrupted: Callable[[str], Path]):
    workdir = uninterrupted("recipe")
    before = (workdir / "metrics.jsonl").read_bytes(), newest(workdir)
    (workdir / "exit.json").unlink()
    output = finish(workspace.train(workdir))
    assert "nothing to train" in output
    left = json.loads((workdir / "exit.json").read_text())
    assert left["code"] == EXIT_OK and left["step"] == LAST_STEP
    assert ((workdir / "metrics.jsonl").read_bytes(), newest(workdir)) == before


@pytest.fixture
def small_disk(mount_disk: Callable[[int], Path]) -> Path:
    """Mount a file system of 12 MiB: enough for the checkpoints of this run."""
    return mount_disk(12)


@pytest.mark.slow
def test_full_disk_is_reported_and_the_run_resumes(
    workspace: Workspace, small_disk: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
):
    """A full disk is refused at the start. Later it ends the run, which resumes when there is space."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(8 << 20))
    output = finish(workspace.train(workdir), code=EXIT_REFUSED)
    assert "not enough disk space for the checkpoints" in output and "Traceback" not in output
    filler.unlink()

    process = workspace.train(workdir)
    wait_for(small_disk / "8", process)
    filler = fill(small_disk)
    output = finish(process, code=EXIT_REFUSED)
    # TensorStore's threads print warnings, before our message and sometimes after it.
    last = output[output.rindex("t5x-like: ") :]
    assert "No space left on device" in last and "run the same command again." in last
    assert re.search(r"intact, steps: \[8(, \d+)*\]", last)
    kept = [path.name for path in small_disk.iterdir() if path.name not in ("filler", "run_id")]
    assert kept and all(name.isdecimal() for name in kept)
    filler.unlink()
    finish(workspace.train(workdir))
    assert_same_end(workdir, uninterrupted("recipe"))


def test_state_of_another_structure_is_refused_with_each_path(
    workspace: Workspace, uninterrupted: Callable[[str], Path], tmp_path: Path
):
    """The newest checkpoint is intact and the run's own, but lacks a parameter, has another one, and one of another
    shape. Nothing is compiled before the refusal."""
    workdir = Path(shutil.copytree(uninterrupted("recipe"), tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / str(newest(workdir)))  # A finished run is not restored.
    step = newest(workdir)
    directory = workdir / "checkpoints"
    meta = json.loads((directory / str(step) / "meta.json").read_text())["meta"]
    leaves = dict(saved_state(workdir, step))
    missing, reshaped = [path for path in sorted(leaves) if path.startswith("params/") and path.endswith("/kernel")][:2]
    del leaves[missing]
    leaves[reshaped] = leaves[reshaped].reshape(-1)
    leaves["params/added"] = leaves["step"]
    shutil.rmtree(directory / str(step))
    manager = CheckpointManager(directory, CheckpointConfig())
    manager.save(step, tree_paths.nested({path: jnp.asarray(leaf) for path, leaf in leaves.items()}), meta)
    manager.close()
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    output = finish(workspace.train(workdir, variables=cache), code=EXIT_REFUSED)
    assert all(path in output for path in (missing, reshaped, "params/added")) and "Traceback" not in output
    assert newest(workdir) == step and not list(tmp_path.glob("compiled/**/jit_train*"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "abort"])
def test_step_that_is_not_finite_leaves_no_trace_in_the_state(workspace: Workspace, tmp_path: Path, policy: str):
    """The loss of step 2 is NaN: parameters and optimizer are those after step 1, and its rows are recorded."""
    options = ("--training.num-train-steps", "3", "--checkpoints.save-every-steps", "1", "--training.guard.policy")
    poisoned = {"module": "helpers.poisoned_train", "variables": {"POISONED_ROW": "8"}}
    process = workspace.train(tmp_path / "run", *options, policy, compile_anew=True, **poisoned)
    output = finish(process, code=EXIT_OK if policy == "skip" else EXIT_REFUSED)
    assert "step 2 had a loss, gradient or update that is not finite and was not applied (rows 8 to 15)" in output
    (rejected,) = records_of(tmp_path / "run" / "rejected_steps.jsonl")
    assert (rejected["step"], rejected["first_row"], rejected["last_row"]) == (2, 8, 15)
    if policy == "abort":
        assert newest(tmp_path / "run") == 1
        return
    before, after = (saved_state(tmp_path / "run", step) for step in (1, 2))
    assert {path for path in before if before[path].tobytes() != after[path].tobytes()} == {"step"}
    assert all(np.isfinite(leaf).all() for leaf in saved_state(tmp_path / "run", 3).values())


@pytest.mark.slow
def test_spike_of_the_loss_leaves_no_trace_in_the_state(workspace: Workspace, tmp_path: Path):
    """The loss of step 11 is ten thousand times what it would be: the guard rejects this step, and no other one."""
    workdir = tmp_path / "run"
    options = ("--training.num-train-steps", "16", "--checkpoints.save-every-steps", "1")
    guard = ("--training.guard.spike-threshold", "20", "--training.guard.spike-window", "8")
    kept = ("--checkpoints.max-to-keep", "10")
    poisoned = {"module": "helpers.poisoned_train", "variables": {"POISONED_ROW": "80", "POISON": "1e4"}}
    output = finish(workspace.train(workdir, *options, *guard, *kept, compile_anew=True, **poisoned))
    assert output.count("step 11 had a spike and was not applied (rows 80 to 87)") == 1 and "Traceback" not in output
    (rejected,) = records_of(workdir / "rejected_steps.jsonl")
    assert (rejected["step"], rejected["reason"], rejected["first_row"]) == (11, "a spike", 80)
    assert [line["step"] for line in logged(workdir) if line["skipped_steps"]] == [12]  # Of steps 10 to 12.
    before, after, later = (saved_state(workdir, step) for step in (10, 11, 12))
    assert {path for path in before if before[path].tobytes() != after[path].tobytes()} == {"step"}
    assert any(path.startswith("params/") and after[path].tobytes() != later[path].tobytes() for path in after)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="dropping the permission needs setpriv (util-linux)")
@pytest.mark.slow
def test_revoked_permission_ends_the_run_which_resumes_with_it(
    workspace: Workspace, tmp_path: Path, uninterrupted: Callable[[str], Path]
):
    """The permission to write checkpoints is revoked during a run; not even root may ignore this here."""
    workdir = tmp_path / "run"
    without = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    process = workspace.train(workdir, prefix=without)
    wait_for(workdir / "checkpoints" / "8", process)
    (workdir / "checkpoints").chmod(0o500)
    output = finish(process, code=EXIT_USAGE)
    assert "Permission denied" in output and "Traceback" not in output
    (workdir / "checkpoints").chmod(0o700)
    finish(workspace.train(workdir))
    assert_same_end(workdir, uninterrupted("recipe"))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in fault_plugin.SYSTEM_CALLS, reason="the system calls are not known")
def test_exceeded_quota_ends_the_run_which_resumes(
    workspace: Workspace, tmp_path: Path, uninterrupted: Callable[[str], Path]
):
    """The kernel refuses the writes of a save, as a file system does whose quota is exceeded."""
    workdir = tmp_path / "run"
    (workspace.directory / fault_plugin.FAULTS).write_text(json.dumps([[20, fault_plugin.QUOTA]]))
    output = finish(workspace.train(workdir, recipe="faulty"), code=EXIT_REFUSED)
    assert "Disk quota exceeded" in output[output.rindex("t5x-like: ") :] and "Traceback" not in output
    assert json.loads((workdir / "exit.json").read_text())["code"] == EXIT_REFUSED
    # The save of step 16 may have been in progress.
    assert newest(workdir) in (8, 16)
    finish(workspace.train(workdir, recipe="faulty"))
    assert_same_end(workdir, uninterrupted("recipe"))
