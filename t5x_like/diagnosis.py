"""Checks of this machine, and of a run, a token store or a model on it, each with advice.

Every check returns findings and raises nothing that the user can cause, so that one broken part does not hide the rest.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from t5x_like import run_directory
from t5x_like.checkpoints.opening import open_checkpoints
from t5x_like.config.run import CheckpointConfig
from t5x_like.data.store.prepare import open_stores
from t5x_like.data.store.token_store import Store
from t5x_like.errors import SafetyError, UserError
from t5x_like.model_loading import LoadedModel, open_model
from t5x_like.storage import locations
from t5x_like.storage.locations import Location, Url
from t5x_like.storage.mirror import local_copy
from t5x_like.utils import formatting
from t5x_like.utils.file_lock import lock
from t5x_like.utils.json_reader import read_json
from t5x_like.utils.jsonl import read_records

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
MIN_FREE_BYTES = 2**30
MIN_FREE_INODES = 1000
MIN_OPEN_FILES = 4096
"""Open files that a run with object stores, workers and TensorBoard may need."""
MAX_CLOCK_SKEW_SECONDS = 5.0
_KINDS = {"run": "a training run", "imported": "an imported model", "huggingface": "a Hugging Face directory"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of a check.

    Attributes:
      subject: What was checked.
      found: What was found.
      advice: What to do; empty if nothing is wrong.
      is_failure: Work would be lost or refused; False with advice: a warning.
    """

    subject: str
    found: str
    advice: str = ""
    is_failure: bool = False


Findings = Iterator[Finding]


def examine_machine(directory: Path) -> Findings:
    """Yield findings about the software, the devices, and the storage of `directory`."""
    versions = [f"{name} {metadata.version(name)}" for name in PACKAGES]
    yield Finding("versions", ", ".join([f"Python {platform.python_version()}", *versions]))
    yield from _guarded("devices", _devices)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shown = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"
    too_few = limit != resource.RLIM_INFINITY and limit < MIN_OPEN_FILES
    yield Finding("open files", f"limit {shown}", f"raise it: ulimit -n {MIN_OPEN_FILES}" if too_few else "")
    yield from _guarded(f"storage of {directory}", lambda: _storage(directory))


def _devices() -> Findings:
    import jax

    kinds = [device.device_kind for device in jax.devices()]
    found = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    slow = jax.default_backend() == "cpu" and any(shutil.which(tool) for tool in ("nvidia-smi", "tpu-info"))
    advice = "this machine has an accelerator; install the extra cuda or tpu" if slow else ""
    yield Finding("devices", f"{jax.default_backend()}: {found}", advice)


def _storage(directory: Path) -> Findings:
    folder = next(folder for folder in (directory, *directory.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    inodes = os.statvfs(folder).f_favail
    yield Finding(
        "disk",
        f"{formatting.size(free)} free",
        "free some space, or use another --workdir" if free < MIN_FREE_BYTES else "",
        free < MIN_FREE_BYTES,
    )
    if 0 < inodes < MIN_FREE_INODES:  # Some file systems report 0 for no limit.
        yield Finding("inodes", f"{inodes:,} free", "remove small files", is_failure=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        skew = os.fstat(file.fileno()).st_mtime - time.time()
        yield Finding("permission", f"{folder} can be written")
        advice = "synchronize the clocks (NTP): leases and times of files are compared across machines"
        yield Finding("clock", f"differs by {abs(skew):.1f} s", advice if abs(skew) > MAX_CLOCK_SKEW_SECONDS else "")
        try:
            lock(file)
            yield Finding("locks", "work")
        except SafetyError as error:
            yield Finding("locks", str(error), "see the message")


def examine_object_store(url: Url) -> Findings:
    """Yield findings about the object store of a URL: whether keys can be written, on a condition, and listed."""
    yield from _guarded(f"storage of {url}", lambda: _object_store(url))


def _object_store(url: Url) -> Findings:
    key = url / f".doctor-{secrets.token_hex(8)}"
    began = time.monotonic()
    is_new = locations.write_new(key, b"1")
    seconds = time.monotonic() - began
    try:
        holds = is_new and not locations.write_new(key, b"2") and locations.read_bytes(key) == b"1"
        advice = "leases need conditional writes: two processes could own one run" if not holds else ""
        yield Finding("conditional writes", "work" if holds else "do not work", advice, is_failure=not holds)
        is_listed = key.name in locations.keys_between(url, key.name, f"{key.name}/")
        advice = "" if is_listed else "allow the account to list the bucket"
        yield Finding("list", "works" if is_listed else "does not work", advice, is_failure=not is_listed)
    finally:
        locations.remove_key(key)
    yield Finding("permission", f"{url} can be written: {seconds:.2f} s for a read and a write")


def examine(target: Location) -> Findings:
    """Yield findings about a run, a token store, an imported model or a Hugging Face directory."""
    try:
        if isinstance(target, Url) and not locations.exists(target):
            yield Finding("content", "no objects")
            return
        if any(locations.read_bytes(target / name) is not None for name in ("info.json", "COMMITTED")):
            yield from _guarded("token store", lambda: _store(Store.open(target)))
            return
        target = local_copy(str(target), "RUN|STORE|MODEL")
        loaded = open_model(target)
    except UserError as error:
        yield Finding(str(target), str(error), "see the message", is_failure=True)
        return
    yield Finding("kind", _KINDS[loaded.kind])
    if loaded.kind != "huggingface":
        yield from _guarded("checkpoints", lambda: _checkpoints(loaded.path, loaded.kind == "run"))
    if loaded.kind == "run":
        yield from _guarded("records", lambda: _records(loaded.path))
        yield from _guarded("last exit", lambda: _last_exit(loaded.path))
        yield from _guarded("data", lambda: _data(loaded))
    else:
        yield from _guarded("tokenizer", lambda: _tokenizer(loaded))


def _guarded(subject: str, check: Callable[[], Findings]) -> Findings:
    """Yield the findings of a check; an error of it becomes a finding."""
    try:
        yield from check()
    except (UserError, OSError, RuntimeError) as error:
        yield Finding(subject, str(error), "see the message", is_failure=True)


def _checkpoints(target: Path, is_run: bool) -> Findings:
    directory = target / run_directory.CHECKPOINTS
    checkpoints = open_checkpoints(target, CheckpointConfig(), read_only=True)
    steps = checkpoints.steps()
    if not steps:
        advice = "nothing was saved, or the volume with the checkpoints is not mounted"
        yield Finding("checkpoints", "none", advice, is_failure=not is_run)
    for step in steps:
        problems = checkpoints.find_damage(step)
        advice = "resuming uses the newest intact one and sets this one aside" if problems else ""
        yield Finding(f"checkpoint {step}", "; ".join(problems) or "intact", advice, bool(problems))
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if path.is_dir() and not path.name.isdigit():
            yield Finding(
                f"checkpoint {path.name}", "damaged or unfinished", "it is not used; remove it to free its space"
            )


def _records(target: Path) -> Findings:
    path = target / run_directory.METRICS
    if path.exists():
        found = read_records(path)
        problems = list(found.problems())
        advice = "the last line of a killed run may be cut off; other lines were changed by something else"
        text = "; ".join([f"{len(found.records):,}", *problems])
        yield Finding("records", text, advice if problems else "")


def _last_exit(target: Path) -> Findings:
    try:
        document = read_json(target / run_directory.EXIT)
        code, reason = int(document["code"]), str(document["reason"])
    except FileNotFoundError:
        yield Finding("last exit", "none recorded", "the run is running, or it was killed: the same command resumes it")
        return
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        yield Finding("last exit", f"{run_directory.EXIT} is malformed ({error})", "the same command resumes the run")
        return
    yield Finding("last exit", f"code {code}: {reason}", "docs/run-directory.md lists the exit codes" if code else "")


def _data(loaded: LoadedModel) -> Findings:
    if loaded.run.data.seqio is not None:
        yield Finding("data", "a seqio Task, read live")
        return
    for store in open_stores(loaded.run.data):
        yield from _store(store)


def _store(store: Store) -> Findings:
    problems = store.find_damage()
    for problem in problems:
        yield Finding(str(store.path), problem, "see the message", is_failure=True)
    if not problems:
        splits = [store.split(name) for name in store.splits]
        counts = [f"{split.name} {split.num_documents:,} documents, {split.num_tokens:,} tokens" for split in splits]
        yield Finding(str(store.path), f"intact: {'; '.join(counts)}")


def _tokenizer(loaded: LoadedModel) -> Findings:
    vocabulary = loaded.tokenizer.vocabulary
    yield Finding("tokenizer", f"{vocabulary.base_size:,} ids")
