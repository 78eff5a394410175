"""Profiles contain the steps that were asked for, as jax's own reader finds them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from t5x_like.trainer import profiling
from t5x_like.trainer.profiling import REQUESTED_STEPS, StepProfiler, step_profiler


def take_steps(profiler: StepProfiler, first: int, last: int) -> None:
    step_fn = jax.jit(lambda x: x @ x)
    x = jnp.eye(8)
    for step in range(first, last):
        with profiler.step(step, x.block_until_ready):
            x = step_fn(x)


def profiled_steps(directory: Path) -> list[list[int]]:
    """Return the numbers of the steps in each profile of the directory."""
    steps = []
    for file in sorted(directory.glob("plugins/profile/*/*.xplane.pb")):
        data = jax.profiler.ProfileData.from_file(str(file))
        events = [event for plane in data.planes for line in plane.lines for event in line.events]
        steps.append(sorted(dict(event.stats)["step_num"] for event in events if event.name == "train"))
    return steps


def test_configured_steps_are_profiled(tmp_path: Path) -> None:
    with step_profiler(tmp_path, (3, 6)) as profiler:
        take_steps(profiler, 0, 8)
    assert profiled_steps(tmp_path / "tensorboard") == [[3, 4, 5]]


def test_run_that_ends_early_keeps_its_profile(tmp_path: Path) -> None:
    """A run that resumes within the steps profiles the rest of them."""
    with step_profiler(tmp_path, (3, 100)) as profiler:
        take_steps(profiler, 5, 7)
    assert profiled_steps(tmp_path / "tensorboard") == [[5, 6]]


def test_signal_and_file_request_profiles_of_the_next_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_POLL_SECONDS", -1.0)
    (tmp_path / "profile").touch()  # Left by an earlier request.
    with step_profiler(tmp_path, None) as profiler:
        take_steps(profiler, 0, 2)
        assert not (tmp_path / "tensorboard").exists()
        os.kill(os.getpid(), signal.SIGUSR1)
        take_steps(profiler, 2, 10)
    assert profiled_steps(tmp_path / "tensorboard") == [list(range(2, 2 + REQUESTED_STEPS))]
    of_process_1 = StepProfiler(tmp_path, None, process=1)
    os.utime(tmp_path / "profile", (1, 1))
    take_steps(of_process_1, 10, 20)
    assert profiled_steps(tmp_path / "tensorboard" / "process.1") == [list(range(10, 10 + REQUESTED_STEPS))]


@pytest.mark.external
def test_xprof_opens_a_profile_of_five_steps(tmp_path: Path) -> None:
    convert = pytest.importorskip("xprof.convert.raw_to_tool_data")
    with step_profiler(tmp_path, (3, 8)) as profiler:
        take_steps(profiler, 0, 10)
    files = [str(path) for path in tmp_path.glob("tensorboard/plugins/profile/*/*.xplane.pb")]
    trace, _ = convert.xspace_to_tool_data(files, "trace_viewer", {})
    names = [event.get("name") for event in json.loads(trace)["traceEvents"]]
    assert [name for name in names if str(name).startswith("train")] == [f"train {step}" for step in range(3, 8)]
    overview, _ = convert.xspace_to_tool_data(files, "overview_page", {})
    assert json.loads(overview)
