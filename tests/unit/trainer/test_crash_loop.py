"""A run without progress is refused after some starts, and errors that nothing restarts do not count."""

from __future__ import annotations

from pathlib import Path

import pytest

from t5x_like.errors import DataError, SafetyError
from t5x_like.faults import DEVICE_FAILED, FaultError
from t5x_like.trainer.crash_loop import STARTS, counted_start


def start(run_dir: Path, step: int | None, error: BaseException | None = None, limit: int | None = 3) -> None:
    with counted_start(run_dir, step, limit):
        if error is not None:
            raise error


def test_starts_without_progress_are_limited(tmp_path: Path) -> None:
    fault = FaultError("a device failed", DEVICE_FAILED)
    for step in (None, 10):
        for _ in range(3):
            with pytest.raises(FaultError):
                start(tmp_path, step, fault)
    with pytest.raises(SafetyError, match="the last 3 starts ended before a checkpoint was saved after step 10"):
        start(tmp_path, 10)
    start(tmp_path, 10)  # The user has read the message and tries again.
    for _ in range(5):
        start(tmp_path, 10, limit=None)


@pytest.mark.parametrize("content", ["[]", "3", '{"step": null, "count": "x"}', '{"step": null}', "{"])
def test_another_content_of_the_record_counts_as_no_earlier_start(tmp_path: Path, content: str) -> None:
    (tmp_path / STARTS).write_text(content)
    start(tmp_path, None, limit=1)


def test_errors_after_which_nothing_restarts_do_not_count(tmp_path: Path) -> None:
    for error in (ValueError("a defect"), DataError("wrong input"), KeyboardInterrupt()):
        for _ in range(4):
            with pytest.raises(type(error)):
                start(tmp_path, 10, error)
    start(tmp_path, 10)


def test_damaged_record_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "starts.json").write_text("{")
    start(tmp_path, 1)
    assert (tmp_path / "starts.json").read_text() == '{"step": 1, "count": 1}\n'
