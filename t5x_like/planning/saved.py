"""Plans in files, and what a run finds that is not as it was planned."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_like.config import ConfigError, Problem, UserError
from t5x_like.monitoring import formats
from t5x_like.planning.flops import training_flops
from t5x_like.planning.parameters import total
from t5x_like.planning.plan import VERSION, machine_of_devices, plan_program
from t5x_like.planning.topologies import accelerator_of
from t5x_like.program import Program

PLAN = "plan.json"
"""In a run's directory."""
_NEEDED = {"machine", "mesh", "parameters", "memory", "compute"}
_CLOSE = 0.01
"""Bytes that differ by less are the same: drivers and estimates of other versions do not agree to the byte."""


def save_plan(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a plan, whole or not at all.

    Raises:
      UserError: it cannot be written there.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: the plan cannot be written: {error.strerror or error}") from None


def read_plan(path: Path) -> dict[str, Any]:
    """A saved plan.

    Raises:
      ConfigError: there is none, or it is not one that this version writes.
    """
    expected = "a plan written by `t5x-like plan --save`"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([Problem(str(path), f"no readable file ({error.strerror})", expected)]) from None
    except ValueError:
        raise ConfigError([Problem(str(path), "no JSON", expected)]) from None
    version = document.get("version") if isinstance(document, dict) else None
    if version != VERSION or not _NEEDED <= document.keys():
        raise ConfigError([Problem(str(path), f"version {version!r}", f"{expected}, of version {VERSION}")])
    return document


def differences(planned: Mapping[str, Any], program: Program, devices: Sequence[Any]) -> list[str]:
    """What a run finds that is not as it was planned, a sentence each; none if all is."""
    return list(_differences(planned, program, devices))


def _differences(planned: Mapping[str, Any], program: Program, devices: Sequence[Any]) -> Iterator[str]:
    found = plan_program(program, machine_of_devices(devices))
    machine, here = planned["machine"], found.machine
    peak = planned["memory"]["peak_bytes"]
    exactly = {
        "devices": (machine["devices"], here.devices),
        "kind of device": (_kind(machine["device_kind"]), _kind(here.device_kind)),
        "processes": (machine["processes"], here.processes),
        "mesh": (_axes(planned["mesh"]), _axes(program.mesh.shape)),
        "parameters": (f"{planned['parameters']['total']:,}", f"{total(found.parts).count:,}"),
        "trained parameters": (f"{planned['parameters']['trained']:,}", f"{found.trained:,}"),
        "operations of a step": (
            formats.flops(planned["compute"]["flops_per_step"]),
            formats.flops(training_flops(program.run)),
        ),
    }
    nearly = {"estimated peak memory": (peak, found.memory.peak_bytes)}
    if machine["usable_bytes"] and here.usable_bytes:
        nearly["memory of a device"] = (machine["usable_bytes"], here.usable_bytes)
    for name, (before, now) in exactly.items():
        if before != now:
            yield f"{name}: planned {before}, found {now}"
    for name, (before, now) in nearly.items():
        if abs(now - before) > _CLOSE * before:
            yield f"{name}: planned {formats.size(before)}, found {formats.size(now)}"
    if here.usable_bytes and peak > here.usable_bytes:
        yield (
            f"the planned peak of {formats.size(peak)} is more than a program can have of a device here, "
            f"{formats.size(here.usable_bytes)}"
        )


def _kind(device_kind: str) -> str:
    """The table's name of a kind: what drivers call one card differs."""
    known = accelerator_of(device_kind)
    return device_kind if known is None else known.name


def _axes(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"
