"""What to change in a run whose step does not fit, those changes first that cost least."""

from __future__ import annotations

import dataclasses
from typing import Any

from t5x_like.config import RunConfig, batch_spec
from t5x_like.config.validate import validate


@dataclasses.dataclass(frozen=True)
class Knob:
    """A change of a run.

    Attributes:
      option: As it is given on the command line.
      why: What it does, in a few words.
      run: The changed run; None where the change is none of the run's.
    """

    option: str
    why: str
    run: RunConfig | None

    def __str__(self) -> str:
        return f"{self.option}  ({self.why})" if self.why else self.option


def knobs(run: RunConfig) -> list[Knob]:
    """Changes of the run that need less memory; each is a sound configuration."""
    training, model = run.training, run.model
    found = []

    def offer(option: str, why: str, **changes: Any) -> None:
        changed = _changed(run, changes)
        if not validate(changed):
            found.append(Knob(option, why, changed))

    if model.dtype == "float32":
        offer("--model.dtype bfloat16", "activations of half the bytes", model={"dtype": "bfloat16"})
    if model.remat != "full":
        offer("--model.remat full", "layers are computed again in the backward pass", model={"remat": "full"})
    parts = 2 * training.gradient_accumulation_steps
    if all(next(iter(f.values())).shape[0] % parts == 0 for f in batch_spec(run).values()):
        why = "the same batch in more parts, each of less memory"
        option = f"--training.gradient-accumulation-steps {parts}"
        offer(option, why, training={"gradient_accumulation_steps": parts})
    if training.batch_size % 2 == 0:
        option = f"--training.batch-size {training.batch_size // 2}"
        offer(option, "another optimization, by fewer rows a step", training={"batch_size": training.batch_size // 2})
    tensor = 2 * run.partitioning.tensor
    if run.partitioning.tensor > 0 and all(stack.num_heads % tensor == 0 for stack in model.stacks.values()):
        option = f"--partitioning.tensor {tensor}"
        offer(option, "each layer over more devices, for more collectives", partitioning={"tensor": tensor})
    return [*found, Knob("a topology of more devices or of more memory each", "", None)]


def _changed(run: RunConfig, changes: dict[str, dict[str, Any]]) -> RunConfig:
    sections = {name: dataclasses.replace(getattr(run, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(run, **sections)
