"""Checkpoints of a run in an object store, which has no rename: a checkpoint exists when its commit record is written.

    data/<step>.<attempt>/<path>/c/...    chunks of the arrays, each with its checksum; see `bucket_arrays`
    data/<step>.<attempt>/files/<name>    parts of the state that are not arrays
    committed/<step>.json                 commit record: what the data consist of, the meta, and its own checksum
    damaged/<step>.json                   commit record of a checkpoint that was found damaged

Every save writes below a name of its own (attempt), so a save that was killed can never become a part of another one.
The next process of the run removes what no record names. All processes write and verify their own part; process 0
writes the commit record when all have told it that they are done, through jax's coordination service.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import secrets
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from t5x_like.checkpoints import bucket_arrays
from t5x_like.checkpoints.checkpoint_ref import missing_step
from t5x_like.checkpoints.commit_record import Record, decoded, encoded
from t5x_like.checkpoints.fingerprints import FINGERPRINTS, begin_fingerprints, changes
from t5x_like.checkpoints.interface import FORMAT, Checkpoints, Kept, Require, error_of_save
from t5x_like.checkpoints.retention import removable
from t5x_like.checkpoints.stored_types import as_stored, as_wanted
from t5x_like.config.run import CheckpointConfig
from t5x_like.distributed.coordination import on_process_0, set_value, unique_key, wait_for_value
from t5x_like.errors import ConfigError, SafetyError, UserError
from t5x_like.run_directory import RUN_ID, RunRecord
from t5x_like.storage import locations
from t5x_like.storage.locations import Url
from t5x_like.utils import tree_paths

_PARAMS, _FILES = "params", "files"
_logger = logging.getLogger(__name__)


class BucketCheckpoints(Checkpoints):
    """Checkpoints below a URL."""

    def __init__(
        self,
        url: Url,
        config: CheckpointConfig,
        *,
        directory: Path,
        read_only: bool = False,
        record: RunRecord | None = None,
        kept: Kept = lambda steps: (),
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
          url: Where the checkpoints are.
          config: Which checkpoints are kept.
          directory: Local directory that stands for the URL, for messages and callbacks.
          read_only: Change nothing, for reading another run's checkpoints.
          record: Record of the run, which writes its id to the checkpoints; None for an imported model.
          kept: Returns which of the saved steps are kept although newer ones exist.
          before_commit: Called in process 0 before a checkpoint becomes visible; raises UserError if it must not.
        """
        self.url, self.directory, self.protected = url, directory, None
        self._config, self._read_only, self._run = config, read_only, record
        self._kept, self._before_commit = kept, before_commit
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._begun = 0.0
        if not read_only and jax.process_index() == 0:
            self._remove_leftovers()

    def steps(self) -> list[int]:
        return self._recorded("committed")

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        meta: Mapping[str, Any],
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> bool:
        self.wait()
        self._begun = time.monotonic()
        name = on_process_0(lambda: None if step in self.steps() else f"{step}.{secrets.token_hex(8)}")
        if name is None:
            return False
        if self._run is not None:
            meta = {**meta, RUN_ID: self._run.run_id}
        leaves = tree_paths.by_path(state)
        record = {
            "format": FORMAT,
            "step": step,
            "data": name,
            "state": tree_paths.describe(leaves),
            "arrays": bucket_arrays.describe(leaves),
            "meta": dict(meta),
        }
        found = begin_fingerprints(leaves)
        pieces, key = bucket_arrays.copy_own_shards(leaves), unique_key("checkpoint")
        record[FINGERPRINTS] = found()
        finish = self._executor.submit(self._finish, record, pieces, dict(files), key)
        self._pending = (step, finish)
        return True

    def wait(self) -> None:
        if self._pending is not None:
            (step, finish), self._pending = self._pending, None
            if (error := error_of_save(finish, step)) is not None:
                raise error

    def close(self, *, abandon: bool = False) -> None:
        if abandon:
            self._executor.shutdown(wait=False, cancel_futures=True)
            return
        try:
            self.wait()
        finally:
            self._executor.shutdown(wait=False)

    def restore(
        self,
        abstract_state: Mapping[str, Any],
        step: int | None = None,
        *,
        require: Require = lambda path, meta: None,
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        return self._restore(abstract_state, step, require, lambda name: True)

    def restore_params(
        self, abstract_params: Mapping[str, Any], step: int | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        wanted = {_PARAMS: abstract_params}
        step, state, meta = self._restore(
            wanted, step, lambda path, meta: None, lambda name: name.startswith("params/"), widens=True
        )
        return step, state[_PARAMS], meta

    def read_files(self, step: int) -> dict[str, bytes]:
        files, problems = self._files_of(self._required_record(step))
        if problems:
            raise SafetyError(self._none_left({step: problems}))
        return files

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        self.wait()
        problems: dict[int, list[str]] = {}
        for candidate in [step] if step is not None else reversed(self.steps()):
            record, problems[candidate] = self._read_record(candidate)
            if record is not None:
                meta: dict[str, Any] = record["meta"]
                return meta
        raise SafetyError(self._none_left(problems))

    def digest(self, step: int) -> str:
        return hashlib.sha256(encoded(self._required_record(step))).hexdigest()[:32]

    def find_damage(self, step: int) -> list[str]:
        record, problems = self._read_record(step)
        if record is None:
            return problems
        return bucket_arrays.find_damage(self._data(record), record["arrays"]) + self._files_of(record)[1]

    def remove_after(self, step: int) -> None:
        for later in reversed(self.steps()):
            if later > step:
                self._remove("committed", later)

    def _finish(self, record: Record, pieces: list[bucket_arrays.Piece], files: Mapping[str, bytes], key: str) -> None:
        """Write what this process holds of a checkpoint and complete it; runs in the background."""
        own: dict[str, Any] = {}
        error: BaseException | None = None
        try:
            own[_FILES] = self._write(record, pieces, files)
        except BaseException as found:  # Any failure must reach the other processes, which wait for this one.
            error = found
            own["failed"] = True
        if jax.process_index() > 0:
            set_value(f"{key}/{jax.process_index()}", json.dumps(own))
            if error is not None:
                raise error
            failed = json.loads(wait_for_value(f"{key}/committed"))["failed"]
        else:
            failed = True
            try:
                others = [json.loads(wait_for_value(f"{key}/{index}")) for index in range(1, jax.process_count())]
                if error is not None:
                    raise error
                if not any("failed" in one for one in others):
                    self._commit(record, [own, *others])
                    failed = False
            finally:
                if jax.process_count() > 1:
                    set_value(f"{key}/committed", json.dumps({"failed": failed}))
                if failed:
                    self._discard(record)
        if failed:
            raise SafetyError(
                f"the checkpoint of step {record['step']} was not written: another process failed, see its message"
            )

    def _write(self, record: Record, pieces: list[bucket_arrays.Piece], files: Mapping[str, bytes]) -> dict[str, int]:
        """Write arrays and files; return the checksums of the files by name."""
        data = self._data(record)
        bucket_arrays.write(data, record["arrays"], pieces)
        for name, content in files.items():
            locations.write_bytes(data / _FILES / name, content)
        return {name: zlib.crc32(content) for name, content in files.items()}

    def _commit(self, record: Record, parts: list[dict[str, Any]]) -> None:
        """Write the commit record, after which the checkpoint exists, and remove old checkpoints."""
        record[_FILES] = {name: checksum for part in parts for name, checksum in part[_FILES].items()}
        step, text = record["step"], encoded(record)
        self._before_commit()
        # When the answer to a write was lost, its repetition finds the record.
        if not locations.write_new(key := self._key("committed", step), text) and locations.read_bytes(key) != text:
            raise SafetyError(f"{key}: another process has saved step {step} in the meantime")
        self.save_seconds = time.monotonic() - self._begun
        if self._run is not None:
            self._run.completed(step)
        try:
            self._remove_old()
        except UserError as error:
            # The next save tries it again.
            _logger.warning("old checkpoints could not be removed: %s", error)

    def _discard(self, record: Record) -> None:
        """Remove the data of a save that failed, unless the record was written nevertheless.

        What another process is still writing is removed at the next start.
        """
        with contextlib.suppress(Exception):
            if self._name_of("committed", record["step"]) != record["data"]:
                locations.remove(self._data(record))

    def _restore(
        self,
        abstract: Mapping[str, Any],
        step: int | None,
        require: Require,
        is_wanted: Callable[[str], bool],
        *,
        widens: bool = False,
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Restore `step`, or the newest intact checkpoint. Process 0 chooses; every process verifies what it reads.

        Args:
          widens: Convert arrays that are stored in bfloat16 if float32 is wanted.
        """
        self.wait()
        leaves = tree_paths.by_path(abstract)
        problems: dict[int, list[str]] = {}

        def choose() -> Record:
            existing = self.steps()
            if step is not None and step not in existing:
                raise ConfigError([missing_step(self.directory, step, existing)])
            for candidate in [step] if step is not None else reversed(existing):
                if candidate in problems:
                    continue
                record, found = self._read_record(candidate)
                if record is None:
                    problems[candidate] = found
                    continue
                require(self.directory / str(candidate), record["meta"])
                saved = {path: text for path, text in record["state"].items() if is_wanted(path)}
                expected = tree_paths.describe(as_stored(leaves, saved) if widens else leaves)
                tree_paths.require_same(saved, expected, f"the checkpoint {self._key('committed', candidate)}")
                return record
            raise SafetyError(self._none_left(problems))

        while True:
            record = on_process_0(choose)
            is_broadcast = self._config.load_and_broadcast
            stored = as_stored(leaves, record["state"]) if widens else leaves
            parts, found = bucket_arrays.read(self._data(record), record["arrays"], stored, is_broadcast=is_broadcast)
            found = self._in_any_process(found + (self._files_of(record)[1] if is_wanted(_FILES) else []))
            if not found:
                by_path = bucket_arrays.assemble(stored, parts, is_broadcast=is_broadcast)
                found = [changed] if (changed := changes(by_path, record)) else []
            if not found:
                break
            problems[record["step"]] = found
        on_process_0(lambda: self._pass_over(problems, record["step"]))
        by_path = as_wanted(by_path, leaves)
        state = jax.tree.unflatten(jax.tree.structure(abstract), [by_path[path] for path in leaves])
        return record["step"], state, record["meta"]

    def _in_any_process(self, problems: list[str]) -> list[str]:
        """Return the problems that any of the processes has found."""
        key, count = unique_key("damage"), jax.process_count()
        if jax.process_index() > 0:
            set_value(f"{key}/{jax.process_index()}", json.dumps(problems))

        def collect() -> list[str]:
            others = [json.loads(wait_for_value(f"{key}/{index}")) for index in range(1, count)]
            return sorted({*problems, *(line for lines in others for line in lines)})

        return on_process_0(collect)

    def _files_of(self, record: Record) -> tuple[dict[str, bytes], list[str]]:
        """Return the files of a checkpoint by name, and their problems."""
        files: dict[str, bytes] = {}
        problems = []
        for name, checksum in record[_FILES].items():
            content = locations.read_bytes(self._data(record) / _FILES / name)
            if content is None or zlib.crc32(content) != checksum:
                problems.append(
                    f"{_FILES}/{name}: {'missing' if content is None else 'not the content that was saved'}"
                )
            else:
                files[name] = content
        return files, problems

    def _required_record(self, step: int) -> Record:
        record, problems = self._read_record(step)
        if record is None:
            raise SafetyError(self._none_left({step: problems}))
        return record

    def _read_record(self, step: int) -> tuple[Record | None, list[str]]:
        """Return a commit record, or None and its problem.

        Raises:
          SafetyError: the record is of another version or of another step.
        """
        key = self._key("committed", step)
        record = decoded(locations.read_bytes(key))
        if record is None:
            return None, [f"{key}: missing or damaged"]
        if record["format"] != FORMAT:
            raise SafetyError(f"{key}: found format {record['format']}, expected {FORMAT}: another version wrote it")
        if record["step"] != step:
            raise SafetyError(f"{key}: holds step {record['step']}, expected {step}: was it renamed? Restore its name.")
        return record, []

    def _pass_over(self, problems: Mapping[int, list[str]], chosen: int) -> None:
        """Report damaged checkpoints newer than the chosen one, and set them aside so that their steps can be saved."""
        for step, lines in problems.items():
            listed = "".join(f"\n  - {line}" for line in lines)
            key, fate = self._key("committed", step), "was left unchanged"
            if not self._read_only:
                # The copy comes first, so that the data stay named by a record.
                locations.write_bytes(self._key("damaged", step), locations.read_bytes(key) or b"")
                locations.remove_key(key)
                fate = f"its record was moved to {self._key('damaged', step)}"
            _logger.error(
                "the checkpoint %s is damaged; %s:%s\nRestoring step %d instead: %d steps are lost.",
                key,
                fate,
                listed,
                chosen,
                step - chosen,
            )

    def _none_left(self, problems: Mapping[int, list[str]]) -> str:
        if not problems:
            return f"there is no checkpoint in {self.url}"
        listed = "".join(f"\n  - step {step}: {line}" for step, lines in problems.items() for line in lines)
        return (
            f"there is no intact checkpoint in {self.url}; nothing was restored or changed:{listed}\n"
            "Restore the objects from a copy, or use another --workdir to start a new run."
        )

    def _remove_old(self) -> None:
        """Remove the checkpoints that are not kept, and damaged ones up to the newest step."""
        steps = self.steps()
        for step in removable(steps, self._config, {self.protected, *self._kept(steps)}):
            self._remove("committed", step)
        for step in self._recorded("damaged"):
            if step <= steps[-1]:
                self._remove("damaged", step)

    def _remove(self, kind: str, step: int) -> None:
        """Remove a checkpoint: the record first, so that a removal that is killed leaves no incomplete checkpoint."""
        key = self._key(kind, step)
        record = decoded(locations.read_bytes(key))
        locations.remove_key(key)
        if record is not None:
            names = [record["data"]]
        else:
            committed = self._name_of("committed", step)
            names = [name for name in locations.children(self.url / "data", f"{step}.") if name != committed]
        for name in names:
            locations.remove(self.url / "data" / name)

    def _remove_leftovers(self) -> None:
        """Remove the data that no record names. The records are read: a listing may be refused, and look empty."""
        for name in locations.children(self.url / "data"):
            step = int(name.partition(".")[0])
            committed, damaged = (locations.read_bytes(self._key(kind, step)) for kind in ("committed", "damaged"))
            record = decoded(committed)
            # A record that is damaged may name any data of its step.
            is_named = damaged is not None or (committed is not None and (record is None or record["data"] == name))
            if not is_named:
                _logger.info("removing %s, left by a save or removal that did not finish", self.url / "data" / name)
                locations.remove(self.url / "data" / name)

    def _name_of(self, kind: str, step: int) -> str | None:
        record = decoded(locations.read_bytes(self._key(kind, step)))
        return None if record is None else record["data"]

    def _recorded(self, kind: str) -> list[int]:
        names = [name.removesuffix(".json") for name in locations.children(self.url / kind)]
        return sorted(int(name) for name in names if name.isdecimal())

    def _data(self, record: Record) -> Url:
        return self.url / "data" / record["data"]

    def _key(self, kind: str, step: int) -> Url:
        return self.url / kind / f"{step}.json"
