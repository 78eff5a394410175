"""Coordination of processes beside the arrays: small values exchanged through jax's coordination service.

Nothing here touches a device, so no process waits for a step of another one. All processes call every function in the
same order, from their main threads; with one process each function is a plain call.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

from t5x_like.errors import SafetyError, UserError
from t5x_like.utils.stall_limit import stall_seconds

T = TypeVar("T")
POLL_SECONDS = 1.0
"""Interval at which a `KeyWatcher` looks for its key."""
MAX_WAIT_SECONDS = 7200.0
"""Limit of every wait for another process here, or `stall_seconds()` if that is more. In a training run the watchdog's
limits are lower."""
_PREFIX = "t5x_like"
_numbers = itertools.count()


def max_wait_seconds() -> float:
    """Return the limit of a wait for another process in seconds."""
    return max(MAX_WAIT_SECONDS, stall_seconds())


class RemoteProcessError(UserError):
    """Another process has failed and prints the reason."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def on_process_0(decide: Callable[[], T]) -> T:
    """Call `decide` in process 0 alone and return its result (JSON values) in all processes.

    Raises:
      UserError: `decide` raised it; the other processes raise a `RemoteProcessError` with the same exit code.
    """
    if jax.process_count() == 1:
        return decide()
    key = unique_key("decision")
    if jax.process_index() > 0:
        answer = json.loads(wait_for_value(key))
        if "exit_code" in answer:
            raise RemoteProcessError("process 0 reports the reason", answer["exit_code"])
        return cast(T, answer["value"])
    try:
        value = decide()
    # KeyboardInterrupt and SystemExit too: the other processes must not wait for an answer that never comes.
    except BaseException as error:
        code = error.exit_code if isinstance(error, UserError) else 1
        set_value(key, json.dumps({"exit_code": code}))
        raise
    set_value(key, json.dumps({"value": value}))
    return value


def barrier() -> None:
    """Return when all processes have called this."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(unique_key("barrier"), int(max_wait_seconds() * 1000))


def compile_on_all(function: Any, *arguments: Any) -> None:
    """Compile a jitted function for these arguments and wait until all processes have done so.

    The first collective operation on CPUs allows 30 seconds between the first process and the last, and processes do
    not take equally long to compile.
    """
    if jax.process_count() > 1:
        function.lower(*arguments).compile()
        barrier()


def require_same(text: str, what: str) -> None:
    """Raise SafetyError in a process whose text differs from that of process 0."""
    if on_process_0(lambda: text) != text:
        raise SafetyError(
            f"process {jax.process_index()} was started with a different {what} than process 0: start all processes "
            "with the same command"
        )


def unique_key(kind: str) -> str:
    """Return a key that no other call uses; all processes must call this in the same order."""
    return f"{_PREFIX}/{kind}/{next(_numbers)}"


def _client() -> Any:
    # jax has no public name for the client of its coordination service; Orbax uses the same private one.
    from jax._src import distributed

    return distributed.global_state.client


def set_value(key: str, text: str) -> None:
    """Publish a value under a key.

    Raises:
      JaxRuntimeError: The key exists.
    """
    _client().key_value_set(key, text)


def set_value_if_absent(key: str, text: str) -> bool:
    """Publish a value and return True, or return False if the key exists or the service is gone."""
    try:
        set_value(key, text)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def wait_for_value(key: str) -> str:
    """Wait for the value of a key and return it. Ctrl-C interrupts the wait.

    Raises:
      JaxRuntimeError: there is none after `max_wait_seconds()`, or the service is gone.
    """
    deadline = time.monotonic() + max_wait_seconds()
    while True:
        # One call blocks in native code, where Python does not handle signals: wait in short intervals.
        try:
            return str(_client().blocking_key_value_get(key, 10_000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() > deadline:
                raise


def lookup_value(key: str) -> str | None:
    """Return the value of a key; None if there is none, or if the service is gone."""
    try:
        return str(_client().key_value_try_get(key))
    except jax.errors.JaxRuntimeError:
        return None


class KeyWatcher:
    """Thread that polls for `key` and calls `callback` with its value, once."""

    def __init__(self, key: str, callback: Callable[[str], None]):
        self._key, self._callback = key, callback
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name=f"watch {key}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop polling. If the callback waits for a process that is gone, the thread is abandoned."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * POLL_SECONDS)

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            value = lookup_value(self._key)
            if value is not None:
                try:
                    return self._callback(value)
                except jax.errors.JaxRuntimeError:
                    # At the end of the process, the service may shut down before the threads that use it.
                    if not self._stop.is_set():
                        raise


class ExitBroadcast:
    """Ends this process with the exit code of another process that has failed; the first one prints the reason."""

    _KEY = f"{_PREFIX}/ended"
    _ACKNOWLEDGED = f"{_PREFIX}/seen_ended/"
    _LINGER_SECONDS = 5.0

    def __init__(self, leave: Callable[[int, str], None]):
        """Start to watch for the end of another process.

        Args:
          leave: Called, in a thread, with the exit code and a message to print; it does not return.
        """
        self._leave = leave
        self._index, self._count = jax.process_index(), jax.process_count()
        self._watch = KeyWatcher(self._KEY, self._follow)

    def announce(self, code: int) -> None:
        """Tell the other processes; return when they know it. The first announcement of any process counts."""
        self._watch.close()
        set_value_if_absent(self._KEY, json.dumps({"process": self._index, "code": code}))
        self._linger()

    def first(self, seconds: float) -> tuple[int, int] | None:
        """Return (process, exit code) of the first announcement, waiting for it up to `seconds`; None without one."""
        deadline = time.monotonic() + seconds
        while True:
            value = lookup_value(self._KEY)
            if value is not None:
                ended = json.loads(value)
                return ended["process"], ended["code"]
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)

    def close(self) -> None:
        self._watch.close()

    def _follow(self, text: str) -> None:
        ended = json.loads(text)
        code, process = ended["code"], ended["process"]
        self._linger()
        self._leave(code, f"process {self._index} ends with exit code {code}, as process {process} did")

    def _linger(self) -> None:
        """Acknowledge the announcement; process 0, which runs the service, waits for the others."""
        set_value_if_absent(f"{self._ACKNOWLEDGED}{self._index}", "yes")
        deadline = time.monotonic() + self._LINGER_SECONDS
        while self._index == 0 and time.monotonic() < deadline:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                if len(_client().key_value_dir_get(self._ACKNOWLEDGED)) >= self._count:
                    return
            time.sleep(0.05)
