"""Presets by name, as the command line names published models: `llama_3:70b`, `t5gemma_2:1b-1b`, `mixtral_8x7b`."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable

from t5x_like.config.model import ModelConfig
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.models import presets

# `smoke` is the model of the recipe of that name, not a published one.
PRESETS: dict[str, Callable[..., ModelConfig]] = {
    name: getattr(presets, name) for name in presets.__all__ if name.islower() and name != "smoke"
}
"""Function of each published model family by its name."""


def sizes(name: str) -> tuple[str, ...]:
    """Return the sizes of a preset; an empty tuple for a preset of one size."""
    function = PRESETS[name]
    if "size" not in inspect.signature(function).parameters:
        return ()
    return typing.get_args(typing.get_type_hints(function)["size"])


def is_preset(reference: str) -> bool:
    """Return whether `NAME` or `NAME:SIZE` has the name of a preset."""
    return reference.partition(":")[0] in PRESETS


def preset(reference: str, argument: str = "MODEL") -> ModelConfig:
    """Return the model of `NAME` (in its default size) or `NAME:SIZE`.

    Args:
      argument: Name of the command-line argument for the error message.

    Raises:
      ConfigError: there is no such preset or size.
    """
    name, _, size = reference.partition(":")
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        fix = f"perhaps {near[0]}" if near else ""
        raise ConfigError([ConfigProblem(argument, repr(reference), f"one of {', '.join(sorted(PRESETS))}", fix)])
    known = sizes(name)
    if size and size not in known:
        expected = f"{name}:SIZE with one of {', '.join(known)}" if known else f"{name}, which has one size"
        raise ConfigError([ConfigProblem(argument, repr(reference), expected)])
    return PRESETS[name](*[size] if size else [])
