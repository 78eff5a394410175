"""Page of a study from synthetic runs: expectation before result, three figures, verdicts, and escaped text."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
from helpers.config_examples import example

from t5x_like.config import EvaluationConfig
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.evaluation.results_store import BITS_OF_CONTINUATION, CONTINUATION, record
from t5x_like.studies.budgets import study_runs
from t5x_like.studies.page import render
from t5x_like.studies.results import Results
from t5x_like.studies.study import Arm, Budget, Prediction, Study

RUN = dataclasses.replace(example("prefix_lm"), evaluation=EvaluationConfig(continuation=(8, 8)))
OTHER = dataclasses.replace(RUN, training=dataclasses.replace(RUN.training, z_loss=0.5))
STUDY = Study(
    question="Is <b> better than & worse?",
    arms=(Arm("a", RUN), Arm("b", OTHER)),
    seeds=(0, 1, 2),
    budget=Budget("steps", 40),
    predictions=(
        Prediction("b is far better", "<a guess>", "b", "a", high=-0.05),
        Prediction("b is far worse", "a guess", "b", "a", low=0.05),
    ),
    cannot_show=("Everything <else>.",),
)


def checkpoint(directory: Path, value: float, seed: int) -> EvaluatedCheckpoint:
    directory.mkdir()
    for step in (20, 40):
        bits = {
            "bits_per_byte": value + 1 / step,
            "windows": 4,
            "given": 8,
            "scored": 8,
            "digest": "d1",
            "is_bound": False,
        }
        record(directory, {"step": step, CONTINUATION: bits})
    draws = value + np.random.default_rng(0).normal(0, 0.1, 200) + np.random.default_rng(seed + 1).normal(0, 0.001, 200)
    return EvaluatedCheckpoint(
        name=directory.name,
        path=directory,
        step=40,
        config={},
        values={BITS_OF_CONTINUATION: value},
        draws={BITS_OF_CONTINUATION: draws},
        examples={BITS_OF_CONTINUATION: "same"},
        held_out=[],
        samples=(),
        answers={},
    )


def test_the_page_has_the_expectation_before_the_result(tmp_path: Path) -> None:
    runs = study_runs(STUDY)
    values = {"a": 2.0, "b": 1.9}
    found = {
        (run.arm, run.seed): checkpoint(tmp_path / run.name, values[run.arm] + 0.001 * (run.seed or 0), run.seed or 0)
        for run in runs
    }
    page = render("mine", STUDY, runs, Results(found, BITS_OF_CONTINUATION), "t5x-like study mine")
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == ["Expected", "Arms", "Result", "Differences", "What this cannot show", "Again"]
    assert re.findall(r'class="verdict \w+">(.*?)<', page) == ["held", "failed"]
    assert re.findall(r'data-chart="(\w+)"', page) == ["executed", "loss", "raw"]
    # In each figure a thin line with the seeds and a thick one with their mean, for both arms.
    assert page.count('class="raw"') == page.count('class="line"') == 6
    assert "Is &lt;b&gt; better than &amp; worse?" in page and "Everything &lt;else&gt;." in page
    assert "<else>" not in page and "<a guess>" not in page
    assert "training.z_loss 0.5" in page and "digest d1, the same for all runs" in page
    assert str(tmp_path) not in page and "<script" not in page


def test_two_seeds_have_no_verdict(tmp_path: Path) -> None:
    runs = study_runs(STUDY, [0, 1])
    found = {(run.arm, run.seed): checkpoint(tmp_path / run.name, 2.0, run.seed or 0) for run in runs}
    page = render("mine", STUDY, runs, Results(found, BITS_OF_CONTINUATION), "t5x-like study mine")
    assert re.findall(r'class="verdict \w+">(.*?)<', page) == ["no verdict", "no verdict"]
