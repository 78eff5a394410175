"""Decorator of all configuration classes."""

from __future__ import annotations

import dataclasses
import typing

import pydantic

T = typing.TypeVar("T")


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def config_dataclass(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass with keyword-only arguments.

    Reading it from JSON refuses unknown fields and wrong types. Bounds of fields are annotations (`config.bounds`);
    the constructor does not check them.
    """
    cls.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)
