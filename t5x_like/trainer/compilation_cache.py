"""Persistent compilation cache: jax's, in the run directory by default, so that a restart does not compile again."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from t5x_like import run_directory
from t5x_like.config import CompilationCacheConfig
from t5x_like.storage.mirror import mirror_of

MIN_COMPILE_SECONDS = 0.3
"""Programs that compile faster than this are not kept: reading them back would take about as long."""
_DIRECTORY = "jax_compilation_cache_dir"
_UNLIMITED = -1
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def compilation_cache(config: CompilationCacheConfig, run_dir: Path) -> Iterator[None]:
    """Keep compiled programs on disk within the context, and use those that earlier processes kept.

    Process 0 writes, and every process looks for its programs. On CPUs the other processes of a run find none, because
    jax's keys differ between processes there: they compile at each start. An entry that cannot be read or written is
    reported by jax as a warning, and the program is compiled. A cache directory that the user has set for jax itself is
    left as it is.
    """
    if not config.enabled or getattr(jax.config, _DIRECTORY) is not None:
        yield
        return
    # The local copy of a run directory in an object store lasts as long as the process.
    home = run_dir.absolute() if mirror_of(run_dir) is None else Path.home() / ".cache" / "t5x_like"
    directory = config.directory or str(home / run_directory.COMPILATION_CACHE)
    is_url = "://" in directory
    if jax.default_backend() == "cpu":
        # The code of a CPU program contains instructions that other CPUs may lack, which jax's key does not cover.
        directory = f"{directory}/{_cpu()}"
    problem = None if is_url else _problem(Path(directory))
    if problem is not None:
        _LOG.warning("%s: %s; programs are compiled without a cache", directory, problem)
        yield
        return
    options = {
        _DIRECTORY: directory,
        "jax_compilation_cache_max_size": _UNLIMITED if is_url else config.max_bytes,
        "jax_persistent_cache_min_compile_time_secs": MIN_COMPILE_SECONDS,
    }
    before = {name: getattr(jax.config, name) for name in options}
    # jax opens the cache once per process, and must be told that the directory has changed.
    _configure(options)
    try:
        yield
    finally:
        _configure(before)


def _configure(options: dict[str, object]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def _problem(directory: Path) -> str | None:
    """Create the directory; return why it cannot be used, or None."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        return f"cannot be created ({error.strerror or error})"
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        return "belongs to another user, or others may write there, and loading a program executes code"
    return None


def _cpu() -> str:
    """Return a name for CPUs with the same instructions."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    found = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return f"cpu-{hashlib.sha256(' '.join([platform.machine(), *found]).encode()).hexdigest()[:12]}"
