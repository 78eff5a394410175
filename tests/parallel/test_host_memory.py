"""Optimizer state and activations in the memory of the hosts: the same numbers, in another place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.training_examples import batch_of, run_with

from t5x_like.checkpoints.fingerprints import fingerprints, fingerprints_of_whole_arrays, weighted
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig, RunConfig, ShardingConfig
from t5x_like.errors import ConfigError
from t5x_like.hardware.fake_devices import FakeClient, FakeDevice, FakeMemory, fake_devices
from t5x_like.hardware.topologies import parse_topology
from t5x_like.planning.plan import plan_run
from t5x_like.program import build_program
from t5x_like.sharding.host_memory import HOST, host_memory_problems, is_on_host
from t5x_like.sharding.mesh import make_mesh
from t5x_like.trainer.replay_check import ReplayCheck
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree


def run_on(memory: str, devices: int = 2, **training: object) -> RunConfig:
    run = run_with(**training)
    sharding = ShardingConfig(fsdp=devices, optimizer_state_memory="host" if memory == "host" else "device")
    remat = "offload" if memory == "host" else "full"
    stack = dataclasses.replace(run.model.decoder, num_layers=2)  # type: ignore[type-var]
    return dataclasses.replace(run, sharding=sharding, model=dataclasses.replace(run.model, remat=remat, decoder=stack))


def host_copy(state: PyTree) -> PyTree:
    return jax.tree.map(np.asarray, state)


def test_steps_are_the_same_and_the_state_stays_on_the_host(tmp_path: Path) -> None:
    programs = {memory: build_program(run_on(memory), jax.devices()[:2]) for memory in ("host", "device")}
    states = {memory: program.init() for memory, program in programs.items()}
    for seed in range(2):
        for memory, program in programs.items():
            states[memory], _ = program.train_step(states[memory], program.shard_global_batch(batch_of(seed)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *map(host_copy, states.values()))
    kept = tree_paths.by_path(states["host"])
    placed = {path for path, leaf in kept.items() if is_on_host(leaf)}
    assert placed == {path for path, leaf in kept.items() if path.startswith("opt_state/") and leaf.ndim >= 2}
    assert placed and not any(map(is_on_host, jax.tree.leaves(states["device"])))

    # Checkpoints hold the same bits, and either program restores them to its own memory.
    program, state = programs["host"], states["host"]
    assert fingerprints(kept) == {
        path: f"{value:08x}"
        for path, value in zip(kept, fingerprints_of_whole_arrays([*kept.values()], weighted).tolist(), strict=True)
    }
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    manager.save(2, state, {})
    for memory, target in programs.items():
        _, restored, _ = manager.restore(target.abstract_state)
        jax.tree.map(np.testing.assert_array_equal, host_copy(restored), host_copy(state))
        assert is_on_host(restored["opt_state"].mu["token_embedder"]["embedding"]) == (memory == "host")
        states[memory] = restored
    manager.close()
    batch = program.shard_global_batch(batch_of(2))
    replayed, _ = ReplayCheck(1, program.train_step, program.mesh).run(3, states["host"], batch)
    expected, _ = programs["device"].train_step(states["device"], programs["device"].shard_global_batch(batch_of(2)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), host_copy(replayed), host_copy(expected)
    )


class NearDevice(FakeDevice):
    """Device that does not reach the memory of its host."""

    def addressable_memories(self) -> list[FakeMemory]:
        return [FakeMemory("device")]


def test_devices_without_host_memory_are_refused_before_compilation() -> None:
    devices = [NearDevice(**dataclasses.asdict(each)) for each in fake_devices(parse_topology("h100:2"))]
    build_program(run_on("device"), devices)
    with pytest.raises(ConfigError, match=HOST) as refused:
        build_program(run_on("host"), devices)
    assert [problem.where for problem in refused.value.problems] == ["sharding.optimizer_state_memory", "model.remat"]


class FarDevice(NearDevice):
    """Device of another process, for which a program is compiled ahead of time."""

    @property
    def client(self) -> FakeClient:
        return FakeClient(self.process_index + 1)


def test_devices_of_other_processes_are_checked() -> None:
    devices = [FarDevice(**dataclasses.asdict(each)) for each in fake_devices(parse_topology("h100:2"))]
    run = run_on("host")
    problems = host_memory_problems(run, make_mesh(run.sharding, devices))
    assert [problem.where for problem in problems] == ["sharding.optimizer_state_memory", "model.remat"]


def test_plan_counts_host_and_device_apart() -> None:
    topology = parse_topology("h100:2")
    host, device = (plan_run(run_on(memory), topology) for memory in ("host", "device"))
    moved = host.memory.host["optimizer state"]
    left = host.memory.state.get("optimizer state", 0)
    assert moved + left == device.memory.state["optimizer state"] and not device.memory.host
    assert host.memory.moments["update"]["optimizer state from the host"] == moved
    # The inputs of two layers [rows, length, d] in float32, split over two devices.
    assert host.memory.host["saved activations"] == 2 * 8 * 5 * 8 * 4 // 2
    document = host.as_dict()["memory"]
    assert document["host_bytes"] == 2 * sum(document["host_parts"].values())
    assert host.memory.moments["head"]["saved activations"] < device.memory.moments["head"]["saved activations"]


def test_bfloat16_parameters_take_two_bytes() -> None:
    topology = parse_topology("h100:1")
    wide, narrow = (plan_run(run_on("device", 1, parameter_type=kind), topology) for kind in ("float32", "bfloat16"))
    for plan, size in ((wide, 4), (narrow, 2)):
        count = sum(part.count for part in plan.parts.values())
        assert plan.memory.state["parameters"] == plan.memory.gradients == size * count
        assert sum(part.bytes_per_device for part in plan.parts.values()) == size * count
    assert wide.memory.state["optimizer state"] == narrow.memory.state["optimizer state"]
    parts = plan_run(run_on("device", 1, parameter_type="bfloat16", gradient_accumulation_steps=2), topology)
    assert parts.memory.moments["layers"]["sums of gradients"] == 2 * parts.memory.gradients


def test_parameters_are_rounded_alike_on_every_mesh() -> None:
    found = []
    for devices in (1, 2):
        run = run_on("device", devices, parameter_type="bfloat16", optimizer_state_type="bfloat16")
        program = build_program(run, jax.devices()[:devices])
        state = program.init()
        for seed in range(3):
            state, _ = program.train_step(state, program.shard_global_batch(batch_of(seed)))
        found.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(host_copy(state["params"]))]))
    one, two = (values.astype(np.float64) for values in found)
    # Sums of other order differ by 1e-7. Only where a number falls between the two is it rounded to the other side.
    assert np.mean(one != two) < 0.01
    np.testing.assert_allclose(one, two, rtol=0.05, atol=0.05)
