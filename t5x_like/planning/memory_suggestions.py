"""Suggestions for a run whose step does not fit into memory, cheapest changes first."""

from __future__ import annotations

import dataclasses
from typing import Any, assert_never

from t5x_like.config import RunConfig, batch_spec
from t5x_like.config.validation import validate


@dataclasses.dataclass(frozen=True)
class MemorySuggestion:
    """A change that needs less memory.

    Attributes:
      option: Option on the command line, with its value.
      effect: Short description of the effect.
      run: The changed run; None if the suggestion is not a configuration change.
    """

    option: str
    effect: str
    run: RunConfig | None

    def __str__(self) -> str:
        return f"{self.option}  ({self.effect})" if self.effect else self.option


def memory_suggestions(run: RunConfig) -> list[MemorySuggestion]:
    """Return changes of the run that need less memory; each gives a valid configuration."""
    training, model = run.training, run.model
    suggestions = []

    def suggest(option: str, effect: str, **changes: Any) -> None:
        changed = _changed(run, changes)
        if not validate(changed):
            suggestions.append(MemorySuggestion(option, effect, changed))

    if model.dtype == "float32":
        suggest("--model.dtype bfloat16", "activations take half the bytes", model={"dtype": "bfloat16"})
    match model.remat:
        case "none" | "dots" | "mlp" | "attention" | "qkv" | "outputs":
            suggest("--model.remat full", "layers are recomputed in the backward pass", model={"remat": "full"})
        case "full":
            suggest("--model.remat offload", "the inputs of layers are kept on the host", model={"remat": "offload"})
        case "offload":
            pass
        case unknown:
            assert_never(unknown)
    parts = 2 * training.gradient_accumulation_steps
    if all(next(iter(features.values())).shape[0] % parts == 0 for features in batch_spec(run).values()):
        effect = "the same batch in more parts, each with less memory"
        option = f"--training.gradient-accumulation-steps {parts}"
        suggest(option, effect, training={"gradient_accumulation_steps": parts})
    if training.global_batch_size % 2 == 0:
        rows = training.global_batch_size // 2
        effect = "fewer rows per step, which changes the optimization"
        suggest(f"--training.global-batch-size {rows}", effect, training={"global_batch_size": rows})
    if run.sharding.optimizer_state_memory == "device":
        effect = "the optimizer state is kept on the host, and copied to the devices and back in each step"
        suggest("--sharding.optimizer-state-memory host", effect, sharding={"optimizer_state_memory": "host"})
    tensor = 2 * run.sharding.tensor
    if run.sharding.tensor > 0 and all(stack.num_heads % tensor == 0 for stack in model.stacks.values()):
        effect = "each layer is split over more devices, with more collectives"
        suggest(f"--sharding.tensor {tensor}", effect, sharding={"tensor": tensor})
    return [*suggestions, MemorySuggestion("a topology with more devices or with more memory per device", "", None)]


def _changed(run: RunConfig, changes: dict[str, dict[str, Any]]) -> RunConfig:
    sections = {name: dataclasses.replace(getattr(run, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(run, **sections)
