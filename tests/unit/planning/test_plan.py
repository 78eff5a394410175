"""Plans as documents: printed, saved, compared with a run, and refused if the step does not fit."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from helpers.planning_runs import small_run
from rich.console import Console

from t5x_like.cli.main import main
from t5x_like.config import RunConfig, ShardingConfig
from t5x_like.config.serialization import to_json
from t5x_like.config.validation import validate
from t5x_like.errors import ConfigError, UserError
from t5x_like.hardware.topologies import parse_topology
from t5x_like.planning.estimate.data_reads import data_reads, verdict
from t5x_like.planning.memory_suggestions import memory_suggestions
from t5x_like.planning.plan import plan_run
from t5x_like.planning.plan_file import differences, read_plan, save_plan
from t5x_like.planning.plan_report import print_plan
from t5x_like.program import build_program


def recipe(tmp_path: Path, run: RunConfig) -> str:
    path = tmp_path / "config.json"
    path.write_text(to_json(run))
    return str(path)


def large_run() -> RunConfig:
    """Return a run whose activations, 8 million tokens of 4 devices, are too large for v5e."""
    return small_run("llama_3", rows=64, length=131_072, dtype="float32", remat="none")


@pytest.mark.parametrize("family", ["t5_1_1", "gemma_2", "mixtral", "bert"])
def test_plan_is_saved_as_json_and_printed(family: str, tmp_path: Path) -> None:
    plan = plan_run(small_run(family, rows=16), parse_topology("v5e:2x4", num_slices=2))
    save_plan(tmp_path / "plan.json", plan.as_dict())
    document = read_plan(tmp_path / "plan.json")
    assert document == json.loads(json.dumps(plan.as_dict()))
    memory = document["memory"]
    assert sum(memory["parts"].values()) == memory["peak_bytes"] == max(memory["moments"].values())
    forward = document["compute"]["forward_parts"]
    assert 3 * sum(forward.values()) == document["compute"]["flops_per_step"]
    parts = document["parameters"]["parts"].values()
    assert sum(part["count"] for part in parts) == document["parameters"]["total"]
    text = io.StringIO()
    print_plan(plan, Console(file=text, width=120))
    output = text.getvalue()
    assert "2 x v5e:2x4: 16 x TPU v5 lite, 2 hosts" in output
    for part in ("Besiroglu et al. 2024", "Hoffmann et al. 2022", "MassiveText", "padding of tiles"):
        assert part in output
    assert ("encoder-decoder overhead" in output) == (family == "t5_1_1")
    assert ("KV cache" in output) == (family != "bert")
    assert "reads: up to" in output and "the data path can feed" in " ".join(output.split())
    assert document["data"]["windows_per_step"] == pytest.approx(8)


def test_data_path_of_an_object_store_is_compared_with_the_machine() -> None:
    run = small_run("llama_3", rows=16)
    assert run.data.store_request_concurrency == 256
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, store_dir="gs://bucket/stores"))
    reads = data_reads(run, hosts=2, seconds_per_step=0.001)
    assert reads is not None and reads.needed == pytest.approx(8000)
    # 256 requests that take 50 ms, of windows that are seldom in two chunks.
    assert reads.available == pytest.approx(256 / 0.05, rel=0.1)
    assert "can feed 63 % of the peak" in verdict(reads) and "store_request_concurrency" in verdict(reads)
    slow = dataclasses.replace(reads, seconds_per_step=0.01)
    assert verdict(slow).endswith("the data path can feed the machine")
    assert verdict(dataclasses.replace(reads, seconds_per_step=None)).startswith("reads: 8 windows per step and host")


def test_unchanged_run_has_no_differences_from_its_plan() -> None:
    run = small_run("llama_3", rows=16)
    planned = plan_run(run).as_dict()
    assert not differences(planned, build_program(run, jax.devices()), jax.devices())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": slice(0, 4)}, "devices: planned 8, found 4"),
        ({"sharding": ShardingConfig(tensor=2)}, "mesh: planned fsdp=8, found fsdp=4 x tensor=2"),
        ({"model": {"vocab_size": 1024}}, "parameters: planned"),
        ({"training": {"global_batch_size": 32}}, "FLOPs per step: planned"),
        ({"training": {"global_batch_size": 32}}, "estimated peak memory: planned"),
    ],
)
def test_differences_from_the_plan_are_reported(change: dict[str, Any], message: str) -> None:
    run = small_run("llama_3", rows=16)
    planned = plan_run(run).as_dict()
    devices = jax.devices()[change.pop("devices", slice(None))]
    for section, fields in change.items():
        value = dataclasses.replace(getattr(run, section), **fields) if isinstance(fields, dict) else fields
        run = dataclasses.replace(run, **{section: value})
    assert any(line.startswith(message) for line in differences(planned, build_program(run, devices), devices))


def test_another_machine_than_planned_is_reported() -> None:
    run = small_run("llama_3", rows=16)
    planned = plan_run(run, parse_topology("v5e:2x4")).as_dict()
    found = differences(planned, build_program(run, jax.devices()), jax.devices())
    assert "kind of device: planned v5e, found cpu" in found


def test_files_that_are_not_plans_are_refused(tmp_path: Path) -> None:
    for text, message in (("{", "no valid JSON"), ("{}", "version None"), ("[]", "version None")):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_plan(tmp_path / "plan.json")
    with pytest.raises(ConfigError, match="plan --save"):
        read_plan(tmp_path / "nothing.json")


def test_unwritable_plan_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "plan.json"):
        with pytest.raises(UserError, match="the plan cannot be written"):
            save_plan(path, {})
    assert not list(tmp_path.parent.glob(".*.partial"))


def test_plan_command_prints_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, small_run("t5_1_1", rows=16))
    options = ["--topology", "v5e:4x4", "--no-compile", "--save", str(tmp_path / "p.json")]
    assert main(["plan", path, *options, "--json", "--shardings"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "p.json").read_text())
    assert document["mesh"]["fsdp"] == 16
    arrays = document["shardings"]["parameters"]
    parameter_bytes = document["memory"]["parts"]["parameters"]
    assert sum(array["bytes_per_device"] for array in arrays) == parameter_bytes


def test_step_that_does_not_fit_is_refused_with_three_suggestions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = large_run()
    assert main(["plan", recipe(tmp_path, run), "--topology", "v5e:2x2", "--no-compile"]) == 2
    captured = capsys.readouterr()
    assert "does not fit" in captured.out
    lines = captured.err.strip().splitlines()
    assert "the step does not fit: found an estimated peak of" in lines[0]
    assert len(lines) == 4
    assert all(line.strip().startswith("--") and "iB, " in line for line in lines[1:])


def test_suggestions_are_valid_runs_that_need_less_memory() -> None:
    run = large_run()
    topology = parse_topology("v5e:2x2")
    before = plan_run(run, topology).memory.peak_bytes
    for suggestion in memory_suggestions(run)[:3]:
        assert suggestion.run is not None
        assert not validate(suggestion.run)
        assert plan_run(suggestion.run, topology).memory.peak_bytes < before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "v5e:3x3"], "one of v5e:1x1"),
        (["--num-slices", "2"], "expected --topology"),
        (["--devices", "4", "--num-slices", "2"], "expected --topology"),
        (["--topology", "v5e:2x2", "--devices", "4"], "remove --devices"),
        (["--topology", "v5e:4x4", "--training.global-batch-size", "8"], "a multiple of 16"),
    ],
)
def test_errors_state_how_to_fix_them(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", recipe(tmp_path, small_run("llama_3", rows=16)), *options]) == 2
    assert message in capsys.readouterr().err
