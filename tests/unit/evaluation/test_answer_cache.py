"""The answer cache and the checkpoint watcher: after kills, each key and each step is computed exactly once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.errors import SafetyError
from t5x_like.evaluation.answer_cache import AnswerCache
from t5x_like.evaluation.checkpoint_watcher import watch_checkpoints

KEYS = [str(number) for number in range(20)]


class Killed(BaseException):
    pass


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 60)), max_size=4), at_once=st.integers(1, 7))
def test_each_key_is_computed_once_despite_kills(tmp_path_factory, cuts, at_once):
    """A kill is simulated by an exception after some rows, and a file that ends some bytes earlier."""
    path = tmp_path_factory.mktemp("rows") / "answers.partial"
    written: list[str] = []

    def ask(budget: int):
        def answer(indices):
            nonlocal budget
            budget -= len(indices)
            if budget < 0:
                raise Killed
            written.extend(KEYS[index] for index in indices)
            return [int(KEYS[index]) ** 2 for index in indices]

        return answer

    for budget, torn in cuts:
        with AnswerCache(path, {"step": 3}) as answers, pytest.raises(Killed):
            answers.complete(KEYS, ask(budget), at_once=at_once)
            raise Killed
        data = path.read_bytes()
        path.write_bytes(data[: max(len(data) - torn, 0)])
    with AnswerCache(path, {"step": 3}) as answers:
        assert answers.complete(KEYS, ask(99), at_once=at_once) == [int(key) ** 2 for key in KEYS]
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert lines[0] == {"belongs_to": {"step": 3}}
    assert sorted(line["key"] for line in lines[1:]) == sorted(KEYS)


def test_file_of_another_kind_is_unchanged(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my only copy")
    with pytest.raises(SafetyError, match="found a file of another kind"):
        AnswerCache(path, {"step": 3})
    assert path.read_text() == "my only copy"


def test_rows_of_other_parameters_are_not_reused(tmp_path):
    path = tmp_path / "answers"
    with AnswerCache(path, {"checkpoint": "a"}) as answers:
        assert answers.complete(["x", "x", "y"], lambda indices: [index + 10 for index in indices]) == [10, 10, 12]
        with pytest.raises(SafetyError, match="another process writes this file"):
            AnswerCache(path, {"checkpoint": "a"})
    with AnswerCache(path, {"checkpoint": "b"}) as answers:
        assert len(answers) == 0
        answers.add({"x": 1})
        answers.add({"x": 2})
        assert answers["x"] == 1
    with AnswerCache(None, {}) as answers:
        longest_first: list[int] = []
        answers.complete(
            ["a", "b", "c"],
            lambda indices: longest_first.extend(indices) or list(indices),
            at_once=1,
            lengths=[1, 3, 2],
        )
        assert longest_first == [1, 2, 0]


class Run:
    """Run that saves a step per second, keeps the last two, and ends."""

    def __init__(self, folder, last: int):
        self.folder, self.last, self.tick, self.now = folder, last, 0, 0.0
        self.done: list[int] = []

    def steps(self) -> list[int]:
        return [step for step in range(max(self.tick - 1, 1), self.tick + 1)]

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.tick < self.last:
            self.tick += 1
        else:
            (self.folder / "exit.json").write_text('{"code": 0}')

    def watch_checkpoints(self, evaluate, **options):
        return watch_checkpoints(
            self.folder,
            steps=self.steps,
            is_done=self.done.__contains__,
            evaluate=evaluate,
            sleep=self.sleep,
            clock=lambda: self.now,
            **options,
        )


@settings(max_examples=30, deadline=None)
@given(kills=st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=5), seconds=st.integers(0, 3))
def test_each_checkpoint_is_evaluated_once(tmp_path_factory, kills, seconds):
    """Kills come before or after a step is recorded. During an evaluation, steps are saved and deleted."""
    run = Run(tmp_path_factory.mktemp("run"), last=9)
    recorded: list[int] = []
    pending = list(kills)

    def evaluate(step: int) -> None:
        for _ in range(seconds):
            run.sleep(1.0)
        if step not in run.steps():
            raise SafetyError("it was deleted")
        if pending and pending[0][1] <= len(recorded):
            after, _ = pending.pop(0)
            if after:
                recorded.append(step)
                run.done.append(step)
            raise Killed
        recorded.append(step)
        run.done.append(step)

    while True:
        try:
            run.watch_checkpoints(evaluate)
            break
        except Killed:
            continue
    assert recorded == sorted(set(recorded))
    assert set(recorded) <= set(range(1, 10)) and (seconds or set(recorded) == set(range(1, 10)))
    assert 9 in recorded, "the last step is kept, and evaluated after the end of the run"


def test_unreadable_checkpoint_is_reported_once(tmp_path, caplog):
    run = Run(tmp_path, last=3)

    def evaluate(step: int) -> None:
        if step == 2:
            raise SafetyError("damaged")
        run.done.append(step)

    assert run.watch_checkpoints(evaluate) == 2
    assert run.done == [1, 3] and caplog.text.count("step 2 cannot be evaluated: damaged") == 1


def test_watcher_ends_after_the_timeout_and_is_exclusive(tmp_path):
    run = Run(tmp_path, last=0)
    run.tick = 1

    def evaluate(step: int) -> None:
        with pytest.raises(SafetyError, match="another process follows"):
            run.watch_checkpoints(evaluate)
        run.done.append(step)

    run.sleep = lambda seconds: setattr(run, "now", run.now + seconds)  # type: ignore[method-assign]
    assert run.watch_checkpoints(evaluate, timeout=20.0) == 1
    assert 20.0 <= run.now < 30.0
