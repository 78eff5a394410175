"""Trainer callbacks and registered writers: order of the calls, and what a failing one does."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.config_examples import changed, example

from t5x_like.errors import ConfigError
from t5x_like.monitoring.writers import WRITERS, register_writer
from t5x_like.trainer.callbacks import Callback, Callbacks, register_callback


class Recording(Callback):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.calls: list[tuple[int, dict[str, float]]] = []

    def on_step_end(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append((step, dict(metrics)))


class Failing(Callback):
    def on_step_end(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ValueError("no such file")


def test_each_step_is_reported_once_with_the_metrics_of_its_interval(tmp_path: Path) -> None:
    recording = Recording(example(), tmp_path)
    callbacks = Callbacks([recording])
    callbacks.start(3)
    callbacks.step_end(3)
    callbacks.step_end(4)
    callbacks.step_end(6, {"loss": 2.0})
    callbacks.step_end(6)
    assert recording.calls == [(4, {}), (5, {}), (6, {"loss": 2.0})]


def test_a_failing_callback_is_logged_and_not_called_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recording = Recording(example(), tmp_path)
    callbacks = Callbacks([Failing(example(), tmp_path), recording])
    callbacks.start(0)
    with caplog.at_level(logging.ERROR):
        callbacks.step_end(1)
        callbacks.step_end(2)
    assert [step for step, _ in recording.calls] == [1, 2]
    assert [record.message for record in caplog.records] == [
        "the callback Failing failed; training continues without it"
    ]


def test_an_unknown_callback_is_refused_with_the_known_names(tmp_path: Path) -> None:
    register_callback("recording")(Recording)
    run = changed(example(), "monitoring.callbacks", ("recordin",))
    with pytest.raises(ConfigError, match=r"monitoring.callbacks.0: found the unknown callback .*perhaps 'recording'"):
        Callbacks.of_run(run, tmp_path)
    run = dataclasses.replace(run, monitoring=dataclasses.replace(run.monitoring, callbacks=("recording",)))
    Callbacks.of_run(run, tmp_path).start(0)


def test_only_callbacks_are_registered_as_callbacks() -> None:
    with pytest.raises(ConfigError, match="a subclass of"):
        register_callback("text")(str)  # type: ignore[type-var]


def test_a_registered_writer_has_its_name() -> None:
    @register_writer("writer_of_test")
    def make(run_dir: Path, restored_step: int | None) -> Any:
        return run_dir, restored_step

    assert WRITERS.lookup("writer_of_test", "monitoring.writers.0") is make
    with pytest.raises(ConfigError, match=r"monitoring.writers.1: found the unknown metric writer 'neptune'"):
        WRITERS.lookup("neptune", "monitoring.writers.1")
