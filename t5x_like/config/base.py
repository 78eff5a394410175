"""The decorator that every configuration class wears."""

from __future__ import annotations

import dataclasses
import typing

import pydantic

T = typing.TypeVar("T")


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def configuration(cls: type[T]) -> type[T]:
    """A frozen dataclass with keyword arguments that, read from JSON, refuses unknown fields and wrong types."""
    cls.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)
