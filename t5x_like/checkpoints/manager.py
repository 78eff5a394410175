"""Saving and restoring the state of a run.

A checkpoint is a directory named by its step:

    <step>/params/      the parameters, an Orbax tree of arrays (OCDBT, zarr3)
    <step>/training/    everything else of the state: optimizer, step, random key
    <step>/files/       parts of the state that are not arrays, such as the position of a host's data pipeline
    <step>/meta.json    path, type, shape and fingerprint of every array; JSON values of the trainer
    <step>/SHA256SUMS   checksums of all files above, except large ones of array data, which fingerprints protect
    <step>/SIZES        sizes of these, if there are any

It is written under the name `<step>.saving`: Orbax commits the arrays, then the files (which were written to
`<step>.saving.files`) and the checksums are added, then the directory is renamed. So a step that is listed is complete,
and one without checksums was damaged later. A save that was killed leaves `<step>.saving*`, and a removal that was
killed leaves `<step>.deleting`; the next run removes them. A checkpoint that fails its checksums is renamed to
`<step>.damaged`, and the previous one is restored. The directory is on a local or mounted file system, shared by all
processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from t5x_like.checkpoints import checksums, orbax_arrays
from t5x_like.checkpoints.checkpoint_ref import missing_step
from t5x_like.checkpoints.disk_space import disk_reason, failed_save, state_bytes
from t5x_like.checkpoints.fingerprints import FINGERPRINTS, begin_fingerprints, changes, saved_fingerprints
from t5x_like.checkpoints.interface import FORMAT, Checkpoints, Kept, Require, error_of_save
from t5x_like.checkpoints.orbax_arrays import PARAMS, TRAINING
from t5x_like.checkpoints.retention import removable
from t5x_like.checkpoints.stored_types import as_stored, as_wanted
from t5x_like.config.run import CheckpointConfig
from t5x_like.distributed.coordination import barrier, on_process_0
from t5x_like.errors import ConfigError, SafetyError
from t5x_like.faults import STORAGE_FAILED, FaultError
from t5x_like.run_directory import RUN_ID, RunRecord
from t5x_like.utils import tree_paths
from t5x_like.utils.atomic_write import sync_directory, write_files
from t5x_like.utils.json_reader import read_json

_META = "meta.json"
_FILES = "files"
_STEP = re.compile(r"0|[1-9][0-9]*")
_LEFTOVER = re.compile(r"\d+\.(saving|deleting)(\..*)?")

_logger = logging.getLogger(__name__)


class CheckpointManager(Checkpoints):
    """Checkpoints in a local or mounted directory."""

    def __init__(
        self,
        directory: Path | str,
        config: CheckpointConfig,
        *,
        read_only: bool = False,
        record: RunRecord | None = None,
        kept: Kept = lambda steps: (),
    ):
        """
        Args:
          directory: Directory of the checkpoints; created if it does not exist.
          config: Which checkpoints are kept.
          read_only: Change nothing in the directory, for reading another run's checkpoints.
          record: Record of the run, which writes its id to the checkpoints; None for an imported model.
          kept: Returns which of the saved steps are kept although newer ones exist.
        """
        self._kept = kept
        self._run = record
        self.protected: int | None = None  # Step of a checkpoint that is kept although newer ones exist.
        self.directory = Path(directory).absolute()
        self._config = config
        self._read_only = read_only
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._begun = 0.0
        if not read_only and jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()

    def steps(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if _STEP.fullmatch(path.name))

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        meta: Mapping[str, Any],
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> bool:
        self.wait()
        self._begun = time.monotonic()
        # One process decides: on a network file system the others can still see an older listing.
        if on_process_0(lambda: self._is_saved(step)):
            return False
        if self._run is not None:
            meta = {**meta, RUN_ID: self._run.run_id}
        leaves = tree_paths.by_path(state)
        record = {"format": FORMAT, "step": step, "state": tree_paths.describe(leaves), "meta": meta}
        found = begin_fingerprints(leaves)
        try:
            # The files come before the arrays, because Orbax commits once all processes have written theirs.
            write_files(self._path(step, f"saving.{_FILES}"), files)
            committed = orbax_arrays.save(self._path(step, "saving"), leaves)
            text = json.dumps({**record, FINGERPRINTS: found()}, indent=1, sort_keys=True) + "\n"
        except Exception as error:
            raise self._failed(step, error, state_bytes(state)) from error
        finish = self._executor.submit(self._finish, step, committed, text, state_bytes(state))
        self._pending = (step, finish)
        return True

    def _is_saved(self, step: int) -> bool:
        """Return whether the checkpoint of `step` exists in the run's own directory."""
        if self._run is not None:
            self._run.require_present()
        return self._path(step).exists()

    def wait(self) -> None:
        if self._pending is None:
            return
        (step, finish), self._pending = self._pending, None
        error = error_of_save(finish, step)
        # At once: the others can wait in Orbax for this process, which will never come, until they follow its end.
        if error is not None:
            raise error
        # None goes on before all have written: it would wait in the next collective operation for one that has failed.
        barrier()

    def close(self, *, abandon: bool = False) -> None:
        if abandon:
            self._executor.shutdown(wait=False, cancel_futures=True)
            return
        try:
            self.wait()
        finally:
            self._executor.shutdown(wait=False)
            if not self._read_only and jax.process_index() == 0:
                # A write in progress when its save failed may have created its directory again.
                self._remove_leftovers()

    def restore(
        self,
        abstract_state: Mapping[str, Any],
        step: int | None = None,
        *,
        require: Require = lambda path, meta: None,
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        return self._restore(abstract_state, step, lambda name: True, require=require)

    def restore_params(
        self, abstract_params: Mapping[str, Any], step: int | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        chosen, loaded, meta = self._restore(
            {PARAMS: abstract_params},
            step,
            lambda name: not name.startswith((f"{TRAINING}/", f"{_FILES}/")),
            below=f"{PARAMS}/",
            widens=True,
        )
        return chosen, loaded[PARAMS], meta

    def read_files(self, step: int) -> dict[str, bytes]:
        folder = self._path(step) / _FILES
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.is_dir() else {}

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        self.wait()
        problems: dict[int, list[str]] = {}
        for candidate in [step] if step is not None else reversed(self.steps()):
            problems[candidate] = checksums.verify_checksums(self._path(candidate), lambda name: name == _META)
            if not problems[candidate]:
                return self._record(candidate)["meta"]
        raise SafetyError(self._none_left(problems))

    def digest(self, step: int) -> str:
        sums = self._path(step) / checksums.SUMS
        try:
            return hashlib.sha256(sums.read_bytes()).hexdigest()[:32]
        except OSError as error:
            raise SafetyError(f"{sums}: unreadable ({error.strerror}), expected a checkpoint's checksums") from None

    def find_damage(self, step: int) -> list[str]:
        path = self._path(step)
        problems = checksums.verify_checksums(path)
        if problems or not checksums.has_unhashed_files(path):
            return problems
        saved = saved_fingerprints(self._record(step))
        if saved is None:
            return []
        found = {array: orbax_arrays.stored_fingerprint(path, array, saved.summand) for array in saved.by_path}
        return [
            f"{array}: "
            + ("cannot be read" if found[array] is None else "found other values than were in memory when it was saved")
            for array, value in saved.by_path.items()
            if found[array] != value
        ]

    def _finish(self, step: int, committed: Callable[[], None], record: str, size: int) -> None:
        """Complete a save after its arrays have been handed to Orbax; runs in the background."""
        try:
            committed()
            if jax.process_index() == 0:
                saving = self._path(step, "saving")
                files = self._path(step, f"saving.{_FILES}")
                if files.is_dir():
                    files.rename(saving / _FILES)
                (saving / _META).write_text(record, encoding="utf-8")
                checksums.write_checksums(saving)
                # The commit: readers ignore the directory until it has the name of its step.
                saving.rename(self._path(step))
                self.save_seconds = time.monotonic() - self._begun
                sync_directory(self.directory)
                if self._run is not None:
                    self._run.completed(step)
        except Exception as error:
            raise self._failed(step, error, size) from error
        # Only now: until the new checkpoint is complete, the old ones are what a failed save falls back on.
        if jax.process_index() == 0:
            self._remove_old()

    def _failed(self, step: int, error: Exception, size: int) -> Exception:
        """Remove the remains of a failed save; return a UserError if the disk is the reason, otherwise `error`."""
        if not self.directory.is_dir():
            return SafetyError(
                f"{self.directory}: found no such directory at the end of the save of step {step}, expected earlier "
                "checkpoints. Bring it back (is its disk mounted?) and run the same command again."
            )
        reason = disk_reason(error, self.directory)
        if jax.process_index() == 0:
            self._remove_leftovers()
        return error if reason is None else failed_save(self.directory, step, reason, error, size, self.steps())

    def _restore(
        self,
        abstract: Mapping[str, Any],
        step: int | None,
        needed: Callable[[str], bool],
        *,
        below: str = "",
        widens: bool = False,
        require: Require = lambda path, meta: None,
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Restore `step`, or the newest intact checkpoint.

        Process 0 chooses, and verifies the checksums of small files. Each process compares the arrays that it reads
        with their fingerprints.

        Args:
          widens: Convert arrays that are stored in bfloat16 if float32 is wanted.
        """
        self.wait()
        leaves = tree_paths.by_path(abstract)
        problems: dict[int, list[str]] = {}

        def choose() -> int:
            if step is not None and not self._path(step).is_dir():
                raise ConfigError([missing_step(self.directory, step, self.steps())])
            for candidate in [step] if step is not None else reversed(self.steps()):
                if candidate in problems:
                    continue
                path = self._path(candidate)
                # Meta first: it shows whose checkpoint this is before anything else is read.
                found = checksums.verify_checksums(path, lambda name: name == _META)
                if not found:
                    record = self._record(candidate)
                    require(path, record["meta"])
                    saved = {p: text for p, text in record["state"].items() if p.startswith(below)}
                    expected = as_stored(leaves, saved) if widens else leaves
                    tree_paths.require_same(saved, tree_paths.describe(expected), f"the checkpoint {path}")
                    found = checksums.verify_checksums(path, needed)
                if not found:
                    return candidate
                problems[candidate] = found
            raise SafetyError(self._none_left(problems))

        while True:
            chosen = on_process_0(choose)
            record = self._record(chosen)
            by_path, problem = self._load(chosen, as_stored(leaves, record["state"]) if widens else leaves, record)
            if problem is None:
                break
            if step is not None:
                raise SafetyError(f"{self._path(chosen)}: {problem}. Name another step.")
            problems[chosen] = [problem]
        on_process_0(lambda: self._pass_over(problems, chosen))
        by_path = as_wanted(by_path, leaves)
        state = jax.tree.unflatten(jax.tree.structure(abstract), [by_path[path] for path in leaves])
        return chosen, state, record["meta"]

    def _load(
        self, step: int, leaves: Mapping[str, Any], record: Mapping[str, Any]
    ) -> tuple[dict[str, Any], str | None]:
        """Return the arrays of a checkpoint by path, and what is wrong with them.

        Raises:
          FaultError: one of several processes cannot read its part, and the others may wait for it; a restart resumes
            from the checkpoint before.
          SafetyError: the same where nothing may be changed.
        """
        problem = None
        for _ in range(2):  # A difference that arose while it was read is gone the second time.
            try:
                by_path = orbax_arrays.load(self._path(step), leaves)
            except Exception as error:
                problem = orbax_arrays.damage(error)
                if problem is None:
                    raise
                if jax.process_count() > 1:
                    if self._read_only:
                        advice = "name another step, or restore it from a copy"
                        raise SafetyError(f"{self._path(step)}: {problem}; {advice}") from error
                    self._set_aside(step)
                    fate = "it is set aside, and a restart uses the one before"
                    raise FaultError(f"{self._path(step)}: {problem}; {fate}", STORAGE_FAILED) from error
            else:
                problem = changes(by_path, record)
                if problem is None:
                    return by_path, None
            _logger.error("the checkpoint %s: %s", self._path(step), problem)
        return {}, problem

    def _record(self, step: int) -> dict[str, Any]:
        record = read_json(self._path(step) / _META)
        if record["format"] != FORMAT:
            raise SafetyError(
                f"the checkpoint {self._path(step)} has format {record['format']}, expected {FORMAT}: it was written "
                "by another version of this program"
            )
        if record["step"] != step:
            raise SafetyError(
                f"the checkpoint {self._path(step)} holds step {record['step']}, expected {step}: was the folder "
                "renamed? Give each checkpoint the name of its step again."
            )
        return record

    def _pass_over(self, problems: dict[int, list[str]], chosen: int) -> None:
        """Report damaged checkpoints newer than the chosen one, and rename them so that their steps can be saved."""
        for step, lines in problems.items():
            listed = "".join(f"\n  - {line}" for line in lines)
            fate = "was left unchanged"
            if not self._read_only:
                self._set_aside(step)
                fate = f"was renamed to {step}.damaged"
            _logger.error(
                "the checkpoint %s is damaged and %s:%s\nRestoring step %d instead: %d steps are lost.",
                self._path(step),
                fate,
                listed,
                chosen,
                step - chosen,
            )

    def _set_aside(self, step: int) -> None:
        path, damaged = self._path(step), self._path(step, "damaged")
        # Several processes may have found the damage: what the first one has renamed must not be removed by the next.
        with contextlib.suppress(FileNotFoundError):
            try:
                path.rename(damaged)
            except FileNotFoundError:
                raise
            except OSError:  # There is a damaged one from before.
                if path.exists():
                    _remove(damaged)
                path.rename(damaged)

    def _none_left(self, problems: dict[int, list[str]]) -> str:
        if not problems:
            return f"there is no checkpoint in {self.directory}"
        listed = "".join(f"\n  - step {step}: {line}" for step, lines in problems.items() for line in lines)
        return (
            f"there is no intact checkpoint in {self.directory}; nothing was restored or changed:{listed}\n"
            "Restore the files from a copy, or use another --workdir to start a new run."
        )

    def _remove_old(self) -> None:
        """Remove the checkpoints that are not kept, and damaged ones up to the newest step."""
        steps = self.steps()
        for step in removable(steps, self._config, {self.protected, *self._kept(steps)}):
            self._delete(step)
        for path in self.directory.glob("*.damaged"):
            if path.stem.isdecimal() and int(path.stem) <= steps[-1]:
                _remove(path)

    def remove_after(self, step: int) -> None:
        for later in reversed(self.steps()):
            if later > step:
                self._delete(later)

    def _delete(self, step: int) -> None:
        # Renamed first, so that a removal that is killed leaves no incomplete checkpoint.
        self._path(step).rename(self._path(step, "deleting"))
        _remove(self._path(step, "deleting"))

    def _remove_leftovers(self) -> None:
        if not self.directory.is_dir():  # Its disk was unmounted in the meantime.
            return
        for path in self.directory.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                _logger.info("removing %s, left by a save or removal that did not finish", path)
                _remove(path)

    def _path(self, step: int, suffix: str | None = None) -> Path:
        return self.directory / (str(step) if suffix is None else f"{step}.{suffix}")


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
