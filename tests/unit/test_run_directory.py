"""A run directory belongs to one process and one configuration."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_like import run_directory
from t5x_like.config import ConfigError, RefusedError
from t5x_like.config.recipes import load_recipe
from t5x_like.config.run import RunConfig


@pytest.fixture
def run() -> RunConfig:
    return load_recipe("configs/runs/smoke.py")


def test_config_is_written_and_read_back(tmp_path: Path, run: RunConfig) -> None:
    run_directory.claim_config(tmp_path, run)
    assert run_directory.read_config(tmp_path) == run


def test_another_configuration_is_refused_with_each_difference(tmp_path: Path, run: RunConfig) -> None:
    run_directory.claim_config(tmp_path, run)
    (tmp_path / run_directory.METRICS).write_text('{"step": 1}\n')
    data = dataclasses.replace(run.data, seed=7, inputs_length=96)
    with pytest.raises(RefusedError) as refusal:
        run_directory.claim_config(tmp_path, dataclasses.replace(run, data=data))
    message = str(refusal.value)
    assert "data.seed: 0 in the run, 7 now" in message
    assert "data.inputs_length: 128 in the run, 96 now" in message
    assert refusal.value.exit_code == 3
    assert run_directory.read_config(tmp_path) == run


def test_what_does_not_decide_the_result_may_change(tmp_path: Path, run: RunConfig) -> None:
    run_directory.claim_config(tmp_path, run)
    changed = dataclasses.replace(
        run,
        monitoring=dataclasses.replace(run.monitoring, log_every_steps=3),
        partitioning=dataclasses.replace(run.partitioning, tensor=2),
    )
    run_directory.claim_config(tmp_path, changed)
    assert run_directory.read_config(tmp_path) == changed


def test_a_training_field_may_differ_where_it_is_named(tmp_path: Path, run: RunConfig) -> None:
    run_directory.claim_config(tmp_path, run)
    (tmp_path / run_directory.METRICS).write_text('{"step": 1}\n')
    larger = dataclasses.replace(run, training=dataclasses.replace(run.training, batch_size=16))
    other = dataclasses.replace(larger, data=dataclasses.replace(run.data, seed=7))
    for refused, allowed in (
        (larger, ()),
        (larger, ("training.schedule",)),
        (other, ("training.batch_size", "data.seed")),
    ):
        with pytest.raises(RefusedError, match="training.batch_size: 8 in the run|data.seed"):
            run_directory.claim_config(tmp_path, refused, allowed)
    run_directory.claim_config(tmp_path, larger, ("training.batch_size",))
    assert run_directory.read_config(tmp_path) == larger


@pytest.mark.parametrize(
    ("kind", "decay_steps", "allowed"), [("rsqrt", None, True), ("cosine", None, False), ("cosine", 50, True)]
)
def test_a_run_gets_longer_only_under_a_schedule_that_does_not_end_with_it(
    tmp_path: Path, run: RunConfig, kind: str, decay_steps: int | None, allowed: bool
) -> None:
    schedule = dataclasses.replace(run.training.schedule, kind=kind, decay_steps=decay_steps)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, schedule=schedule))
    run_directory.claim_config(tmp_path, run)
    (tmp_path / run_directory.METRICS).write_text('{"step": 1}\n')
    longer = dataclasses.replace(run, training=dataclasses.replace(run.training, num_train_steps=9999))
    if allowed:
        run_directory.claim_config(tmp_path, longer)
    else:
        with pytest.raises(RefusedError, match="num_train_steps"):
            run_directory.claim_config(tmp_path, longer)


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
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(RefusedError, match=f"pid {holder.pid}"), run_directory.locked(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with run_directory.locked(tmp_path):
        pass


def test_a_run_that_was_refused_before_its_first_step_holds_nothing_back(tmp_path: Path, run: RunConfig) -> None:
    run_directory.claim_config(tmp_path, run)
    (tmp_path / run_directory.CHECKPOINTS).mkdir()
    mended = dataclasses.replace(run, training=dataclasses.replace(run.training, batch_size=24))
    run_directory.claim_config(tmp_path, mended)
    assert run_directory.read_config(tmp_path) == mended
    (tmp_path / run_directory.CHECKPOINTS / "8").mkdir()
    with pytest.raises(RefusedError, match="batch_size: 24 in the run, 8 now"):
        run_directory.claim_config(tmp_path, run)


@pytest.mark.parametrize("kind", ["run is a file", "config is a folder", "config is no text"])
def test_what_is_no_run_directory_is_refused(tmp_path: Path, kind: str) -> None:
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
