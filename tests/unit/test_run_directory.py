"""A run directory belongs to one process and one configuration."""

import dataclasses
import errno
import functools
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_like import run_directory
from t5x_like.config.recipes import load_recipe
from t5x_like.config.run import RunConfig
from t5x_like.config.serialization import to_dict
from t5x_like.config.training import ScheduleConfig
from t5x_like.errors import ConfigError, SafetyError
from t5x_like.run_directory import RUN_ID, RunRecord, claim_identity
from t5x_like.trainer.train import _describe_rate_change


@pytest.fixture
def run() -> RunConfig:
    return load_recipe("configs/runs/smoke.py")


def test_config_is_written_and_read_back(tmp_path: Path, run: RunConfig) -> None:
    run_directory.claim_config(RunRecord(tmp_path), run)
    assert run_directory.read_config(tmp_path) == run


def test_another_configuration_is_refused_with_each_difference(tmp_path: Path, run: RunConfig) -> None:
    run_directory.claim_config(RunRecord(tmp_path), run)
    (tmp_path / run_directory.METRICS).write_text('{"step": 1}\n')
    data = dataclasses.replace(run.data, seed=7, inputs_length=96)
    with pytest.raises(SafetyError) as refusal:
        run_directory.claim_config(RunRecord(tmp_path), dataclasses.replace(run, data=data))
    message = str(refusal.value)
    assert "data.seed: 0 in the run, 7 now" in message
    assert "data.inputs_length: 128 in the run, 96 now" in message
    assert refusal.value.exit_code == 3
    assert run_directory.read_config(tmp_path) == run


def test_fields_that_do_not_affect_the_result_may_change(tmp_path: Path, run: RunConfig) -> None:
    run_directory.claim_config(RunRecord(tmp_path), run)
    changed = dataclasses.replace(
        run,
        monitoring=dataclasses.replace(run.monitoring, log_every_steps=3),
        sharding=dataclasses.replace(run.sharding, tensor=2),
    )
    run_directory.claim_config(RunRecord(tmp_path), changed)
    assert run_directory.read_config(tmp_path) == changed


def test_a_training_field_may_differ_where_it_is_named(tmp_path: Path, run: RunConfig) -> None:
    run_directory.claim_config(RunRecord(tmp_path), run)
    (tmp_path / run_directory.METRICS).write_text('{"step": 1}\n')
    larger = dataclasses.replace(run, training=dataclasses.replace(run.training, global_batch_size=16))
    other = dataclasses.replace(larger, data=dataclasses.replace(run.data, seed=7))
    for refused, allowed in (
        (larger, ()),
        (larger, ("training.schedule",)),
        (other, ("training.global_batch_size", "data.seed")),
    ):
        with pytest.raises(SafetyError, match="training.global_batch_size: 8 in the run|data.seed"):
            run_directory.claim_config(RunRecord(tmp_path), refused, allowed)
    run_directory.claim_config(RunRecord(tmp_path), larger, ("training.global_batch_size",))
    assert run_directory.read_config(tmp_path) == larger


def test_longer_decay_is_refused_with_the_jump_of_the_learning_rate(tmp_path: Path, run: RunConfig) -> None:
    schedule = ScheduleConfig(kind="cosine", learning_rate=0.01, warmup_steps=0, final_fraction=0.1)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, num_train_steps=100, schedule=schedule))
    run_directory.claim_config(RunRecord(tmp_path), run)
    (tmp_path / run_directory.METRICS).write_text('{"step": 1}\n')
    (tmp_path / run_directory.CHECKPOINTS / "100").mkdir(parents=True)
    describe = functools.partial(_describe_rate_change, tmp_path)
    longer = dataclasses.replace(run, training=dataclasses.replace(run.training, num_train_steps=200))
    with pytest.raises(
        SafetyError, match="at step 100 goes from 0.001 to 0.0055; --training.schedule.decay-steps 100 "
    ):
        run_directory.claim_config(RunRecord(tmp_path), longer, (), None, describe)
    schedule = dataclasses.replace(schedule, decay_steps=100)
    kept = dataclasses.replace(longer, training=dataclasses.replace(longer.training, schedule=schedule))
    assert run_directory.claim_config(RunRecord(tmp_path), kept, (), None, describe) == kept


@pytest.mark.parametrize(
    ("kind", "decay_steps", "allowed"), [("rsqrt", None, True), ("cosine", None, False), ("cosine", 50, True)]
)
def test_a_run_gets_longer_only_under_a_schedule_that_does_not_end_with_it(
    tmp_path: Path, run: RunConfig, kind: str, decay_steps: int | None, allowed: bool
) -> None:
    schedule = dataclasses.replace(run.training.schedule, kind=kind, decay_steps=decay_steps)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, schedule=schedule))
    run_directory.claim_config(RunRecord(tmp_path), run)
    (tmp_path / run_directory.METRICS).write_text('{"step": 1}\n')
    longer = dataclasses.replace(run, training=dataclasses.replace(run.training, num_train_steps=9999))
    if allowed:
        run_directory.claim_config(RunRecord(tmp_path), longer)
    else:
        with pytest.raises(SafetyError, match="num_train_steps"):
            run_directory.claim_config(RunRecord(tmp_path), longer)


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        run_directory.read_config(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no such file"):
        run_directory.read_config(tmp_path)


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from t5x_like.run_directory import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    record = run_directory.claim_identity(tmp_path, None)
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    named = f"pid {holder.pid} on {socket.gethostname()}, run {record.run_id}"
    with pytest.raises(SafetyError, match=re.escape(named)), run_directory.locked(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with run_directory.locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(SafetyError, match=r"lock: found a file system that cannot lock files \(Function not impl"):
        with run_directory.locked(tmp_path):
            pass


def test_configuration_may_change_until_the_first_checkpoint(tmp_path: Path, run: RunConfig) -> None:
    run_directory.claim_config(RunRecord(tmp_path), run)
    (tmp_path / run_directory.CHECKPOINTS).mkdir()
    mended = dataclasses.replace(run, training=dataclasses.replace(run.training, global_batch_size=24))
    run_directory.claim_config(RunRecord(tmp_path), mended)
    assert run_directory.read_config(tmp_path) == mended
    newest = {"config": to_dict(mended)}
    with pytest.raises(SafetyError, match="global_batch_size: 24 in the run, 8 now"):
        run_directory.claim_config(RunRecord(tmp_path), run, newest=newest)


def test_lost_config_is_compared_with_that_of_the_newest_checkpoint(tmp_path: Path, run: RunConfig) -> None:
    other = dataclasses.replace(run, data=dataclasses.replace(run.data, seed=7))
    with pytest.raises(SafetyError, match=r"data\.seed: 7 in the run, 0 now"):
        run_directory.claim_config(RunRecord(tmp_path), run, newest={"config": to_dict(other)})
    assert not (tmp_path / run_directory.CONFIG).exists()


def test_a_run_keeps_its_id_without_run_json(tmp_path: Path) -> None:
    """The id is found again in the newest checkpoint, and without one in the folder of the checkpoints."""
    first = claim_identity(tmp_path, None)
    assert claim_identity(tmp_path, None) == first
    (tmp_path / run_directory.RECORD).write_text('{"run_id": dam')
    assert claim_identity(tmp_path, None) == first
    (tmp_path / run_directory.RECORD).unlink()
    assert claim_identity(tmp_path, {RUN_ID: "of_the_checkpoint"}).run_id == "of_the_checkpoint"


@pytest.mark.parametrize("lost", ["saved checkpoints", "folder before the first checkpoint", "folder and run.json"])
def test_run_with_lost_records_starts_over_only_if_allowed(tmp_path: Path, lost: str) -> None:
    record = claim_identity(tmp_path, None)
    (tmp_path / run_directory.METRICS).write_text('{"step": 1}\n')
    if lost == "saved checkpoints":
        record.completed(8)
    else:
        (tmp_path / run_directory.CHECKPOINTS / RUN_ID).unlink()
    if lost == "folder and run.json":
        (tmp_path / run_directory.RECORD).unlink()
    with pytest.raises(SafetyError, match="has no checkpoint, but .*--allow-start-over"):
        claim_identity(tmp_path, None)
    started: list[RunRecord] = []
    new = claim_identity(tmp_path, None, started.append)
    assert started == [new] and new.run_id != record.run_id and new.saved_step is None
    assert claim_identity(tmp_path, None) == new, "the permission is needed for one start only"


@pytest.mark.parametrize("gone", [run_directory.RECORD, f"{run_directory.CHECKPOINTS}/{RUN_ID}"])
def test_a_directory_that_was_replaced_is_noticed(tmp_path: Path, gone: str) -> None:
    record = claim_identity(tmp_path, None)
    record.require_present()
    (tmp_path / gone).unlink()
    with pytest.raises(SafetyError, match=rf"found no run id, expected the directory of run {record.run_id}"):
        record.require_present()


def test_a_checkpoint_of_another_run_or_configuration_is_refused(tmp_path: Path, run: RunConfig) -> None:
    record = RunRecord(tmp_path)
    record.require_own(run, tmp_path, {RUN_ID: record.run_id, "config": to_dict(run)})
    with pytest.raises(SafetyError, match="checkpoint of run other, expected one of run"):
        record.require_own(run, tmp_path, {RUN_ID: "other", "config": to_dict(run)})
    with pytest.raises(SafetyError, match="checkpoint of no run id"):
        record.require_own(run, tmp_path, {"config": to_dict(run)})
    larger = dataclasses.replace(run, training=dataclasses.replace(run.training, global_batch_size=16))
    with pytest.raises(SafetyError, match="global_batch_size: 8 in the run, 16 now"):
        record.require_own(larger, tmp_path, {RUN_ID: record.run_id, "config": to_dict(run)})
    run_directory.claim_config(record, larger, ["training.global_batch_size"], {"config": to_dict(run)})
    again = claim_identity(tmp_path, {RUN_ID: record.run_id})
    again.require_own(larger, tmp_path, {RUN_ID: record.run_id, "config": to_dict(run)})


@pytest.mark.parametrize("kind", ["run is a file", "config is a folder", "config is no text"])
def test_invalid_run_directory_is_refused(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "run"
    if kind == "run is a file":
        directory.write_text("in the way")
    elif kind == "config is a folder":
        (directory / run_directory.CONFIG).mkdir(parents=True)
    else:
        directory.mkdir()
        (directory / run_directory.CONFIG).write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match=r"run/config\.json: found .*expected"):
        run_directory.read_config(directory)
