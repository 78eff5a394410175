"""What is said of a compiled step, and where there is no compiler. What XLA itself says is tested in tests/aot."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json

import pytest
from config_examples import example
from rich.console import Console

from t5x_like.commands.compiling import add_compile_options, compile_ahead
from t5x_like.config import ConfigError, RunConfig, UserError
from t5x_like.config.recipes import apply_overrides
from t5x_like.config.validate import validate
from t5x_like.planning import compiler
from t5x_like.planning.buffers import Buffer
from t5x_like.planning.collectives import Collective
from t5x_like.planning.compile import Compiled, _needed
from t5x_like.planning.compiled_report import as_dict, print_compiled, readable
from t5x_like.planning.knobs import knobs
from t5x_like.planning.roofline import roofline
from t5x_like.planning.topologies import parse_topology

FITS = Compiled(
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
    words="RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (246.00G) "
    "exceeds available HBM (15.75G).",
)


def printed(run: RunConfig, compiled: Compiled) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_compiled(run, compiled, console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_compile_options(parser)
    return parser.parse_args(arguments)


def test_the_roofline_is_the_longest_of_its_parts() -> None:
    found = roofline(FITS)
    assert found.parts == pytest.approx({"compute": 2.0, "memory": 1.0, "links": 1.0, "network": 2.0})
    assert (found.least, found.without_overlap) == pytest.approx((2.0, 6.0))


def test_a_step_that_fits_is_told_with_its_room() -> None:
    said = printed(example(), FITS)
    assert "fits: peak 12.00 GiB of 16.00 GiB per device (75%), 4.00 GiB left" in said
    assert "f32[8,128]" in said and "params/head/kernel" in said
    assert "2 slices" in said and "Not a measurement" in said
    assert json.loads(json.dumps(as_dict(FITS)))["fits"] is True


def test_a_refused_step_is_told_in_the_compilers_words_with_three_knobs() -> None:
    said = printed(example(), REFUSED)
    assert "exceeds available HBM (15.75G)" in said
    assert len(said.partition("Three knobs to turn:")[2].strip().splitlines()) == 3


def test_every_knob_is_a_sound_override() -> None:
    run = example()
    offered = knobs(run)
    assert len(offered) >= 4
    for knob in offered[:-1]:
        option, value = knob.option.split()
        assert not validate(apply_overrides(run, [option, value]))


def test_knobs_that_are_turned_already_are_not_offered() -> None:
    run = example()
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, remat="full", dtype="bfloat16"))
    assert not any("remat" in knob.option or "dtype" in knob.option for knob in knobs(run))


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (REFUSED.words, 246 * 2**30),
        (
            "Ran out of memory in memory space hbm. Used 106.50G of 15.75G hbm. Exceeded capacity by 90.75G.",
            106.5 * 2**30,
        ),
        ("Used 512.00M of 256.00M hbm.", 2**29),
        ("something else", None),
    ],
)
def test_the_compilers_figures_are_read(words: str, needed: float | None) -> None:
    assert _needed(words) == needed


def test_sizes_have_the_unit_that_suits_them() -> None:
    assert [readable(size) for size in (0, 512, 2**20, 3 * 2**29)] == ["0.00 KiB", "0.50 KiB", "1.00 MiB", "1.50 GiB"]


def test_without_the_compiler_a_plan_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compiler_is_installed", lambda: False)
    console = Console(file=io.StringIO(), width=160)
    assert compile_ahead(example(), parse_topology("v5e:2x2"), options(), console) == {}
    assert "pip install 't5x-like[tpu]'" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="libtpu"):
        compiler.compiler_devices(parse_topology("v5e:2x2"))


def test_what_cannot_be_decoded_is_refused_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compiler_is_installed", lambda: True)
    monkeypatch.setattr("t5x_like.planning.compile.compile_train_step", lambda *_, **__: pytest.fail("compiled"))
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match=r"model\.decoder"):
        compile_ahead(example("encoder"), parse_topology("v5e:2x2"), options("--decode"), console)


def test_other_machines_and_no_compile_compile_nothing() -> None:
    console = Console(file=io.StringIO(), width=160)
    assert compile_ahead(example(), parse_topology("v5e:2x2"), options("--no-compile"), console) == {}
    assert compile_ahead(example(), parse_topology("h100:8"), options(), console) == {}
    assert compile_ahead(example(), None, options("--search"), console) == {}
    assert "--topology of TPUs" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="TPUs"):
        compiler.compiler_devices(parse_topology("h100:8"))
