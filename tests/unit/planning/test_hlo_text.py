"""Parsing of XLA's text: execution counts of instructions, groups of collectives, and bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.planning.xla.collectives import axes_of, collectives, groups_of
from t5x_like.planning.xla.hlo_text import Instruction, arrays, parse
from t5x_like.planning.xla.memory_report import Buffer, allocated_bytes, live_at_peak, readable_op_name
from t5x_like.planning.xla.memory_traffic import memory_traffic

PROGRAM = (Path(__file__).parent / "step.hlo").read_text()
"""Program written by hand in XLA:TPU's format: a loop of six iterations over stacked layers, on eight devices."""
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def instruction(attributes: str, opcode: str = "all-reduce") -> Instruction:
    return Instruction("x", opcode, tuple(arrays("f32[8]{0}")), (), "", attributes, False)


def test_loop_body_counts_as_often_as_its_condition_allows() -> None:
    counts = parse(PROGRAM).execution_counts()
    assert (counts["main"], counts["body"], counts["condition"], counts["all-reduce-scatter.1"]) == (1, 6, 7, 6)


def test_attributes_of_a_kernel_over_several_lines_end_no_computation() -> None:
    lines = (
        "  %kernel = f32[8,128]{1,0} custom-call(%x), frontend_attributes={kernel_metadata={",
        r'"xprof_metadata":"{\"block_q\": 256}"',
        '}}, metadata={op_name="jit(step)/attention/pallas_call"}',
        "  %own_layer =",
    )
    module, without = parse(PROGRAM.replace(lines[-1], "\n".join(lines))), parse(PROGRAM)
    body = module.computations["body"].instructions
    assert body.keys() == {*without.computations["body"].instructions, "kernel"}
    assert body["kernel"].op_name == "jit(step)/attention/pallas_call"
    assert collectives(module, MESH) == collectives(without, MESH)


def test_a_called_computation_that_is_not_in_the_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="no computation absent"):
        parse(PROGRAM.replace("calls=%slice_of_layer", "calls=%absent")).execution_counts()


def test_loop_without_a_trip_count_in_the_text_counts_once() -> None:
    module = parse(PROGRAM.replace("constant(6)", "parameter(1)"))
    assert module.execution_counts()["body"] == 1
    known = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert parse(known).execution_counts()["body"] == 5


@pytest.mark.parametrize(
    ("shape", "size", "space"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096, 0),
        ("bf16[3]{0:T(256)(128)(2,1)S(1)}", 6, 1),
        ("pred[]", 1, 0),
        ("f8e4m3fn[16]{0}", 16, 0),
        ("s4[3]{0}", 2, 0),
        ("f32[<=4,2]{1,0}", 32, 0),
    ],
)
def test_bytes_of_arrays(shape: str, size: int, space: int) -> None:
    (array,) = arrays(shape)
    assert (array.bytes, array.space) == (size, space)


def test_collectives_by_axis() -> None:
    found = {(each.kind, each.axes): each for each in collectives(parse(PROGRAM), MESH)}
    gathered = found["all-gather", ("data", "fsdp")]
    # Six layers of bf16 [1, 32, 128], of which each device has a quarter.
    assert (gathered.count, gathered.bytes, gathered.sent) == (6, 6 * 8192, 6 * 8192 * 3 / 4)
    scattered = found["reduce-scatter", ("tensor",)]
    assert (scattered.count, scattered.bytes, scattered.sent) == (6, 6 * 4096, 6 * 4096 / 2)
    summed = found["all-reduce", ("tensor",)]
    assert (summed.count, summed.bytes, summed.sent) == (1, 4096, 4096)
    assert found["collective-permute", ("data", "fsdp")].sent == 4096


def test_collectives_across_slices_use_the_network() -> None:
    slices = [device // 4 for device in range(8)]
    found = {(each.kind, each.slices): each for each in collectives(parse(PROGRAM), MESH, slices)}
    sent = found["all-reduce", 2]
    assert (sent.axes, sent.sent_between_slices) == (("data",), 1024)
    # A gather over both slices: each device sends its share of its slice's part.
    gathered = found["all-gather", 2]
    assert gathered.sent_between_slices == pytest.approx(6 * 8192 / 2 / 2)
    assert found["all-reduce", 1].sent_between_slices == 0


def test_asynchronous_collective_in_several_fusions_counts_once() -> None:
    gather = "all-gather(%own_layer), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}"
    chained = gather + ', frontend_attributes={chain_id="0"}'
    copies = "".join(f"  %again.{n} = bf16[1,32,128]{{2,1,0}} {chained}\n" for n in range(3))
    text = PROGRAM.replace(gather, chained).replace("  %share_of_sum", copies + "  %share_of_sum")
    assert text.count(chained) == 4
    assert next(c for c in collectives(parse(text), MESH) if c.kind == "all-gather").count == 6


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x=1", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [(0, 1), (2, 3)]),
        ("replica_groups={}", [(0, 1, 2, 3)]),
        ("channel_id=1", [(0, 1, 2, 3)]),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
    ],
)
def test_group_formats_are_parsed(attributes: str, groups: list[tuple[int, ...]]) -> None:
    assert groups_of(instruction(attributes), 4) == groups


def test_unknown_group_format_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown form"):
        groups_of(instruction("replica_groups=@table"), 4)


@given(st.sets(st.sampled_from(list(MESH)), min_size=1))
def test_axes_of_groups_are_recovered(axes: set[str]) -> None:
    indices = np.arange(8).reshape(tuple(MESH.values()))
    dimensions = [number for number, axis in enumerate(MESH) if axis in axes]
    groups = np.moveaxis(indices, dimensions, range(-len(dimensions), 0)).reshape(-1, 2 ** len(dimensions))
    assert set(axes_of([tuple(group) for group in groups.tolist()], MESH)) == axes


def test_traffic_counts_slices_of_stacked_layers_and_every_iteration() -> None:
    iterations = 6 * (
        2 * 2048 + 4  # A layer's slice is read and written; the counter is read.
        + 2048 + 8192  # Gathered.
        + 4096 + 2048  # Summed and scattered.
    )  # fmt: skip
    compare = 7 * (1 + 2 * 4)
    after = 2 * 4096 + 2 * 4096 + 4096 + 1024 + 4  # Moved, summed, sent with a word beside it.
    assert memory_traffic(parse(PROGRAM)) == iterations + compare + after


def test_buffers_at_the_peak(tmp_path: Path) -> None:
    stem = tmp_path / "module_0000.jit_step.after_optimizations"
    Path(f"{stem}.txt").write_text(PROGRAM)
    Path(f"{stem}-memory-usage-report.txt").write_text(
        "Memory Space: smem (color=2)\nTotal bytes: 8 (8B)\n"
        "Memory Space: default (color=0)\nTotal bytes: 20480 (20KiB)\n"
    )
    Path(f"{stem}-buffer-assignment.txt").write_text(
        "BufferAssignment:\n"
        "allocation 0: size 12288, parameter 0, shape |bf16[6,8,128]| at ShapeIndex {}:\n"
        " value: <1 p.0 @0> (size=12288,offset=0): bf16[6,8,128]{2,1,0:T(8,128)(2,1)}\n"
        "allocation 1: size 8192, preallocated-temp:\n"
        " value: <2 loop{2} (phi) @0> (size=4096,offset=0): f32[8,128]{1,0}\n"
        " value: <3 moved @0> (size=4096,offset=0): f32[8,128]{1,0}\n"
        " value: <4 sum.1 @0> (size=4096,offset=4096): f32[8,128]{1,0}\n"
        "allocation 2: size 64, color 2, preallocated-temp:\n"
        " value: <5 start @0> (size=64,offset=0): s32[]\n"
    )
    Path(f"{stem}-live-range.txt").write_text(
        "HloLiveRange (max 9):\n  Live ranges at 5 (peak):\n"
        "    p.0{}: 12288 bytes (cumulative: 12288 bytes)\n    loop{2}: 4096 bytes (cumulative: 16384 bytes)\n"
        "    moved{}: 4096 bytes (cumulative: 20480 bytes)\n    sum.1{}: 4096 bytes (cumulative: 24576 bytes)\n"
        "    start{}: 4 bytes (cumulative: 24580 bytes)\n  Stack trace breakdown for peak usage: 24580 bytes\n"
    )
    assert allocated_bytes(tmp_path) == 20480
    assert live_at_peak(tmp_path) == [
        Buffer("params/kernel", "bf16[6,8,128]", 1, 12288),
        Buffer("loop", "f32[8,128]", 1, 4096),
        Buffer("sum", "f32[8,128]", 1, 4096),
    ]


def test_missing_reports_give_no_buffers(tmp_path: Path) -> None:
    assert (allocated_bytes(tmp_path), live_at_peak(tmp_path)) == (None, [])


def test_op_names_are_readable() -> None:
    assert readable_op_name("state[\\'opt_state\\'].mu[\\'head\\'][\\'kernel\\']") == "opt_state/mu/head/kernel"
    name = "jit(train)/transpose(jvp())/while/body/closed_call/dot_general"
    assert readable_op_name(name) == "backward/while/body/dot_general"
