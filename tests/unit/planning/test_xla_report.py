"""Report of a compiled step, and behavior without a compiler. XLA's own output is tested in tests/aot."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json

import pytest
from helpers.config_examples import example
from rich.console import Console

from t5x_like.cli.plan import add_compile_options, compile_steps
from t5x_like.config import RunConfig
from t5x_like.config.overrides import apply_overrides
from t5x_like.config.validation import validate
from t5x_like.errors import ConfigError, UserError
from t5x_like.hardware.topologies import parse_topology
from t5x_like.planning.memory_suggestions import memory_suggestions
from t5x_like.planning.xla import libtpu
from t5x_like.planning.xla.aot_compile import CompiledStep, _required_bytes
from t5x_like.planning.xla.collectives import Collective
from t5x_like.planning.xla.compile_report import as_dict, print_compiled
from t5x_like.planning.xla.memory_report import Buffer
from t5x_like.planning.xla.roofline import roofline

FITS = CompiledStep(
    step="train",
    work="8 rows, remat full",
    executed_flops=2 * 4 * 197e12,
    topology=parse_topology("v5e:2x2", num_slices=1),
    mesh={"data": 1, "fsdp": 4},
    effort="low",
    seconds=3.0,
    fits=True,
    limit_bytes=16 * 2**30,
    peak_bytes=12 * 2**30,
    argument_bytes=2**30,
    buffers=(Buffer("params/head/kernel", "f32[8,128]", 2, 8192),),
    collectives=(
        Collective("all-gather", ("fsdp",), 1, 6, 100, 200e9, 0.0),
        Collective("all-reduce", ("data",), 2, 6, 100, 6.25e9, 6.25e9),
    ),
    traffic_bytes=int(819e9),
)
REFUSED = dataclasses.replace(
    FITS,
    fits=False,
    peak_bytes=246 * 2**30,
    error="RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (246.00G) "
    "exceeds available HBM (15.75G).",
)


def printed(run: RunConfig, compiled: CompiledStep) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_compiled(run, compiled, console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_compile_options(parser)
    return parser.parse_args(arguments)


def test_roofline_is_the_longest_of_its_parts() -> None:
    found = roofline(FITS)
    assert found.parts == pytest.approx({"compute": 2.0, "memory": 1.0, "links": 1.0, "network": 2.0})
    assert (found.min_seconds, found.without_overlap) == pytest.approx((2.0, 6.0))


def test_report_of_a_fitting_step_shows_free_memory() -> None:
    output = printed(example(), FITS)
    assert "fits: peak 12.0 GiB of 16.0 GiB per device (75%), 4.00 GiB left" in output
    assert "f32[8,128]" in output and "params/head/kernel" in output
    assert "2 slices" in output and "Not a measurement" in output
    assert json.loads(json.dumps(as_dict(FITS)))["fits"] is True


def test_report_of_a_refused_step_has_xlas_error_and_three_suggestions() -> None:
    output = printed(example(), REFUSED)
    assert "exceeds available HBM (15.75G)" in output
    assert len(output.partition("Change one of:")[2].strip().splitlines()) == 3


def test_every_suggestion_is_a_valid_override() -> None:
    run = example()
    suggestions = memory_suggestions(run)
    assert len(suggestions) >= 4
    for suggestion in suggestions[:-1]:
        option, value = suggestion.option.split()
        assert not validate(apply_overrides(run, [option, value]))


def test_changes_already_made_are_not_suggested() -> None:
    run = example()
    model = dataclasses.replace(run.model, remat="offload", dtype="bfloat16")
    sharding = dataclasses.replace(run.sharding, optimizer_state_memory="host")
    run = dataclasses.replace(run, model=model, sharding=sharding)
    found = " ".join(suggestion.option for suggestion in memory_suggestions(run))
    assert not any(name in found for name in ("remat", "dtype", "optimizer-state-memory"))
    full = dataclasses.replace(run, model=dataclasses.replace(model, remat="full"))
    assert "--model.remat offload" in [suggestion.option for suggestion in memory_suggestions(full)]


@pytest.mark.parametrize(
    ("error", "required"),
    [
        (REFUSED.error, 246 * 2**30),
        (
            "Ran out of memory in memory space hbm. Used 106.50G of 15.75G hbm. Exceeded capacity by 90.75G.",
            106.5 * 2**30,
        ),
        ("Used 512.00M of 256.00M hbm.", 2**29),
        ("something else", None),
    ],
)
def test_required_memory_is_read_from_xlas_error(error: str, required: float | None) -> None:
    assert _required_bytes(error) == required


def test_missing_compiler_is_reported_with_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libtpu, "compiler_is_installed", lambda: False)
    console = Console(file=io.StringIO(), width=160)
    assert compile_steps(example(), parse_topology("v5e:2x2"), options(), console, 0) == {}
    assert "pip install 't5x-like[tpu]'" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="libtpu"):
        libtpu.compiler_devices(parse_topology("v5e:2x2"))


def test_decode_without_a_decoder_is_refused_before_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libtpu, "compiler_is_installed", lambda: True)
    monkeypatch.setattr(
        "t5x_like.planning.xla.aot_compile.compile_train_step", lambda *_, **__: pytest.fail("compiled")
    )
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match=r"model\.decoder"):
        compile_steps(example("encoder"), parse_topology("v5e:2x2"), options("--decode"), console, 0)


def test_non_tpu_topologies_and_no_compile_skip_compilation() -> None:
    console = Console(file=io.StringIO(), width=160)
    assert compile_steps(example(), parse_topology("v5e:2x2"), options("--no-compile"), console, 0) == {}
    assert compile_steps(example(), parse_topology("h100:8"), options(), console, 0) == {}
    assert compile_steps(example(), None, options("--search-batch-size"), console, 0) == {}
    assert "--topology of TPUs" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="TPUs"):
        libtpu.compiler_devices(parse_topology("h100:8"))
