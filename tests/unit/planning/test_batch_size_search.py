"""Search over batch sizes and remat policies: bounded, along the boundary of what fits, with the best of what fits."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.config_examples import example
from helpers.planning_runs import FAMILIES, small_run
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import BatchSizeStage, RunConfig
from t5x_like.hardware.topologies import Topology, parse_topology
from t5x_like.planning.batch_size_search import MAX_TRIALS, POLICIES, Trial, best, policies, search
from t5x_like.planning.estimate.flops import executed_flops
from t5x_like.planning.xla.aot_compile import CompiledStep

TOPOLOGY = parse_topology("v5e:2x2")


class LinearMemory:
    """Compiler whose programs need a fixed number of bytes per row under each policy."""

    def __init__(self, per_row: dict[str, float], limit: float):
        self.per_row, self.limit = per_row, limit

    def needs(self, batch_size: int, remat: str) -> float:
        return batch_size * self.per_row[remat]

    def __call__(self, run: RunConfig, topology: Topology) -> CompiledStep:
        needed = self.needs(run.training.global_batch_size, run.model.remat)
        return CompiledStep(
            step="train",
            work="",
            executed_flops=executed_flops(run),
            topology=topology,
            mesh={"fsdp": 4},
            effort="low",
            seconds=0.0,
            fits=needed <= self.limit,
            limit_bytes=int(self.limit),
            peak_bytes=int(needed),
            traffic_bytes=1,
        )


def trials(run: RunConfig, memory: LinearMemory, max_trials: int = MAX_TRIALS) -> list[Trial]:
    return list(search(run, TOPOLOGY, max_trials=max_trials, compile_step=memory))


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 40), st.integers(1, MAX_TRIALS))
def test_search_is_bounded_and_finds_what_fits(limit: float, max_trials: int) -> None:
    run = example()
    found = policies(run)
    per_row: dict[str, float] = {policy: 2.0 ** (len(found) - 1 - place) for place, policy in enumerate(found)}
    memory = LinearMemory(per_row, limit * run.training.global_batch_size)
    found = trials(run, memory, max_trials)
    assert 1 <= len(found) <= max_trials
    assert len({(trial.batch_size, trial.remat) for trial in found}) == len(found)
    for trial in found:
        assert trial.fits == (memory.needs(trial.batch_size, trial.remat) <= memory.limit)
    if max_trials == MAX_TRIALS and limit >= 1:
        fitting = [trial for trial in found if trial.fits]
        # Each policy's largest batch of the form batch * 2**n is tried, unless a policy before it has fitted it.
        largest = max(trial.batch_size for trial in fitting)
        assert 2 * largest > memory.limit / memory.per_row["full"] or len(found) == max_trials
    chosen = best(found)
    assert (chosen is None) == (not any(trial.fits for trial in found))


def test_among_equal_throughputs_the_policy_that_recomputes_least_wins() -> None:
    run, compiler = example(), LinearMemory(dict.fromkeys(POLICIES, 1.0), 8)
    runs = {remat: dataclasses.replace(run, model=dataclasses.replace(run.model, remat=remat)) for remat in POLICIES}
    found = [Trial(8, remat, compiler(runs[remat], TOPOLOGY)) for remat in reversed(POLICIES)]
    same = [dataclasses.replace(trial, tokens_per_second=5.0) for trial in found]
    chosen = best(same)
    assert chosen is not None and chosen.remat == "none"


@pytest.mark.parametrize("ramp", [False, True])
def test_batch_is_halved_if_nothing_fits(ramp: bool) -> None:
    run = example()
    if ramp:
        stage = BatchSizeStage(until_step=1, batch_size=run.training.global_batch_size)
        run = dataclasses.replace(run, training=dataclasses.replace(run.training, batch_size_ramp=(stage,)))
    found = trials(run, LinearMemory(dict.fromkeys(POLICIES, 1.0), run.training.global_batch_size / 4))
    assert [trial.batch_size for trial in found if trial.remat == "full"][1:] == [
        run.training.global_batch_size // 2,
        run.training.global_batch_size // 4,
    ]
    assert found[-1].fits


def test_each_policy_of_the_search_keeps_less_and_computes_more_again_than_the_one_before() -> None:
    found = {family: policies(small_run(family, width=256)) for family in FAMILIES}
    for family, names in found.items():
        assert names[0] == "none" and names[-1] == "full", family
    # The MLP is the largest part of a layer.
    assert found["llama_3"].index("mlp") < found["llama_3"].index("qkv")
    # Without names of their own, nothing of routed experts is kept by "mlp".
    assert "mlp" not in found["mixtral"]
