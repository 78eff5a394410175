"""Reading a config.json: every field is of the type that it should be, or the message says which is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from t5x_like.config.errors import DataError
from t5x_like.config.model import Activation, LayerKind, RopeScaling

ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
KINDS: dict[str, LayerKind] = {"full_attention": "global", "sliding_attention": "local"}
MAX_CONFIG_BYTES = 10_000_000
MAX_NUMBERED = 1024
"""Layers and experts at most: their tensors are listed by name before one of them has been seen."""


class Fields:
    """A JSON object with the name of where it came from."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values = values
        self.where = where

    @classmethod
    def read(cls, path: Path) -> Fields:
        """Raises DataError where there is no JSON object."""
        try:
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise DataError(f"{path}: {path.stat().st_size} bytes, expected {MAX_CONFIG_BYTES} at most")
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: no JSON ({error})") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}: a JSON {type(values).__name__}, expected an object")
        return cls(values, str(path))

    def wrong(self, name: str, expected: str) -> DataError:
        return DataError(f"{self.where}: {name}: found {self.values.get(name)!r}, expected {expected}")

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, most: int = 2**31 - 1) -> int:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 <= value <= most:
            raise self.wrong(name, f"a natural number, {most} at most")
        return value

    def numbered(self, name: str, default: int | None = None) -> int:
        """How many layers or experts."""
        return self.integer(name, default, most=MAX_NUMBERED)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number")
        return float(value)

    def optional(self, name: str, default: float | None = None) -> float | None:
        """A number or None; `default` where the field is missing."""
        return default if name not in self.values else self.number(name) if self.has(name) else None

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def activation(self, name: str, default: str) -> Activation:
        value = self.values.get(name, default)
        if value not in ACTIVATIONS:
            raise self.wrong(name, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def only(self, name: str, expected: Any, default: Any = ...) -> None:
        """A field of which one value is supported; missing means `default`, by default that value."""
        value = self.values.get(name, expected if default is ... else default)
        if value != expected:
            raise DataError(f"{self.where}: {name}: found {value!r}, expected {expected!r}: nothing else is supported")

    def part(self, name: str) -> Fields:
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self.where}: {name}")

    def layer_kinds(self, num_layers: int, *, full_every: int, first_full: int) -> tuple[LayerKind, ...]:
        """The kinds of layers, as short a pattern as repeats to all of them.

        Args:
          full_every: Where `layer_types` is missing: of so many layers one is full,
          first_full: the first one this.
        """
        types = self.values.get("layer_types")
        if types is None:
            full = [number % full_every == first_full for number in range(num_layers)]
            types = ["full_attention" if each else "sliding_attention" for each in full]
        if not isinstance(types, list) or len(types) != num_layers or not all(kind in KINDS for kind in types):
            raise self.wrong("layer_types", f"{num_layers} of {', '.join(KINDS)}")
        kinds = [KINDS[kind] for kind in types]
        for period in range(1, num_layers):
            if all(kinds[n] == kinds[n % period] for n in range(num_layers)):
                return tuple(kinds[:period])
        return tuple(kinds)

    def rope(self, theta: float, *, kind: str | None = None) -> tuple[float, RopeScaling | None]:
        """Rotary base and scaling, of layers of a kind where each has its own; `theta` where the file has none."""
        values = self.values.get("rope_parameters")
        if isinstance(values, dict) and kind is not None and isinstance(values.get(kind), dict):
            return Fields(values[kind], f"{self.where}: rope_parameters: {kind}")._rope(theta)
        if isinstance(values, dict) and "full_attention" not in values:
            return Fields(values, f"{self.where}: rope_parameters")._rope(theta)
        if values is not None:
            raise self.wrong("rope_parameters", "rotary parameters")
        base = self.number("rope_theta", theta)
        if not self.has("rope_scaling") or kind == "sliding_attention":
            return base, None
        return base, self.part("rope_scaling")._rope(base)[1]

    def _rope(self, theta: float) -> tuple[float, RopeScaling | None]:
        base = self.number("rope_theta", theta)
        match self.values.get("rope_type", self.values.get("type", "default")):
            case "default":
                return base, None
            case "linear":
                return base, RopeScaling(kind="linear", factor=self.number("factor"))
            case "llama3":
                return base, RopeScaling(
                    kind="llama3",
                    factor=self.number("factor"),
                    low_frequency_factor=self.number("low_freq_factor"),
                    high_frequency_factor=self.number("high_freq_factor"),
                    original_max_positions=self.integer("original_max_position_embeddings"),
                )
        raise self.wrong("rope_type", "default, linear or llama3")


def write_rope(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default", "rope_theta": base}
    values = {"rope_type": scaling.kind, "rope_theta": base, "factor": scaling.factor}
    if scaling.kind == "llama3":
        values |= {
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return values


def write_layer_types(kinds: tuple[LayerKind, ...]) -> list[str]:
    names = {kind: name for name, kind in KINDS.items()}
    return [names[kind] for kind in kinds]
