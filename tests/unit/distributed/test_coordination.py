"""Coordination and preemption, with threads as processes that share one key-value store."""

from __future__ import annotations

import random
import threading
import time

import jax
import pytest

from t5x_like.distributed import coordination, preemption
from t5x_like.errors import SafetyError

PROCESSES = 3
_process = threading.local()


class KeyValueStore:
    """The used methods of jax's coordination client, for threads."""

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


class RequestAtStep:
    """Stop request of one process, made before a given step."""

    def __init__(self, at: int | None):
        self.at, self.reason = at, None

    def poll(self, step: int) -> None:
        if self.at is not None and step >= self.at:
            self.reason = "SIGTERM"

    def reached(self, step: int) -> bool:
        return self.reason is not None


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> KeyValueStore:
    """Count keys per thread, which stands for a process; threads that a process starts belong to it."""
    store = KeyValueStore()
    start = threading.Thread.__init__

    def inherit(self: threading.Thread, *arguments: object, **keywords: object) -> None:
        start(self, *arguments, **keywords)  # type: ignore[arg-type]
        index, run = getattr(_process, "index", 0), self.run

        def run_as() -> None:
            if not hasattr(_process, "index"):
                _process.index = index
            run()

        self.run = run_as  # type: ignore[method-assign]

    class Numbers:
        def __next__(self) -> int:
            _process.number = getattr(_process, "number", -1) + 1
            return _process.number

    monkeypatch.setattr(threading.Thread, "__init__", inherit)
    monkeypatch.setattr(coordination, "_numbers", Numbers())
    monkeypatch.setattr(coordination, "_client", lambda: store)
    monkeypatch.setattr(coordination, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(jax, "process_count", lambda: PROCESSES)
    monkeypatch.setattr(jax, "process_index", lambda: _process.index)
    return store


def run_on_all(work: object) -> list[object]:
    """Return the result of `work(index)`, or its exception, for each process."""
    results: list[object] = [None] * PROCESSES

    def one(index: int) -> None:
        _process.index = index
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
def test_all_processes_stop_before_the_same_step(store: KeyValueStore, seed: int) -> None:
    """One, some or all processes are asked to stop, at different steps, and each runs at its own speed."""
    rng = random.Random(seed)
    asked = [rng.choice([None, rng.randrange(30)]) for _ in range(PROCESSES)]
    asked[rng.randrange(PROCESSES)] = rng.randrange(30)
    pace = [rng.uniform(0.0005, 0.004) for _ in range(PROCESSES)]

    def work(index: int) -> tuple[int, str | None]:
        local = RequestAtStep(asked[index])
        with preemption.coordinated_stop(local) as stop:
            for step in range(5000):
                local.poll(step)
                if stop.reached(step):
                    break
                time.sleep(pace[index])
            return step, stop.reason

    results = run_on_all(work)
    assert len(set(results)) == 1, results
    step, reason = results[0]  # type: ignore[misc]
    assert reason == "SIGTERM" and min(at for at in asked if at is not None) <= step < 4999


def test_no_process_stops_without_a_request(store: KeyValueStore) -> None:
    def work(index: int) -> bool:
        with preemption.coordinated_stop(RequestAtStep(None)) as stop:
            return any(stop.reached(step) for step in range(200))

    assert run_on_all(work) == [False] * PROCESSES


def test_decisions_and_errors_of_process_0_reach_all_processes(store: KeyValueStore) -> None:
    deciders = []

    def decide() -> dict[str, list[int]]:
        deciders.append(_process.index)
        return {"steps": [1, 2]}

    assert run_on_all(lambda index: coordination.on_process_0(decide)) == [{"steps": [1, 2]}] * PROCESSES
    assert deciders == [0]

    def refuse() -> None:
        raise SafetyError("the disk is full")

    store.values.clear()  # The new threads, which stand for the processes, count keys from 0 again.
    refusals = run_on_all(lambda index: coordination.on_process_0(refuse))
    assert [refusal.exit_code for refusal in refusals] == [3] * PROCESSES  # type: ignore[attr-defined]
    assert [str(refusal) for refusal in refusals] == ["the disk is full"] + ["process 0 reports the reason"] * 2
    assert [isinstance(refusal, coordination.RemoteProcessError) for refusal in refusals] == [False, True, True]


def test_processes_with_different_configurations_are_refused(store: KeyValueStore) -> None:
    results = run_on_all(lambda index: coordination.require_same("b" if index == 2 else "a", "configuration"))
    assert results[:2] == [None, None]
    assert isinstance(results[2], SafetyError) and "process 2 was started with a different configuration" in str(
        results[2]
    )
