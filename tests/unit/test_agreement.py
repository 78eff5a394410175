"""Processes as threads around one table of keys: whoever is asked to stop, all stop in front of the same step."""

from __future__ import annotations

import random
import threading
import time

import jax
import pytest

from t5x_like.config import RefusedError
from t5x_like.partitioning import agreement

PROCESSES = 3
_me = threading.local()


class Service:
    """The calls of jax's client that are used, for threads."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self.changed:
            if key in self.values:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_try_get(self, key: str) -> str:
        with self.changed:
            if key not in self.values:
                raise jax.errors.JaxRuntimeError("NOT_FOUND")
            return self.values[key]

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]


class Asked:
    """A process's own request, made in front of a step."""

    def __init__(self, at: int | None):
        self.at, self.reason = at, None

    def poll(self, step: int) -> None:
        if self.at is not None and step >= self.at:
            self.reason = "SIGTERM"

    def reached(self, step: int) -> bool:
        return self.reason is not None


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """Numbers of decisions are per process: here, per thread; threads that a process starts belong to it."""
    service = Service()
    start = threading.Thread.__init__

    def inherit(self: threading.Thread, *arguments: object, **keywords: object) -> None:
        start(self, *arguments, **keywords)  # type: ignore[arg-type]
        index, run = getattr(_me, "index", 0), self.run

        def run_as() -> None:
            if not hasattr(_me, "index"):
                _me.index = index
            run()

        self.run = run_as  # type: ignore[method-assign]

    class Numbers:
        def __next__(self) -> int:
            _me.number = getattr(_me, "number", -1) + 1
            return _me.number

    monkeypatch.setattr(threading.Thread, "__init__", inherit)
    monkeypatch.setattr(agreement, "_numbers", Numbers())
    monkeypatch.setattr(agreement, "_client", lambda: service)
    monkeypatch.setattr(agreement, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(jax, "process_count", lambda: PROCESSES)
    monkeypatch.setattr(jax, "process_index", lambda: _me.index)
    return service


def together(work: object) -> list[object]:
    """What `work(index)` returns, or raises, in each process."""
    results: list[object] = [None] * PROCESSES

    def one(index: int) -> None:
        _me.index = index
        try:
            results[index] = work(index)  # type: ignore[operator]
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "processes wait for each other"
    return results


@pytest.mark.parametrize("seed", range(6))
def test_all_stop_in_front_of_the_same_step(service: Service, seed: int) -> None:
    """One, some or all of them are asked, at steps that are not the same, and none runs in step with the others."""
    rng = random.Random(seed)
    asked = [rng.choice([None, rng.randrange(30)]) for _ in range(PROCESSES)]
    asked[rng.randrange(PROCESSES)] = rng.randrange(30)
    pace = [rng.uniform(0.0005, 0.004) for _ in range(PROCESSES)]

    def work(index: int) -> tuple[int, str | None]:
        own = Asked(asked[index])
        with agreement.common_stop(own) as stop:
            for step in range(5000):
                own.poll(step)
                if stop.reached(step):
                    break
                time.sleep(pace[index])
            return step, stop.reason

    found = together(work)
    assert len(set(found)) == 1, found
    step, reason = found[0]  # type: ignore[misc]
    assert reason == "SIGTERM" and min(at for at in asked if at is not None) <= step < 4999


def test_nobody_is_stopped_without_a_reason(service: Service) -> None:
    def work(index: int) -> bool:
        with agreement.common_stop(Asked(None)) as stop:
            return any(stop.reached(step) for step in range(200))

    assert together(work) == [False] * PROCESSES


def test_the_first_decides_for_all_and_its_refusal_is_that_of_all(service: Service) -> None:
    asked = []

    def decide() -> dict[str, list[int]]:
        asked.append(_me.index)
        return {"steps": [1, 2]}

    assert together(lambda index: agreement.by_first(decide)) == [{"steps": [1, 2]}] * PROCESSES
    assert asked == [0]

    def refuse() -> None:
        raise RefusedError("the disk is full")

    service.values.clear()  # The threads that are processes here begin to count anew.
    refusals = together(lambda index: agreement.by_first(refuse))
    assert [refusal.exit_code for refusal in refusals] == [3] * PROCESSES  # type: ignore[attr-defined]
    assert [str(refusal) for refusal in refusals] == ["the disk is full"] + ["process 0 says why"] * 2
    assert [isinstance(refusal, agreement.EndedElsewhereError) for refusal in refusals] == [False, True, True]


def test_processes_that_were_started_differently_are_refused(service: Service) -> None:
    found = together(lambda index: agreement.require_same("b" if index == 2 else "a", "configuration"))
    assert found[:2] == [None, None]
    assert isinstance(found[2], RefusedError) and "process 2 was started with another configuration" in str(found[2])
