"""Answers that outlive a kill, and following a run: each key and each step exactly once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import RefusedError
from t5x_like.evaluation.follow import follow
from t5x_like.evaluation.rows import Answers

KEYS = [str(number) for number in range(20)]


class Killed(BaseException):
    pass


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 60)), max_size=4), at_once=st.integers(1, 7))
def test_a_key_is_answered_once_wherever_it_is_killed(tmp_path_factory, cuts, at_once):
    """A kill is an exception after some answers, and a file that ends some bytes earlier (a line that was torn)."""
    path = tmp_path_factory.mktemp("rows") / "answers.partial"
    written: list[str] = []

    def ask(budget: int):
        def answer(places):
            nonlocal budget
            budget -= len(places)
            if budget < 0:
                raise Killed
            written.extend(KEYS[place] for place in places)
            return [int(KEYS[place]) ** 2 for place in places]

        return answer

    for budget, torn in cuts:
        with Answers(path, {"step": 3}) as answers, pytest.raises(Killed):
            answers.complete(KEYS, ask(budget), at_once=at_once)
            raise Killed
        data = path.read_bytes()
        path.write_bytes(data[: max(len(data) - torn, 0)])
    with Answers(path, {"step": 3}) as answers:
        assert answers.complete(KEYS, ask(99), at_once=at_once) == [int(key) ** 2 for key in KEYS]
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert lines[0] == {"belongs_to": {"step": 3}}
    assert sorted(line["key"] for line in lines[1:]) == sorted(KEYS)


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my only copy")
    with pytest.raises(RefusedError, match="not of this command"):
        Answers(path, {"step": 3})
    assert path.read_text() == "my only copy"


def test_answers_of_other_parameters_are_not_taken(tmp_path):
    path = tmp_path / "answers"
    with Answers(path, {"checkpoint": "a"}) as answers:
        assert answers.complete(["x", "x", "y"], lambda places: [place + 10 for place in places]) == [10, 10, 12]
        with pytest.raises(RefusedError, match="another process writes it"):
            Answers(path, {"checkpoint": "a"})
    with Answers(path, {"checkpoint": "b"}) as answers:
        assert len(answers) == 0
        answers.add({"x": 1})
        answers.add({"x": 2})
        assert answers["x"] == 1
    with Answers(None, {}) as answers:
        longest_first: list[int] = []
        answers.complete(
            ["a", "b", "c"], lambda places: longest_first.extend(places) or list(places), at_once=1, lengths=[1, 3, 2]
        )
        assert longest_first == [1, 2, 0]


class Run:
    """A run that saves a step at each tick, keeps the last two, and ends."""

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

    def follow(self, evaluate, **options):
        return follow(
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
    """A kill may come before a step is recorded or after it. While one is evaluated, others come and go."""
    run = Run(tmp_path_factory.mktemp("run"), last=9)
    recorded: list[int] = []
    pending = list(kills)

    def evaluate(step: int) -> None:
        for _ in range(seconds):
            run.sleep(1.0)
        if step not in run.steps():
            raise RefusedError("it was deleted")
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
            run.follow(evaluate)
            break
        except Killed:
            continue
    assert recorded == sorted(set(recorded))
    assert set(recorded) <= set(range(1, 10)) and (seconds or set(recorded) == set(range(1, 10)))
    assert 9 in recorded, "the last one stays, and is evaluated although the run is over"


def test_a_checkpoint_that_cannot_be_read_is_told_once(tmp_path, caplog):
    run = Run(tmp_path, last=3)

    def evaluate(step: int) -> None:
        if step == 2:
            raise RefusedError("damaged")
        run.done.append(step)

    assert run.follow(evaluate) == 2
    assert run.done == [1, 3] and caplog.text.count("step 2 cannot be evaluated: damaged") == 1


def test_following_ends_without_news_and_is_done_by_one(tmp_path):
    run = Run(tmp_path, last=0)
    run.tick = 1

    def evaluate(step: int) -> None:
        with pytest.raises(RefusedError, match="another process follows"):
            run.follow(evaluate)
        run.done.append(step)

    run.sleep = lambda seconds: setattr(run, "now", run.now + seconds)  # type: ignore[method-assign]
    assert run.follow(evaluate, timeout=20.0) == 1
    assert 20.0 <= run.now < 30.0
