"""Saving and restoring the state of a run. The only module that knows Orbax; no type of it leaves this file.

A checkpoint is a directory named by its step:

    <step>/params/      the parameters, an Orbax tree of arrays (OCDBT, zarr3)
    <step>/training/    everything else of the state: optimizer, step, random key
    <step>/files/       what belongs to the state and is no array, such as the position of a host's data pipeline
    <step>/meta.json    path, type and shape of every array; what the trainer wants to remember
    <step>/SHA256SUMS   checksums of all files above

It is written under the name `<step>.saving`: Orbax commits the arrays, then the files (which wait beside it, under
`<step>.saving.files`) and the checksums are added, then the directory is renamed. So a step that is listed is complete,
and one without checksums has been damaged later. A save that was killed leaves `<step>.saving*`, and a removal that was
killed `<step>.deleting`; the next run removes them. A checkpoint that fails its checksums is renamed to
`<step>.damaged` and restoring goes on with the one before.
The directory is on a local or mounted file system, shared by all processes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5x_like.checkpoints import integrity, trees
from t5x_like.checkpoints.space import state_bytes
from t5x_like.config.errors import RefusedError
from t5x_like.config.run import CheckpointConfig
from t5x_like.partitioning.agreement import by_first

FORMAT = 1
"""Version of the directory's layout and of meta.json."""

_META = "meta.json"
_PARAMS = "params"
_TRAINING = "training"
_FILES = "files"
_LEFTOVER = re.compile(r"\d+\.(saving|deleting)(\..*)?")

_logger = logging.getLogger(__name__)


def _import_orbax() -> Any:
    """Orbax without what it does to the process's logging.

    It logs while it is imported, at which absl gives the root logger a handler. And it logs the traceback of an error
    in each of its threads before it raises it; we say what happened, once.
    """
    handlers = list(logging.root.handlers)
    from orbax.checkpoint import v1  # type: ignore[import-untyped]

    logging.root.handlers[:] = handlers
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    return v1


ocp = _import_orbax()


class CheckpointManager:
    """The checkpoints of one run. All processes call its methods, in the same order, each from one thread."""

    def __init__(self, directory: Path | str, config: CheckpointConfig, *, read_only: bool = False):
        """
        Args:
          directory: Where the checkpoints are; made if it is missing.
          config: Which checkpoints stay.
          read_only: For those who look at another run's checkpoints: nothing in the directory is touched.
        """
        self.directory = Path(directory).absolute()
        self._config = config
        self._read_only = read_only
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        if not read_only and jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def latest(self) -> int | None:
        """The newest complete checkpoint's step. Whether it is intact, `restore` finds out."""
        return max(self.steps(), default=None)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        meta: Mapping[str, Any],
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> bool:
        """Begins to save; returns when the arrays are safe from donation, while the writing goes on in the background.

        Args:
          step: The step that the state has reached.
          state: Nested containers of arrays, with the parameters under "params".
          meta: JSON values that belong to the state.
          files: Name -> content of files that belong to it. Each process gives its own, under names that no other has.

        Returns:
          False if this step is there already: nothing was done.

        Raises:
          RefusedError: this save, or the one before which was still being written, did not fit the disk or could not
            be written. Earlier checkpoints are untouched.
        """
        self.wait()
        if by_first(self._path(step).exists):
            return False
        leaves = trees.by_path(state)
        record = {"format": FORMAT, "step": step, "state": trees.describe(leaves), "meta": meta}
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        try:
            # Before the arrays: that all processes have written theirs is what Orbax commits.
            _write_files(self._path(step, f"saving.{_FILES}"), files)
            with _context():
                response = ocp.save_checkpointables_async(self._path(step, "saving"), _by_item(leaves))
        except Exception as error:
            raise self._failed(step, error, state_bytes(state)) from error
        finish = self._executor.submit(self._finish, step, response.result, text, state_bytes(state))
        self._pending = (step, finish)
        return True

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
          RefusedError: it could not be written; see `save`.
        """
        if self._pending is None:
            return
        (step, finish), self._pending = self._pending, None
        error = finish.exception()
        failed = error is not None
        if jax.process_count() > 1:
            failed = bool(np.any(multihost_utils.process_allgather(np.asarray(failed))))
        if error is not None:
            raise error
        if failed:
            raise RefusedError(f"the checkpoint of step {step} was not written: another process failed and says why")

    def close(self, *, abandon: bool = False) -> None:
        """Waits for the last save and ends the background thread.

        Args:
          abandon: Waits for nothing, because a process is about to end that the others are not to wait for.
        """
        if abandon:
            self._executor.shutdown(wait=False, cancel_futures=True)
            return
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            if not self._read_only and jax.process_index() == 0:
                # A write that was under way when its save failed may have brought its directory back.
                self._remove_leftovers()

    def restore(
        self, abstract_state: Mapping[str, Any], step: int | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Reads a checkpoint, after all its checksums have been verified.

        Args:
          abstract_state: `jax.ShapeDtypeStruct`s with shardings; those of the saved arrays do not matter.
          step: Which checkpoint. None takes the newest that is intact; those passed over are reported and renamed.

        Returns:
          The step, the state and the meta that were saved.

        Raises:
          RefusedError: there is no checkpoint, none is intact, or the arrays are not exactly those of
            `abstract_state`, by path, type and shape.
        """
        step = self._choose(step, expected=trees.describe(trees.by_path(abstract_state)), needed=lambda name: True)
        return step, self._load(step, abstract_state), self._record(step)["meta"]

    def restore_params(
        self, abstract_params: Mapping[str, Any], step: int | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Like `restore`, for the parameters alone: nothing else is read or verified."""
        abstract = {_PARAMS: abstract_params}
        step = self._choose(
            step,
            expected=trees.describe(trees.by_path(abstract)),
            needed=lambda name: not name.startswith((f"{_TRAINING}/", f"{_FILES}/")),
            below=f"{_PARAMS}/",
        )
        return step, self._load(step, abstract)[_PARAMS], self._record(step)["meta"]

    def read_files(self, step: int) -> dict[str, bytes]:
        """The files of all processes in the checkpoint of `step`, by name. `restore` has verified them."""
        folder = self._path(step) / _FILES
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.is_dir() else {}

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """The meta of a checkpoint, by default of the newest one whose meta is intact.

        Raises:
          RefusedError: there is none.
        """
        self.wait()
        problems: dict[int, list[str]] = {}
        for candidate in [step] if step is not None else reversed(self.steps()):
            problems[candidate] = integrity.check(self._path(candidate), _is_meta)
            if not problems[candidate]:
                return self._record(candidate)["meta"]
        raise RefusedError(self._none_left(problems))

    def _finish(self, step: int, committed: Callable[[], None], record: str, size: int) -> None:
        """What is left to do once the arrays are on their way; runs in the background."""
        try:
            committed()
            if jax.process_index() == 0:
                saving = self._path(step, "saving")
                files = self._path(step, f"saving.{_FILES}")
                if files.is_dir():
                    files.rename(saving / _FILES)
                (saving / _META).write_text(record, encoding="utf-8")
                integrity.seal(saving)
                saving.rename(self._path(step))
                integrity.sync_directory(self.directory)
        except Exception as error:
            raise self._failed(step, error, size) from error
        if jax.process_index() == 0:
            self._remove_old()

    def _failed(self, step: int, error: Exception, size: int) -> Exception:
        """Removes the remains of a failed save and says what is the case, if the disk is the reason."""
        if jax.process_index() == 0:
            self._remove_leftovers()
        reason = _disk_reason(error)
        if reason is None:
            return error
        free = shutil.disk_usage(self.directory).free
        return RefusedError(
            f"the checkpoint of step {step} was not written to {self.directory}: {reason}. A checkpoint needs about "
            f"{size:,} bytes, {free:,} are free now that its remains are removed. Steps that were saved "
            f"before and are untouched: {self.steps() or 'none'}. Free some space and run the same command again."
        )

    def _choose(
        self, step: int | None, *, expected: dict[str, str], needed: Callable[[str], bool], below: str = ""
    ) -> int:
        """The checkpoint to restore; one decision for all processes."""
        self.wait()

        def choose() -> int:
            if step is not None and not self._path(step).is_dir():
                raise RefusedError(
                    f"there is no checkpoint of step {step} in {self.directory}; steps that are there: "
                    f"{', '.join(map(str, self.steps())) or 'none'}"
                )
            problems: dict[int, list[str]] = {}
            for candidate in [step] if step is not None else reversed(self.steps()):
                path = self._path(candidate)
                problems[candidate] = integrity.check(path, _is_meta)
                if not problems[candidate]:
                    saved = {p: text for p, text in self._record(candidate)["state"].items() if p.startswith(below)}
                    trees.require_same(saved, expected, f"the checkpoint {path}")
                    problems[candidate] = integrity.check(path, needed)
                if not problems[candidate]:
                    del problems[candidate]
                    self._pass_over(problems, candidate)
                    return candidate
            raise RefusedError(self._none_left(problems))

        return by_first(choose)

    def _load(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        leaves = trees.by_path(abstract)
        with _context():
            loaded = trees.by_path(ocp.load_checkpointables(self._path(step), _by_item(leaves)))
        # Items are a matter of the files, not of the caller's tree.
        by_path = {path.removeprefix(f"{_TRAINING}/"): leaf for path, leaf in loaded.items()}
        return jax.tree.unflatten(jax.tree.structure(abstract), [by_path[path] for path in leaves])

    def _record(self, step: int) -> dict[str, Any]:
        record = json.loads((self._path(step) / _META).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise RefusedError(
                f"the checkpoint {self._path(step)} has format {record['format']}, expected {FORMAT}: it was written "
                "by another version of this program"
            )
        return record

    def _pass_over(self, problems: dict[int, list[str]], chosen: int) -> None:
        """Reports damaged checkpoints newer than the chosen one, and moves them out of the way of the next save."""
        for step, lines in problems.items():
            listed = "".join(f"\n  - {line}" for line in lines)
            fate = "was left where it is"
            if not self._read_only:
                _remove(self._path(step, "damaged"))
                self._path(step).rename(self._path(step, "damaged"))
                fate = f"was renamed to {step}.damaged"
            _logger.error(
                "the checkpoint %s is damaged and %s:%s\nRestoring step %d instead: %d steps are lost.",
                self._path(step),
                fate,
                listed,
                chosen,
                step - chosen,
            )

    def _none_left(self, problems: dict[int, list[str]]) -> str:
        if not problems:
            return f"there is no checkpoint in {self.directory}"
        listed = "".join(f"\n  - step {step}: {line}" for step, lines in problems.items() for line in lines)
        return (
            f"no intact checkpoint is left in {self.directory}; nothing was restored and nothing changed:{listed}\n"
            "Bring the files back from a copy, or use another --workdir to begin anew."
        )

    def _remove_old(self) -> None:
        """Keeps the last ones and the multiples; damaged ones go when the run has passed them."""
        steps = self.steps()
        every = self._config.keep_every_steps
        for step in steps[: -max(self._config.keep_last, 1)]:
            if every is None or step % every:
                # Renamed first, so that a removal that is killed leaves nothing that looks like a checkpoint.
                self._path(step).rename(self._path(step, "deleting"))
                _remove(self._path(step, "deleting"))
        for path in self.directory.glob("*.damaged"):
            if path.stem.isdecimal() and int(path.stem) <= steps[-1]:
                _remove(path)

    def _remove_leftovers(self) -> None:
        for path in self.directory.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                _logger.info("removing %s, left by a save or removal that did not finish", path)
                _remove(path)

    def _path(self, step: int, suffix: str | None = None) -> Path:
        return self.directory / (str(step) if suffix is None else f"{step}.{suffix}")


def _context() -> Any:
    context = ocp.Context()
    # Random mantissas shrink by 8 percent and cost three times the time.
    context.array.saving.use_compression = False
    return context


def _by_item(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The state in the parts that are stored apart, so that parameters can be read and verified alone."""
    prefix = f"{_PARAMS}/"
    params = {path: leaf for path, leaf in leaves.items() if path.startswith(prefix)}
    rest = {f"{_TRAINING}/{path}": leaf for path, leaf in leaves.items() if not path.startswith(prefix)}
    return trees.nested({**params, **rest})


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    if files:
        folder.mkdir(exist_ok=True)
    for name, content in files.items():
        with (folder / name).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())


def _is_meta(name: str) -> bool:
    return name == _META


def _disk_reason(error: BaseException | None) -> str | None:
    """The operating system's reason for a failed write, or None if it was something else.

    TensorStore reports it as text only.
    """
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        reason = re.search(
            r"(No space left on device|Disk quota exceeded|Read-only file system|File too large)", str(error)
        )
        if reason:
            return reason[0]
        error = error.__cause__ or error.__context__
    return None


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
