"""Saved plans, and the differences between a plan and the run that is started from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_like.errors import ConfigError, ConfigProblem, UserError
from t5x_like.hardware.topologies import accelerator_of
from t5x_like.planning.estimate.flops import training_flops
from t5x_like.planning.estimate.parameters import total
from t5x_like.planning.plan import VERSION, machine_of_devices, plan_program
from t5x_like.program import Program
from t5x_like.utils import formatting
from t5x_like.utils.atomic_write import write_atomically
from t5x_like.utils.json_reader import read_json

PLAN = "plan.json"
"""File name in a run directory."""
_REQUIRED_KEYS = {"machine", "mesh", "parameters", "memory", "compute"}
_TOLERANCE = 0.01
"""Relative difference below which byte counts are equal: drivers and versions of the estimate differ slightly."""


def save_plan(path: Path, document: Mapping[str, Any]) -> None:
    """Write a plan atomically.

    Raises:
      UserError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: the plan cannot be written: {error.strerror or error}") from None


def read_plan(path: Path) -> dict[str, Any]:
    """Read a saved plan.

    Raises:
      ConfigError: The file does not exist, or it was not written by this version.
    """
    expected = "a plan written by `t5x-like plan --save`"
    try:
        document = read_json(path)
    except OSError as error:
        raise ConfigError([ConfigProblem(str(path), f"no readable file ({error.strerror})", expected)]) from None
    except ValueError:
        raise ConfigError([ConfigProblem(str(path), "no valid JSON", expected)]) from None
    version = document.get("version") if isinstance(document, dict) else None
    if version != VERSION or not _REQUIRED_KEYS <= document.keys():
        raise ConfigError([ConfigProblem(str(path), f"version {version!r}", f"{expected}, of version {VERSION}")])
    return document


def differences(planned: Mapping[str, Any], program: Program, devices: Sequence[Any]) -> list[str]:
    """Return the differences between a run and its plan, a sentence each; an empty list if there are none."""
    return list(_differences(planned, program, devices))


def _differences(planned: Mapping[str, Any], program: Program, devices: Sequence[Any]) -> Iterator[str]:
    actual = plan_program(program, machine_of_devices(devices))
    planned_machine, machine = planned["machine"], actual.machine
    peak = planned["memory"]["peak_bytes"]
    exactly = {
        "devices": (planned_machine["devices"], machine.devices),
        "kind of device": (_accelerator_name(planned_machine["device_kind"]), _accelerator_name(machine.device_kind)),
        "processes": (planned_machine["processes"], machine.processes),
        "mesh": (_axes(planned["mesh"]), _axes(program.mesh.shape)),
        "parameters": (f"{planned['parameters']['total']:,}", f"{total(actual.parts).count:,}"),
        "trained parameters": (f"{planned['parameters']['trained']:,}", f"{actual.trained:,}"),
        "FLOPs per step": (
            formatting.flops(planned["compute"]["flops_per_step"]),
            formatting.flops(training_flops(program.run)),
        ),
    }
    nearly = {"estimated peak memory": (peak, actual.memory.peak_bytes)}
    if planned_machine["usable_bytes"] and machine.usable_bytes:
        nearly["memory of a device"] = (planned_machine["usable_bytes"], machine.usable_bytes)
    for name, (before, now) in exactly.items():
        if before != now:
            yield f"{name}: planned {before}, found {now}"
    for name, (before, now) in nearly.items():
        if abs(now - before) > _TOLERANCE * before:
            yield f"{name}: planned {formatting.size(before)}, found {formatting.size(now)}"
    if machine.usable_bytes and peak > machine.usable_bytes:
        yield (
            f"the planned peak of {formatting.size(peak)} is more than a program can use on a device here, "
            f"{formatting.size(machine.usable_bytes)}"
        )


def _accelerator_name(device_kind: str) -> str:
    """Return the name of a device kind in the table of accelerators: drivers name the same card differently."""
    known = accelerator_of(device_kind)
    return device_kind if known is None else known.name


def _axes(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"
