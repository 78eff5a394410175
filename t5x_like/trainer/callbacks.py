"""Trainer callbacks: a user's own code at fixed points of a run, on the host, never inside the compiled step.

A callback is a class registered by name; `monitoring.callbacks` names the ones that a run uses. They are called in the
first process only, which also writes metrics and reports. This module is light, so that a plug-in can import it before
jax is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from t5x_like.config import RunConfig
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.utils.name_registry import Registry

_LOG = logging.getLogger(__name__)


class Callback:
    """Base class of callbacks; override the methods that are needed.

    The device is ahead of the host, and no method is given device arrays: calling a callback never waits for a step.

    Attributes:
      run: Configuration of the run.
      workdir: Run directory.
    """

    def __init__(self, run: RunConfig, workdir: Path) -> None:
        self.run = run
        self.workdir = workdir

    def on_start(self, step: int) -> None:
        """Run before the first step of this process; `step` is the number of steps taken before it."""

    def on_step_end(self, step: int, metrics: Mapping[str, float]) -> None:
        """Run once for each step, in order, after later work has been dispatched.

        Args:
          step: Number of steps taken.
          metrics: At the end of a logging interval, its means as in metrics.jsonl; otherwise empty.
        """

    def on_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Run after an evaluation during training; `scores` are the numbers of evaluations.jsonl by name."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Run when a checkpoint is complete on the disk, which is after later steps have begun."""

    def on_end(self, step: int) -> None:
        """Run when this process stops training, for whatever reason, with the number of steps dispatched."""


CALLBACKS: Registry[type[Callback]] = Registry("callback")

C = TypeVar("C", bound=type[Callback])


def register_callback(name: str) -> Callable[[C], C]:
    """Return a class decorator that registers a callback.

    Raises (the decorator):
      ConfigError: the class does not derive from `Callback`, or the name is taken.
    """

    def register(cls: C) -> C:
        if not (isinstance(cls, type) and issubclass(cls, Callback)):
            expected = "a subclass of t5x_like.trainer.callbacks.Callback"
            raise ConfigError([ConfigProblem(f"callback {name!r}", repr(cls), expected)])
        CALLBACKS.register(name, cls)
        return cls

    return register


class Callbacks:
    """The callbacks of a run. One that raises an exception is reported and not called again: training continues."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = list(callbacks)
        self._step: int | None = None

    @staticmethod
    def of_run(run: RunConfig, workdir: Path) -> Callbacks:
        """Return the callbacks that a run names.

        Raises:
          ConfigError: a name that is not registered.
        """
        classes = [
            CALLBACKS.lookup(name, f"monitoring.callbacks.{index}")
            for index, name in enumerate(run.monitoring.callbacks)
        ]
        return Callbacks([cls(run, workdir) for cls in classes])

    def start(self, step: int) -> None:
        self._step = step
        self._call(lambda callback: callback.on_start(step))

    def step_end(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Report all steps up to `step` that have not been reported; the metrics belong to the last of them."""
        assert self._step is not None
        for ended in range(self._step + 1, step + 1):
            values = metrics if metrics is not None and ended == step else {}
            self._call(lambda callback, ended=ended, values=values: callback.on_step_end(ended, values))  # type: ignore[misc]
        self._step = max(step, self._step)

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        self._call(lambda callback: callback.on_evaluation(step, scores))

    def checkpoint(self, step: int, path: Path) -> None:
        self._call(lambda callback: callback.on_checkpoint(step, path))

    def end(self, step: int) -> None:
        self._call(lambda callback: callback.on_end(step))

    def _call(self, method: Callable[[Callback], None]) -> None:
        for callback in tuple(self._callbacks):
            try:
                method(callback)
            except Exception:
                self._callbacks.remove(callback)
                _LOG.exception("the callback %s failed; training continues without it", type(callback).__qualname__)
