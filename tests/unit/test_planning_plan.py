"""Plans as documents: printed, saved, compared with what a run finds, and refused where they do not fit."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from planning_runs import small_run
from rich.console import Console

from t5x_like.cli import main
from t5x_like.config import ConfigError, PartitioningConfig, RunConfig, UserError
from t5x_like.config.serialization import to_json
from t5x_like.config.validate import validate
from t5x_like.planning.knobs import knobs
from t5x_like.planning.plan import plan_run
from t5x_like.planning.report import print_plan
from t5x_like.planning.saved import differences, read_plan, save_plan
from t5x_like.planning.topologies import parse_topology
from t5x_like.program import assemble


def recipe(tmp_path: Path, run: RunConfig) -> str:
    path = tmp_path / "config.json"
    path.write_text(to_json(run))
    return str(path)


def large_run() -> RunConfig:
    """Too much for v5e: logits of 16 x 16 x 4096 x 512 numbers."""
    return small_run("llama_3", rows=16, length=131_072, dtype="float32", remat="none")


@pytest.mark.parametrize("family", ["t5_1_1", "gemma_2", "mixtral", "bert"])
def test_a_plan_is_a_document_and_a_text(family: str, tmp_path: Path) -> None:
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
    said = text.getvalue()
    assert "2 x v5e:2x4: 16 x TPU v5 lite, 2 hosts" in said
    for part in ("Besiroglu et al. 2024", "Hoffmann et al. 2022", "MassiveText", "padding of tiles"):
        assert part in said
    assert ("encoder-decoder premium" in said) == (family == "t5_1_1")
    assert ("keys and values" in said) == (family != "bert")


def test_what_is_as_planned_has_no_differences() -> None:
    run = small_run("llama_3", rows=16)
    planned = plan_run(run).as_dict()
    assert not differences(planned, assemble(run, jax.devices()), jax.devices())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"devices": slice(0, 4)}, "devices: planned 8, found 4"),
        ({"partitioning": PartitioningConfig(tensor=2)}, "mesh: planned fsdp=8, found fsdp=4 x tensor=2"),
        ({"model": {"vocab_size": 1024}}, "parameters: planned"),
        ({"training": {"batch_size": 32}}, "operations of a step: planned"),
        ({"training": {"batch_size": 32}}, "estimated peak memory: planned"),
    ],
)
def test_what_is_not_as_planned_is_said(change: dict[str, Any], said: str) -> None:
    run = small_run("llama_3", rows=16)
    planned = plan_run(run).as_dict()
    devices = jax.devices()[change.pop("devices", slice(None))]
    for section, fields in change.items():
        value = dataclasses.replace(getattr(run, section), **fields) if isinstance(fields, dict) else fields
        run = dataclasses.replace(run, **{section: value})
    assert any(line.startswith(said) for line in differences(planned, assemble(run, devices), devices))


def test_another_machine_than_planned_is_said() -> None:
    run = small_run("llama_3", rows=16)
    planned = plan_run(run, parse_topology("v5e:2x4")).as_dict()
    found = differences(planned, assemble(run, jax.devices()), jax.devices())
    assert "kind of device: planned v5e, found cpu" in found


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    for text, said in (("{", "no JSON"), ("{}", "version None"), ("[]", "version None")):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_plan(tmp_path / "plan.json")
    with pytest.raises(ConfigError, match="plan --save"):
        read_plan(tmp_path / "nothing.json")


def test_a_plan_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "plan.json"):
        with pytest.raises(UserError, match="the plan cannot be written"):
            save_plan(path, {})
    assert not list(tmp_path.parent.glob(".*.partial"))


def test_the_command_prints_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, small_run("t5_1_1", rows=16))
    options = ["--topology", "v5e:4x4", "--no-compile", "--save", str(tmp_path / "p.json")]
    assert main(["plan", path, *options, "--json", "--shardings"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "p.json").read_text())
    assert document["mesh"]["fsdp"] == 16
    rows = document["shardings"]["parameters"]
    held = document["memory"]["parts"]["parameters"]
    assert sum(row["bytes_per_device"] for row in rows) == held


def test_a_step_that_does_not_fit_is_refused_with_three_knobs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = large_run()
    assert main(["plan", recipe(tmp_path, run), "--topology", "v5e:2x2", "--no-compile"]) == 2
    captured = capsys.readouterr()
    assert "does not fit" in captured.out
    lines = captured.err.strip().splitlines()
    assert "the step does not fit: an estimated peak of" in lines[0]
    assert len(lines) == 4
    assert all(line.strip().startswith("--") and "iB, " in line for line in lines[1:])


def test_knobs_are_sound_runs_that_need_less() -> None:
    run = large_run()
    topology = parse_topology("v5e:2x2")
    before = plan_run(run, topology).memory.peak_bytes
    for knob in knobs(run)[:3]:
        assert knob.run is not None
        assert not validate(knob.run)
        assert plan_run(knob.run, topology).memory.peak_bytes < before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--topology", "v5e:3x3"], "one of v5e:1x1"),
        (["--num-slices", "2"], "expected --topology"),
        (["--devices", "4", "--num-slices", "2"], "expected --topology"),
        (["--topology", "v5e:2x2", "--devices", "4"], "drop --devices"),
        (["--topology", "v5e:4x4", "--training.batch-size", "8"], "a multiple of 16"),
    ],
)
def test_refusals_say_what_to_do(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", recipe(tmp_path, small_run("llama_3", rows=16)), *options]) == 2
    assert said in capsys.readouterr().err
