"""Registries of configuration classes: unions that are open to other people's classes.

A field annotated with `Annotated[Base, REGISTRY]` takes an instance of any registered class. In JSON the class is
chosen by the field `kind`, as in a discriminated union of pydantic, which this is: the union is formed anew from the
registered classes whenever the schema of a run is built.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import pydantic
import pydantic_core

from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.utils.name_registry import Registry

T = TypeVar("T")


class ConfigRegistry(Registry[type[Any]]):
    """Configuration classes by `kind`; itself the annotation of the fields that hold one of them.

    Attributes:
      base: Class from which every registered class derives.
    """

    def __init__(self, noun: str, base: type[Any]) -> None:
        super().__init__(noun)
        self.base = base

    def add(self, cls: type[T]) -> type[T]:
        """Register a class under each value of its field `kind`, a `Literal` with a default; usable as a decorator.

        Raises:
          ConfigError: the class is no configuration class of this registry, or its `kind` is taken.
        """
        where = f"registration of {cls.__module__}.{cls.__qualname__}"
        if not (dataclasses.is_dataclass(cls) and issubclass(cls, self.base)):
            expected = f"a subclass of {self.base.__name__} decorated with @config_dataclass"
            raise ConfigError([ConfigProblem(where, "another class", expected)])
        kind = typing.get_type_hints(cls).get("kind")
        if typing.get_origin(kind) is not typing.Literal:
            expected = 'a Literal with a default, as in `kind: Literal["mine"] = "mine"`'
            raise ConfigError([ConfigProblem(f"{where}: kind", repr(kind), expected)])
        for name in typing.get_args(kind):
            self.register(name, cls)
        return cls

    def __get_pydantic_core_schema__(
        self, source: Any, handler: Callable[[Any], pydantic_core.CoreSchema]
    ) -> pydantic_core.CoreSchema:
        union: Any = typing.Union.__getitem__(tuple(dict.fromkeys(self.values())))
        return handler.generate_schema(typing.Annotated[union, pydantic.Field(discriminator="kind")])  # type: ignore[attr-defined]
