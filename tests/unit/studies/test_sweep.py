"""Results of a sweep: the order of its arms, which are significantly worse, and what exit codes decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.config_examples import example

from t5x_like.errors import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE, ConfigError
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.studies import runs
from t5x_like.studies.budgets import study_runs
from t5x_like.studies.results import Results, collect, ordered_arms
from t5x_like.studies.study import Arm, Study, StudyRun
from t5x_like.studies.sweep import best_first, sweep_report, sweep_study
from t5x_like.utils.console import Console

BITS = {"a": 2.0, "b": 1.500, "c": 1.501, "d": 1.9, "h": 1.4}
NOISE = np.random.default_rng(0).normal(0, 0.05, 200)
STUDY = sweep_study([Arm(name, dataclasses.replace(example(), name=name), ("smoke",)) for name in BITS], (), None)


def checkpoint(name: str) -> EvaluatedCheckpoint:
    """Return a result on the text of the others, but for `h`; `b` and `c` differ by less than their noise."""
    own = np.random.default_rng(ord(name)).normal(0, 0.01, 200)
    fields: dict[str, Any] = {"bits_per_byte": BITS[name] + NOISE + own}
    return EvaluatedCheckpoint(
        name=name,
        path=Path(name),
        step=10,
        config={},
        values={"bits_per_byte": BITS[name], "score": BITS[name]},
        draws=fields,
        examples={"bits_per_byte": name == "h"},
        held_out=[],
        samples=(),
        answers={},
    )


def results(study: Study, names: str) -> Results:
    return collect(study, [(run, checkpoint(run.arm)) for run in study_runs(study) if run.arm in names])


def test_arms_are_ordered_and_only_significant_differences_have_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    found = results(STUDY, "abcd")
    assert found.measure == "bits_per_byte" and ordered_arms(found) == list("bcda")
    assert [arm.name for arm in best_first(STUDY, found).arms] == list("bcdah")
    sweep_report(found, Console(width=120))
    out = capsys.readouterr().out
    # Each interval alone is +-0.1 wide: the paired differences tell the arms apart.
    assert "best: b, bits_per_byte 1.500" in out and "not significantly worse: c\n" in out
    assert out.count("worse") == 3 and "--seeds" in out
    highest_first = results(dataclasses.replace(STUDY, measure="score"), "abcd")
    assert ordered_arms(highest_first)[0] == "a"


def test_scores_of_other_text_have_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    found = results(STUDY, "abcdh")
    assert ordered_arms(found)[0] == "h"
    sweep_report(found, Console(width=120))
    out = capsys.readouterr().out
    assert out.count("other text") == 4 and "worse" not in out


def test_a_metric_that_a_run_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="loss/S, which not all runs have, expected one of bits_per_byte, score"):
        results(dataclasses.replace(STUDY, measure="loss/S"), "ab")


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        # The exit codes of three runs, and of their evaluation.
        ([EXIT_OK, EXIT_OK, EXIT_OK, EXIT_OK], (EXIT_OK, ["a", "b", "c"])),
        ([EXIT_OK, EXIT_REFUSED, EXIT_OK, EXIT_OK], (EXIT_REFUSED, ["a", "c"])),
        ([EXIT_REFUSED, EXIT_REFUSED, EXIT_REFUSED], (EXIT_REFUSED, [])),
        ([EXIT_OK, EXIT_OK, EXIT_RESUMABLE], (EXIT_RESUMABLE, [])),
        ([EXIT_OK, EXIT_OK, EXIT_OK, EXIT_RESUMABLE], (EXIT_RESUMABLE, [])),
    ],
)
def test_a_run_that_diverges_is_left_out(
    monkeypatch: pytest.MonkeyPatch, codes: list[int], expected: tuple[int, list[str]], jobs: int
) -> None:
    commands: list[list[str]] = []
    code_of = dict(zip("abc", codes, strict=False))

    def run(arguments: Sequence[str]) -> int:
        commands.append(list(arguments))
        if arguments[0] == "train":
            return code_of[Path(arguments[3]).name]
        return codes[3]

    def evaluated(workdir: Path, run: StudyRun) -> None:
        return None

    monkeypatch.setattr(runs, "run_command", run)
    monkeypatch.setattr(runs, "evaluated", evaluated)
    some = [run for run in study_runs(STUDY) if run.arm in "abc"]
    code, finished = runs.train_runs(some, Path("w"), jobs=jobs, further=["--trust", "mine"])
    assert (code, [run.arm for run in finished]) == expected
    assert len(commands) == len(codes)
    if len(codes) == 4:
        trained = [f"w/{name}" for name in "abc" if code_of[name] == EXIT_OK]
        assert commands[-1] == ["eval", *trained, "--trust", "mine"]
    assert all(command[4:7] == ["--trust", "mine", "--"] for command in commands if command[0] == "train")


def test_nothing_is_trained_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def run(arguments: Sequence[str]) -> int:
        trained.append(Path(arguments[3]).name)
        return EXIT_RESUMABLE

    monkeypatch.setattr(runs, "run_command", run)
    assert runs.train_runs(study_runs(STUDY), Path("w")) == (EXIT_RESUMABLE, [])
    assert trained == ["a"]


@pytest.mark.parametrize(("recipe", "trusted"), [("recipe.py", ["--trust", "mine.py"]), ("run/config.json", [])])
def test_the_evaluation_trusts_the_plug_ins_of_a_recipe_in_python_only(
    monkeypatch: pytest.MonkeyPatch, recipe: str, trusted: list[str]
) -> None:
    commands: list[list[str]] = []

    def run(arguments: Sequence[str]) -> int:
        commands.append(list(arguments))
        return EXIT_OK

    def evaluated(workdir: Path, run: StudyRun) -> None:
        return None

    monkeypatch.setattr(runs, "run_command", run)
    monkeypatch.setattr(runs, "evaluated", evaluated)
    one = study_runs(STUDY)[0]
    with_plugin = dataclasses.replace(one, run=dataclasses.replace(one.run, plugins=("mine.py",)), recipe=(recipe,))
    assert runs.train_runs([with_plugin], Path("w"))[0] == EXIT_OK
    assert commands[-1] == ["eval", f"w/{one.name}", *trusted]
