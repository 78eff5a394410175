"""Interface of the checkpoints of a run, in a local directory or in a bucket."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any

from t5x_like.faults import STORAGE_FAILED, FaultError
from t5x_like.utils.stall_limit import stall_seconds

FORMAT = 1
"""Version of the layout of checkpoints and of their metadata."""

Require = Callable[[Path, Mapping[str, Any]], None]
"""Raises SafetyError if the checkpoint at a path, with its meta, is not the run's own."""
Kept = Callable[[Sequence[int]], Collection[int]]
"""Returns which of the saved steps are kept although newer ones exist."""


class Checkpoints(ABC):
    """Checkpoints of one run. All processes call the methods in the same order, each from one thread.

    Attributes:
      directory: Directory of the checkpoints.
      protected: Step of a checkpoint that is kept although newer ones exist.
      save_seconds: Seconds from the beginning of the last save to its commit, or those of an earlier process; None if
        unknown.
    """

    directory: Path
    protected: int | None
    save_seconds: float | None = None

    @abstractmethod
    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None. Only `restore` checks that it is intact."""
        return max(self.steps(), default=None)

    @abstractmethod
    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        meta: Mapping[str, Any],
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> bool:
        """Start to save; return when the arrays may be donated. Writing continues in the background.

        Args:
          step: Number of completed training steps.
          state: Nested containers of `jax.Array`s, with the parameters under "params".
          meta: JSON values that belong to the state.
          files: Content of files that belong to the state, by name. Each process passes its own files; names must be
            unique over all processes.

        Returns:
          False if this step is already saved, and nothing was done.

        Raises:
          UserError: this save, or the previous one that was still being written, could not be written, because the
            disk is full or was unmounted for example. Earlier checkpoints are intact.
        """

    @abstractmethod
    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
          UserError: it could not be written; see `save`.
        """

    @abstractmethod
    def close(self, *, abandon: bool = False) -> None:
        """Wait for the last save and stop the background thread.

        Args:
          abandon: Do not wait, because a process is about to exit and the others must not wait for it.
        """

    @abstractmethod
    def restore(
        self,
        abstract_state: Mapping[str, Any],
        step: int | None = None,
        *,
        require: Require = lambda path, meta: None,
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Read a checkpoint, all of which is verified.

        Args:
          abstract_state: Tree of `jax.ShapeDtypeStruct`s with shardings, which may differ from those of the saved
            arrays.
          step: Step of the checkpoint. None: the newest intact one; damaged ones are reported and renamed.
          require: Raises SafetyError if the checkpoint at a path, with its meta, is not the run's own.

        Returns:
          The step, the saved state and the saved meta.

        Raises:
          SafetyError: there is no checkpoint, none is intact, it holds another step than its name says, or the arrays
            differ from `abstract_state` in path, type or shape.
        """

    @abstractmethod
    def restore_params(
        self, abstract_params: Mapping[str, Any], step: int | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Restore the parameters only, as `restore` does; nothing else is read or verified.

        Parameters that the checkpoint holds in bfloat16 are converted if `abstract_params` has float32.
        """

    @abstractmethod
    def read_files(self, step: int) -> dict[str, bytes]:
        """Return the files of all processes in the checkpoint of `step` by name. `restore` verifies them."""

    @abstractmethod
    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """Return the meta of a checkpoint, by default of the newest one whose meta is intact.

        Raises:
          SafetyError: there is no such checkpoint.
        """

    @abstractmethod
    def digest(self, step: int) -> str:
        """Return a digest of the checkpoint's checksums.

        Raises:
          SafetyError: there is no such checkpoint, or it has no checksums.
        """

    @abstractmethod
    def find_damage(self, step: int) -> list[str]:
        """Read a whole checkpoint in this process, and return what is not as it was saved."""

    @abstractmethod
    def remove_after(self, step: int) -> None:
        """Remove the checkpoints after `step`, in process 0."""


def error_of_save(finish: Future[None], step: int) -> BaseException | None:
    """Wait for a save in the background and return its error: a FaultError if it takes longer than `stall_seconds()`,
    None without one."""
    try:
        return finish.exception(stall_seconds())
    except TimeoutError:
        return FaultError(
            f"the save of step {step} takes longer than {stall_seconds():g} s, expected less; the storage does not "
            "answer, or --stall-timeout is too short. Earlier checkpoints are intact",
            STORAGE_FAILED,
        )
