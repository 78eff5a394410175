"""The walk over batch sizes and policies: bounded, down the staircase, and the best of what fits."""

from __future__ import annotations

import dataclasses

from config_examples import example
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import RunConfig
from t5x_like.planning.compile import Compiled
from t5x_like.planning.search import POLICIES, TRIALS, Trial, best, search
from t5x_like.planning.topologies import Topology, parse_topology

TOPOLOGY = parse_topology("v5e:2x2")


class Law:
    """A compiler whose programs need so many bytes a row under each policy."""

    def __init__(self, per_row: dict[str, float], limit: float):
        self.per_row, self.limit = per_row, limit

    def needs(self, batch_size: int, remat: str) -> float:
        return batch_size * self.per_row[remat]

    def __call__(self, run: RunConfig, topology: Topology) -> Compiled:
        needed = self.needs(run.training.batch_size, run.model.remat)
        return Compiled(
            step="train",
            work="",
            executed_flops=1e12,
            topology=topology,
            mesh={"fsdp": 4},
            effort="low",
            seconds=0.0,
            fits=needed <= self.limit,
            limit_bytes=int(self.limit),
            peak_bytes=int(needed),
            traffic_bytes=1,
        )


def trials(run: RunConfig, law: Law, most: int = TRIALS) -> list[Trial]:
    return list(search(run, TOPOLOGY, most=most, compile_step=law))


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 40), st.integers(1, TRIALS))
def test_the_walk_is_bounded_and_finds_what_fits(limit: float, most: int) -> None:
    run = example()
    law = Law({"none": 4.0, "dots": 2.0, "full": 1.0}, limit * run.training.batch_size)
    found = trials(run, law, most)
    assert 1 <= len(found) <= most
    assert len({(trial.batch_size, trial.remat) for trial in found}) == len(found)
    for trial in found:
        assert trial.fits == (law.needs(trial.batch_size, trial.remat) <= law.limit)
    if most == TRIALS and limit >= 1:
        fitting = [trial for trial in found if trial.fits]
        # Each policy's largest batch of the form batch * 2**n is known, unless a lighter policy takes it already.
        largest = max(trial.batch_size for trial in fitting)
        assert 2 * largest > law.limit / law.per_row["full"] or len(found) == most
    chosen = best(found)
    assert (chosen is None) == (not any(trial.fits for trial in found))


def test_equal_rates_are_won_by_what_recomputes_least() -> None:
    found = [Trial(8, remat, Law(dict.fromkeys(POLICIES, 1.0), 8)(example(), TOPOLOGY)) for remat in reversed(POLICIES)]
    same = [dataclasses.replace(trial, tokens_per_second=5.0) for trial in found]
    chosen = best(same)
    assert chosen is not None and chosen.remat == "none"


def test_where_nothing_fits_the_batch_is_halved() -> None:
    run = example()
    found = trials(run, Law(dict.fromkeys(POLICIES, 1.0), run.training.batch_size / 4))
    assert [trial.batch_size for trial in found if trial.remat == "full"][1:] == [
        run.training.batch_size // 2,
        run.training.batch_size // 4,
    ]
    assert found[-1].fits
