"""Rows of the steps of a run whose batches grow, and what a ramp must not be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers.data_examples import data_config, numbered_store
from helpers.training_examples import run_with

from t5x_like.config import BatchSizes, BatchSizeStage, RatePhaseConfig, SeqioConfig, batch_sizes
from t5x_like.config.validation import validate
from t5x_like.data.stream.row_stream import TrainingStream


@pytest.mark.parametrize("stages", [(), ((3, 2),), ((1, 1), (5, 2), (6, 7))])
def test_rows_before_a_step_are_those_of_all_earlier_ones(stages: tuple[tuple[int, int], ...]) -> None:
    sizes = BatchSizes(8, stages)
    for step in range(12):
        assert sizes.rows_before(step) == sum(map(sizes.at, range(step)))
        assert sizes.in_full_batches(step) == sizes.rows_before(step) / 8
        assert {sizes.step_of(row) for row in range(sizes.rows_before(step), sizes.rows_before(step + 1))} == {step}
        alike = sizes.steps_alike(step)
        steps = range(step, 20 if alike is None else step + alike)
        assert len({sizes.at(each) for each in steps}) == 1 and (
            alike is None or sizes.at(step + alike) != sizes.at(step)
        )
    rows = np.arange(sizes.rows_before(12))
    assert sizes.step_of(rows).tolist() == [sizes.step_of(int(row)) for row in rows]


def test_rates_change_at_their_step_within_a_ramp(tmp_path) -> None:
    data = data_config()
    names = [objective.name for objective in data.objectives]
    phase = RatePhaseConfig(start_step=4, objectives=((names[0], 3.0),))
    data = dataclasses.replace(data, rate_schedule=(phase,))
    stream = TrainingStream([numbered_store(tmp_path / "s", 3000)], data, BatchSizes(8, ((3, 2),)))
    assert [phase.first_row for phase in stream._phases] == [0, 3 * 2 + 8]


def test_ramps_that_cannot_be_run_are_refused() -> None:
    stages = (BatchSizeStage(until_step=5, batch_size=4), BatchSizeStage(until_step=5, batch_size=3))
    run = run_with(batch_size_ramp=stages, gradient_accumulation_steps=2)
    found = [str(problem) for problem in validate(run) if "ramp" in str(problem)]
    assert len(found) == 2 and "a step after 5" in found[0] and "a multiple of" in found[1], found
    stages = (BatchSizeStage(until_step=2, batch_size=2), BatchSizeStage(until_step=4, batch_size=4))
    right = run_with(batch_size_ramp=stages)
    assert batch_sizes(right.training) == BatchSizes(8, ((2, 2), (4, 4)))
    assert not [problem for problem in validate(right) if "ramp" in str(problem)]
    large = run_with(batch_size_ramp=(BatchSizeStage(until_step=1, batch_size=16),))
    assert any("at most training.global_batch_size" in str(problem) for problem in validate(large))
    live = dataclasses.replace(
        right,
        data=dataclasses.replace(run.data, mixture=(), seqio=SeqioConfig(mixture_or_task="task")),
    )
    assert any("batch_size_ramp" in str(problem) and "data.seqio" in str(problem) for problem in validate(live))
