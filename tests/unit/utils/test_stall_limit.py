"""A wait for something that never comes ends with an error that names it, and a command that hangs with its stacks."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from helpers.config_examples import REPOSITORY
from helpers.data_examples import data_config, numbered_store

from t5x_like.checkpoints.interface import error_of_save
from t5x_like.config.corpus import CorpusConfig
from t5x_like.config.tokenizer import TokenizerConfig
from t5x_like.data.sources.validation_split import SplitRule
from t5x_like.data.sources.work_units import WorkUnit
from t5x_like.data.store import store_lock, worker_pool
from t5x_like.data.store.shards import ShardJob
from t5x_like.data.stream import prefetch
from t5x_like.data.stream.prefetch import Prefetcher
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.errors import EXIT_RESUMABLE, EXIT_USAGE, DataError, SafetyError, UserError
from t5x_like.faults import FaultError
from t5x_like.launching.executor import run_within
from t5x_like.storage import locations
from t5x_like.storage.locations import Url
from t5x_like.utils import stall_limit
from t5x_like.utils.file_lock import lock, lock_within


class NeverDone:
    """Request of TensorStore that is never answered."""

    def result(self, timeout: float) -> None:
        raise TimeoutError

    def cancel(self) -> bool:
        return True


class Answered:
    def result(self, timeout: float) -> bytes:
        return b"value"


@pytest.fixture(autouse=True)
def short_limit() -> Iterator[None]:
    stall_limit.set_stall_seconds(0.5)
    yield
    stall_limit.set_stall_seconds(stall_limit.STALL_SECONDS)


def test_a_file_system_that_does_not_answer_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(FaultError, match=r"the file system did not answer for 0\.5 s") as caught:
        locations.wait(tmp_path / "tokens", NeverDone())
    assert caught.value.exit_code == EXIT_RESUMABLE


def test_an_object_store_that_has_answered_before_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of a bucket that never answered may be wrong, and then no restart helps."""
    monkeypatch.setattr(locations, "_ANSWERED", set())
    with pytest.raises(DataError, match="check the URL") as first:
        locations.wait(Url("gs://bucket/a"), NeverDone())
    assert locations.wait(Url("gs://bucket/b"), Answered()) == b"value"
    with pytest.raises(FaultError, match="the object store did not answer for 120 s; a restart resumes") as later:
        locations.wait(Url("gs://bucket/a"), NeverDone())
    with pytest.raises(DataError, match="check the URL"):
        locations.wait(Url("gs://another/a"), NeverDone())
    assert (first.value.exit_code, later.value.exit_code) == (EXIT_USAGE, EXIT_RESUMABLE)


def job(folder: Path) -> ShardJob:
    return ShardJob(str(folder), CorpusConfig(), TokenizerConfig(kind="bytes"), "", SplitRule("none"), "uint16", "")


@pytest.mark.parametrize("asked", ["import sys; sys.stdin.read()", "import os, signal; os.kill(os.getpid(), 19)"])
def test_a_worker_process_without_progress_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr(worker_pool, "_WORKER_CODE", asked)
    todo = [(index, WorkUnit("texts", 1, texts=("a",))) for index in range(3)]
    with pytest.raises(FaultError, match=r"no progress for 0\.5 s.*--stall-timeout") as caught:
        worker_pool.make_shards(job(tmp_path), todo, 2, lambda *progress: None)
    assert caught.value.exit_code == EXIT_RESUMABLE


def test_a_process_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        with monkeypatch.context() as patch:
            patch.setattr(process, "kill", lambda: None)  # As if it waited in the kernel.
            assert not stall_limit.end_process(process, 0.1)
        assert stall_limit.end_process(process)


def test_another_process_that_prepares_a_store_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_lock, "_POLL_SECONDS", 0.05)
    path = tmp_path / "store"
    with open(tmp_path / "store.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        said: list[str] = []
        with (
            pytest.raises(SafetyError, match=r"has written nothing for 0\.5 s"),
            store_lock.store_lock(path, said.append),
        ):
            pass
        assert "waiting" in said[0]
    with store_lock.store_lock(path, said.append):
        assert len(said) == 1


def test_a_store_that_is_finished_while_its_files_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process renames the folder, which then is no longer there."""
    for name in ("a", "b"):
        (tmp_path / "store.partial" / name).mkdir(parents=True)
        (tmp_path / "store.partial" / name / "tokens").touch()
    assert store_lock.last_change(tmp_path / "store.partial") > 0

    def finish(path: str) -> os.stat_result:
        monkeypatch.undo()
        shutil.move(tmp_path / "store.partial", tmp_path / "store")
        return os.stat(path)

    monkeypatch.setattr(store_lock.os, "stat", finish)
    assert store_lock.last_change(tmp_path / "store.partial") == 0
    assert (tmp_path / "store").is_dir()


def test_a_lock_that_is_held_for_too_long(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as held, open(tmp_path / "lock", "w") as wanted:
        assert lock(held) and not lock(wanted)
        with pytest.raises(SafetyError, match="holds the lock for more than 0.2 s"):
            lock_within(wanted, 0.2)
        fcntl.flock(held, fcntl.LOCK_UN)
        lock_within(wanted, 0.2)
        assert not lock(held)


def test_a_save_that_does_not_end_is_a_fault() -> None:
    finish: Future[None] = Future()
    error = error_of_save(finish, 8)
    assert isinstance(error, FaultError) and error.exit_code == EXIT_RESUMABLE and "step 8" in str(error)
    finish.set_exception(TimeoutError("of the save itself"))
    assert isinstance(error_of_save(finish, 8), TimeoutError)


def test_a_batch_that_does_not_come_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that reads cannot be ended, and is not waited for."""
    monkeypatch.setattr(prefetch, "CLEANUP_SECONDS", 0.2)
    stream = TrainingStream([numbered_store(tmp_path / "s", 3000)], data_config(), 6)
    answer = threading.Event()
    monkeypatch.setattr(stream, "batches_at", lambda *location: answer.wait(600))
    try:
        with pytest.raises(FaultError, match=r"no batch within 0\.5 s"), Prefetcher(stream, 0) as batches:
            next(batches)
    finally:
        answer.set()


def test_a_command_of_a_launcher_that_does_not_end() -> None:
    with pytest.raises(UserError, match=r"sleep 600: found a command that runs for more than 0\.2 s"):
        run_within(("sleep", "600"), 0.2)
    assert run_within(("echo", "READY"), 60.0, stdout=subprocess.PIPE).stdout == "READY\n"


@pytest.mark.parametrize("name, counts", [("work", True), *((name, False) for name in stall_limit._REGULAR_THREADS)])
def test_renewals_at_regular_intervals_are_no_progress(name: str, counts: bool) -> None:
    before = stall_limit._last
    thread = threading.Thread(target=stall_limit.progress, name=name)
    thread.start()
    thread.join(60)
    assert (stall_limit._last > before) == counts


def test_a_command_that_hangs_ends_with_its_stacks(tmp_path: Path) -> None:
    """Nobody writes to the pipe, as if its file system did not answer."""
    os.mkfifo(tmp_path / "predictions.jsonl")
    command = [sys.executable, "-m", "t5x_like", "eval", "--predictions", "predictions.jsonl", "--metrics", "squad"]
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [*command, "--stall-timeout", "4"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == EXIT_RESUMABLE, result.stderr
    assert "no progress for 4 s" in result.stderr and "cli/main.py" in result.stderr
