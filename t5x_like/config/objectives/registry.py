"""Registry of objectives: `kind` -> configuration class and NumPy implementation.

An objective has two halves, because this package must not import NumPy: the configuration class, a subclass of
`ObjectiveConfig`, and the implementation, a subclass of `t5x_like.data.objectives.base.ObjectiveImplementation`. The
implementation of an objective of this package is a reference "module:class", which is imported when examples are made.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Mapping
from typing import Annotated, Any, get_args

import pydantic_core

from t5x_like.config.bounds import types_only
from t5x_like.config.config_registry import ConfigRegistry
from t5x_like.config.objectives.base import ExampleSource, ObjectiveConfig
from t5x_like.config.objectives.labeled_examples import LabeledExamples
from t5x_like.config.objectives.preference import Preference
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.utils import name_registry

IMPLEMENTATION_PARTS = ("denoise", "restore", "prompt_format", "noise_fits")
"""Methods that an implementation must define: the abstract methods of `ObjectiveImplementation`."""
_CONFIG_ATTRIBUTES = ("has_inputs",)

OBJECTIVES = ConfigRegistry("objective", ObjectiveConfig)
"""Configuration classes by kind. `register_objective` adds to it."""
Objective = Annotated[ObjectiveConfig, OBJECTIVES]
"""Type of a configuration field that holds an objective of any registered kind."""
_IMPLEMENTATIONS: dict[str, type[Any] | str] = {}


def register_objective(config_class: type[ObjectiveConfig], implementation: type[Any] | str) -> None:
    """Make an objective known, so that recipes, config.json, command-line overrides and the data stream accept it.

    Registering a class of the same module and name again replaces it, so that a file can be loaded twice.

    Args:
      config_class: Subclass of `ObjectiveConfig`, decorated with `config_dataclass`.
      implementation: Subclass of `ObjectiveImplementation`, or "module:class". A reference is imported, and its parts
        are checked, when the objective is first used.

    Raises:
      ConfigError: a half lacks a part, or the kind is taken by another class. All missing parts are named.
    """
    subject = f"registration of the objective {config_class.__module__}.{config_class.__qualname__}"
    problems = []
    if missing := _missing_config_parts(config_class):
        expected = "a subclass of ObjectiveConfig with config_dataclass that defines all of its abstract parts"
        problems.append(ConfigProblem(subject, f"a configuration class without {', '.join(missing)}", expected))
    if isinstance(implementation, str):
        if implementation.count(":") != 1:
            problems.append(ConfigProblem(subject, f"the implementation {implementation!r}", '"module:class"'))
    else:
        problems += _implementation_problems(subject, implementation)
    if problems:
        raise ConfigError(problems)
    OBJECTIVES.add(config_class)
    _IMPLEMENTATIONS.update({kind: implementation for kind, cls in OBJECTIVES.items() if cls is config_class})
    implementation_class.cache_clear()


def registered_kinds() -> tuple[str, ...]:
    """Return the kinds of all registered objectives, in the order of registration."""
    return tuple(OBJECTIVES)


@functools.cache
def implementation_class(kind: str) -> type[Any]:
    """Return the implementation class of a registered kind, imported if needed.

    Raises:
      ConfigError: the kind is not registered, or the implementation lacks a part.
    """
    OBJECTIVES.lookup(kind, f"objective {kind!r}")
    implementation = _IMPLEMENTATIONS[kind]
    if not isinstance(implementation, str):
        return implementation
    module, _, name = implementation.partition(":")
    loaded = getattr(importlib.import_module(module), name)
    if problems := _implementation_problems(f"objective {kind!r}", loaded):
        raise ConfigError(problems)
    return loaded


def _missing_config_parts(config_class: type[ObjectiveConfig]) -> list[str]:
    if not (inspect.isclass(config_class) and issubclass(config_class, ObjectiveConfig)):
        return ["the base class ObjectiveConfig"]
    missing = sorted(config_class.__abstractmethods__)
    missing += [name for name in _CONFIG_ATTRIBUTES if not hasattr(config_class, name)]
    # Without a `kind` of its own, a class would take the place of its base class; without the decorator, it silently
    # has the fields of its base class only.
    if "kind" not in vars(config_class).get("__annotations__", {}):
        missing.append("kind")
    source = config_class.example_source
    if source not in get_args(ExampleSource):
        missing.append(f"a known example_source (found {source!r})")
    elif source == "labelled" and not issubclass(config_class, LabeledExamples):
        # The rows of labelled examples are made by `data.stream.labeled_rows` from the fields of that class.
        missing.append("the base class LabeledExamples, which the example_source 'labelled' needs")
    elif source == "preferences" and not issubclass(config_class, Preference):
        # The loss reads the fields of that class.
        missing.append("the base class Preference, which the example_source 'preferences' needs")
    return missing if "__dataclass_fields__" in vars(config_class) else [*missing, "config_dataclass"]


def _implementation_problems(subject: str, implementation: type[Any]) -> list[ConfigProblem]:
    methods = {name: getattr(implementation, name, None) for name in IMPLEMENTATION_PARTS}
    missing = [
        name
        for name, method in methods.items()
        if not callable(method) or getattr(method, "__isabstractmethod__", False)
    ]
    if not missing:
        return []
    name = getattr(implementation, "__qualname__", repr(implementation))
    expected = f"a subclass of ObjectiveImplementation that defines {', '.join(IMPLEMENTATION_PARTS)}"
    return [ConfigProblem(subject, f"an implementation {name} without {', '.join(missing)}", expected)]


@functools.lru_cache(maxsize=1)
def _validator(generation: int) -> pydantic_core.SchemaValidator:
    """Return the schema of the objectives that are registered at `generation`."""
    del generation
    return types_only(Objective)


def parse_objective(value: Mapping[str, Any]) -> ObjectiveConfig:
    """Return the objective that a JSON object describes. Bounds of its fields are not checked.

    Raises:
      pydantic_core.ValidationError: the kind is missing or not registered, or a field is unknown, missing or of another
        type.
    """
    # As JSON, so that arrays become tuples and nothing else is converted.
    return _validator(name_registry.generation()).validate_json(json.dumps(value))


def unregistered(objective: ObjectiveConfig, where: str) -> list[ConfigProblem]:
    """Return a problem if the class of an objective is not the one that is registered for its kind.

    config.json would give such an objective another meaning.
    """
    registered, own = OBJECTIVES.get(objective.kind), type(objective)
    if registered is not None and (registered.__module__, registered.__qualname__) == (
        own.__module__,
        own.__qualname__,
    ):
        return []
    found = f"the class {own.__module__}.{own.__qualname__} of kind {objective.kind!r}"
    return [ConfigProblem(where, found, "a class that register_objective has made known, with a kind of its own")]
