"""What processes tell each other beside the arrays: small values, through jax's coordination service.

Nothing here touches a device, so no process waits for a step of another one. Every function is called by all processes
in the same order, from their main threads; with one process each is a plain call.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, cast

import jax

from t5x_like.config import RefusedError, UserError

T = TypeVar("T")
POLL_SECONDS = 1.0
"""Between two looks at what others may have said."""
_PREFIX = "t5x_like"
_numbers = itertools.count()


class EndedElsewhereError(UserError):
    """Another process has refused to go on, and has said why."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def by_first(decide: Callable[[], T]) -> T:
    """Calls `decide` in process 0 alone and hands what it returns (JSON values) to all.

    Raises:
      UserError: `decide` did so; in the other processes an `EndedElsewhereError` with the same exit code.
    """
    if jax.process_count() == 1:
        return decide()
    key = f"{_PREFIX}/decision/{next(_numbers)}"
    if jax.process_index() > 0:
        answer = json.loads(_wait_for(key))
        if "exit_code" in answer:
            raise EndedElsewhereError("process 0 says why", answer["exit_code"])
        return cast(T, answer["value"])
    try:
        value = decide()
    except BaseException as error:
        code = error.exit_code if isinstance(error, UserError) else 1
        _client().key_value_set(key, json.dumps({"exit_code": code}))
        raise
    _client().key_value_set(key, json.dumps({"value": value}))
    return value


def meet() -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"{_PREFIX}/meeting/{next(_numbers)}", _MEETING_MILLISECONDS)


def compile_together(function: Any, *arguments: Any) -> None:
    """Compiles a jitted function for these arguments, and waits until all processes have: the first collective
    operation on CPUs allows 30 seconds between the first process and the last, and compilers do not run in step."""
    if jax.process_count() > 1:
        function.lower(*arguments).compile()
        meet()


def require_same(text: str, what: str) -> None:
    """Raises RefusedError in a process whose text is not that of process 0."""
    if by_first(lambda: text) != text:
        raise RefusedError(
            f"process {jax.process_index()} was started with another {what} than process 0: start all by the same "
            "command"
        )


_MEETING_MILLISECONDS = 24 * 3600 * 1000


def _client() -> Any:
    from jax._src import distributed  # The service's client has no public name; Orbax reaches for it in the same way.

    return distributed.global_state.client


def _wait_for(key: str) -> str:
    """In rounds, so that Ctrl-C is heard between them."""
    while True:
        try:
            return str(_client().blocking_key_value_get(key, 10_000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _look_up(key: str) -> str | None:
    try:
        return str(_client().key_value_try_get(key))
    except jax.errors.JaxRuntimeError:
        return None


def _say_first(key: str, text: str) -> bool:
    """Whether nobody has said it before."""
    try:
        _client().key_value_set(key, text)
    except jax.errors.JaxRuntimeError:
        return False
    return True


class Watch:
    """A thread that looks for `key` until it is there, and then calls `then` with its value, once."""

    def __init__(self, key: str, then: Callable[[str], None]):
        self._key, self._then = key, then
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"watch {key}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """It may be waiting for a process that has gone, and is then left behind."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * POLL_SECONDS)

    def _work(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            found = _look_up(self._key)
            if found is not None:
                try:
                    return self._then(found)
                except jax.errors.JaxRuntimeError:
                    # At the end the service goes before the threads that ask it.
                    if not self._stop.is_set():
                        raise


class StopRequest(Protocol):
    """Whether the process, or another one, was asked to stop."""

    @property
    def reason(self) -> str | None:
        """Why; None if nobody has asked."""

    def reached(self, step: int) -> bool:
        """Whether to stop in front of this step; asked for every step, in order."""


class _CommonStop:
    """All processes stop in front of the same step, whichever of them was asked to, and without waiting for each other
    at the steps before.

    When one has been asked, each names the first step that it has not been asked about yet, and does not pass it before
    the greatest of these is known: there they stop.
    """

    def __init__(self, own: StopRequest):
        self._own = own
        self._key = f"{_PREFIX}/stop/{next(_numbers)}"
        self._lock = threading.Lock()
        self._asked, self._named, self._agreed = -1, -1, -1
        self._told = False
        self._said: str | None = None
        self._known = threading.Event()
        self._watch = Watch(f"{self._key}/asked", self._name_step)

    @property
    def reason(self) -> str | None:
        return self._said or self._own.reason

    def reached(self, step: int) -> bool:
        if self._own.reason is not None and not self._told:
            self._told = True
            _say_first(f"{self._key}/asked", self._own.reason)
        with self._lock:
            self._asked = max(self._asked, step)
            if self._named < 0 or step < self._named:
                return False
        self._known.wait()
        return step >= self._agreed

    def close(self) -> None:
        self._watch.close()

    def _name_step(self, reason: str) -> None:
        with self._lock:
            self._said = reason
            self._named = self._asked + 1
        _client().key_value_set(f"{self._key}/step/{jax.process_index()}", str(self._named))
        if jax.process_index() == 0:
            steps = [int(_wait_for(f"{self._key}/step/{index}")) for index in range(jax.process_count())]
            _client().key_value_set(f"{self._key}/agreed", str(max(steps)))
        self._agreed = int(_wait_for(f"{self._key}/agreed"))
        self._known.set()


@contextlib.contextmanager
def common_stop(own: StopRequest) -> Iterator[StopRequest]:
    """Within: a request to stop that reaches any process stops all of them in front of the same step."""
    if jax.process_count() == 1:
        yield own
        return
    stop = _CommonStop(own)
    try:
        yield stop
    finally:
        stop.close()


class Endings:
    """Ends this process when another one has ended badly, with its exit code; why is said once, by the first."""

    _KEY = f"{_PREFIX}/ended"
    _SEEN = f"{_PREFIX}/seen_ended/"
    _LINGER_SECONDS = 5.0

    def __init__(self, leave: Callable[[int, str], None]):
        """`leave` is called, in a thread, with the exit code and with what is to be said; it does not return."""
        self._leave = leave
        self._index, self._count = jax.process_index(), jax.process_count()
        self._watch = Watch(self._KEY, self._follow)

    def announce(self, code: int) -> None:
        """Tells the others; returns when they know it. Nothing if another process was first to do so."""
        self._watch.close()
        _say_first(self._KEY, json.dumps({"process": self._index, "code": code}))
        self._linger()

    def first(self, seconds: float) -> tuple[int, int] | None:
        """(process, exit code) of the first that has announced its end, waiting for it up to so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            found = _look_up(self._KEY)
            if found is not None:
                ended = json.loads(found)
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
        self._leave(code, f"process {self._index} ends with exit code {code}, as process {process} has done")

    def _linger(self) -> None:
        """Process 0 has the service through which the others hear of an end: it is the last to leave."""
        _say_first(f"{self._SEEN}{self._index}", "yes")
        deadline = time.monotonic() + self._LINGER_SECONDS
        while self._index == 0 and time.monotonic() < deadline:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                if len(_client().key_value_dir_get(self._SEEN)) >= self._count:
                    return
            time.sleep(0.05)
