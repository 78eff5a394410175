"""Joining a run directory by the processes beside the first one: all see one directory, or each has its own copy."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from t5x_like.distributed.coordination import on_process_0, set_value, unique_key, wait_for_value
from t5x_like.errors import SafetyError
from t5x_like.storage.mirror import mirror_of

WAIT_SECONDS = 10.0
"""Time in which a file of process 0 must be seen by the others: network file systems keep what they have read."""
_POLL_SECONDS = 0.2
_MAX_NAMED = 16


def require_shared_directory(directory: Path) -> None:
    """Return if all processes see `directory`, which exists in process 0. All processes call this.

    Raises:
      UserError: in all processes, if one of them does not see it; process 0 names the processes and their hosts.
    """
    if jax.process_count() == 1:
        return
    name = on_process_0(lambda: _write_probe(directory))
    key = unique_key("shared_directory")
    if jax.process_index() > 0:
        is_seen = _is_seen(directory / name)
        set_value(f"{key}/{jax.process_index()}", json.dumps([socket.gethostname(), is_seen]))
    on_process_0(lambda: _require_seen(directory, name, key))


@contextlib.contextmanager
def joined_directory(directory: Path) -> Iterator[None]:
    """Join a run directory, which process 0 has locked, within the context. All processes call this.

    Raises:
      UserError: in all processes, if a process does not see the directory.
    """
    mirror = mirror_of(directory)
    if mirror is None:
        require_shared_directory(directory)
        yield
    elif jax.process_index() == 0:
        yield
    else:
        with mirror.followed():
            yield


def _write_probe(directory: Path) -> str:
    name = f".shared.{secrets.token_hex(8)}"
    (directory / name).touch()
    return name


def _is_seen(probe: Path) -> bool:
    deadline = time.monotonic() + WAIT_SECONDS
    while not probe.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _require_seen(directory: Path, name: str, key: str) -> None:
    try:
        answers = {index: json.loads(wait_for_value(f"{key}/{index}")) for index in range(1, jax.process_count())}
    finally:
        with contextlib.suppress(OSError):
            (directory / name).unlink()
    blind = [f"{index} (host {host})" for index, (host, is_seen) in answers.items() if not is_seen]
    if blind:
        more = f" and {len(blind) - _MAX_NAMED} more" if len(blind) > _MAX_NAMED else ""
        raise SafetyError(
            f"{directory.absolute()} is not shared by all processes: what process 0 (host {socket.gethostname()}) has "
            f"written there is not seen by process {', '.join(blind[:_MAX_NAMED])}{more}. Nothing was trained. Set "
            "--workdir to a directory on a file system that all hosts mount at this path, or to a bucket (gs://, s3://)."
        )
