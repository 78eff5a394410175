"""Bounds of configuration fields: annotated types, and the check of a configuration against them.

A bound stands on its field, as in `dropout_rate: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0`. Constructing a
configuration does not check bounds, so that a recipe's problems are reported together: `validate` collects the
problems of all fields, and those that concern several fields.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import pydantic
import pydantic_core
from pydantic.fields import FieldInfo

from t5x_like.errors import ConfigProblem

Problems = Iterator[ConfigProblem]

PositiveInt = Annotated[int, pydantic.Field(ge=1)]
NonNegativeInt = Annotated[int, pydantic.Field(ge=0)]
Seed = Annotated[int, pydantic.Field(ge=0, le=2**32 - 1)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
ClosedUnitFloat = Annotated[float, pydantic.Field(ge=0, le=1)]
"""A number in [0, 1]."""
OpenUnitFloat = Annotated[float, pydantic.Field(gt=0, lt=1)]
"""A number in (0, 1)."""
UnitFloatBelowOne = Annotated[float, pydantic.Field(ge=0, lt=1)]
"""A number in [0, 1), such as a dropout rate."""
UnitFloatAboveZero = Annotated[float, pydantic.Field(gt=0, le=1)]
"""A number in (0, 1]."""
NonEmptyStr = Annotated[str, pydantic.Field(min_length=1)]

_CONSTRAINED = ("int", "float", "str", "tuple")
"""Core schemas of pydantic that can have bounds."""
_LIMITS = ("gt", "ge", "lt", "le")
_CONSTRAINTS = (*_LIMITS, "multiple_of", "allow_inf_nan", "min_length", "max_length", "pattern")


def bound_problems(value: Any, where: str = "") -> Iterator[ConfigProblem]:
    """Yield a problem for every field whose value is out of its bounds, at all depths.

    Args:
      value: A configuration, or a tuple of them; other values have no fields.
      where: Dotted path of `value`.
    """
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from bound_problems(item, f"{where}.{index}")
    elif dataclasses.is_dataclass(value):
        cls: Any = type(value)
        bounded = _bounded_fields(cls)
        for field in dataclasses.fields(value):
            child = getattr(value, field.name)
            path = f"{where}.{field.name}" if where else field.name
            if field.name in bounded:
                yield from _field_problems(*bounded[field.name], child, path)
            yield from bound_problems(child, path)


def bounds_text(hint: Any) -> str:
    """Return the bounds that a field's type states, in the words of error messages; "" if it states none."""
    constraints = _constraints(hint)
    if constraints is None:
        return ""
    if constraints.description:
        return constraints.description
    is_lengths = any(getattr(bound, "min_length", 0) for bound in constraints.metadata)
    return "not empty" if is_lengths else _limits_text(constraints)


def above(where: str, value: float | None, bound: float) -> Problems:
    """Yield a problem unless `value` is None, or finite and greater than `bound`."""
    if value is not None and not (math.isfinite(value) and value > bound):
        yield ConfigProblem(where, f"{value:g}", f"a number above {bound:g}")


def at_least(where: str, value: int | None, bound: int, fix: str = "") -> Problems:
    """Yield a problem unless `value` is None or at least `bound`."""
    if value is not None and value < bound:
        yield ConfigProblem(where, str(value), f"{bound} or more", fix)


def within(where: str, value: float | None, low: float, high: float, *, ends: str = "[]") -> Problems:
    """Yield a problem unless `value` is None or in the interval; `ends` states which ends belong to it, as in "[)"."""
    if value is None:
        return
    above = value >= low if ends[0] == "[" else value > low
    below = value <= high if ends[1] == "]" else value < high
    if not (above and below):
        yield ConfigProblem(where, f"{value:g}", f"a number in {ends[0]}{low:g}, {high:g}{ends[1]}")


def without_repetition(bounds: Sequence[ConfigProblem], others: Problems) -> list[ConfigProblem]:
    """Return all problems, except those of `others` at a field that is already out of its bounds."""
    reported = {problem.where for problem in bounds}
    return [*bounds, *(problem for problem in others if problem.where not in reported)]


def types_only(cls: type[Any]) -> pydantic_core.SchemaValidator:
    """Return a validator of the types of a configuration class and of its field names, without the bounds."""
    return pydantic_core.SchemaValidator(_without_bounds(pydantic.TypeAdapter(cls).core_schema))


def _field_problems(
    adapter: pydantic.TypeAdapter[Any], constraints: FieldInfo, value: Any, where: str
) -> Iterator[ConfigProblem]:
    try:
        adapter.validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        for detail in error.errors():
            path = ".".join((where, *map(str, detail["loc"])))
            yield ConfigProblem(path, _found(detail["input"]), _expected(detail, constraints))


@functools.cache
def _bounded_fields(cls: type[Any]) -> dict[str, tuple[pydantic.TypeAdapter[Any], FieldInfo]]:
    """Return validator and constraints of every field of a class that has bounds."""
    hints = typing.get_type_hints(cls, include_extras=True)
    constrained = {name: constraints for name, hint in hints.items() if (constraints := _constraints(hint))}
    return {name: (pydantic.TypeAdapter(hints[name]), constraints) for name, constraints in constrained.items()}


def _constraints(hint: Any) -> FieldInfo | None:
    """Return the outermost `pydantic.Field` of a type that states a bound."""
    for argument in (*getattr(hint, "__metadata__", ()), *typing.get_args(hint)):
        if isinstance(argument, FieldInfo):
            # The choice of a class by its `kind` is a Field as well, without constraints.
            if argument.metadata:
                return argument
        elif constraints := _constraints(argument):
            return constraints
    return None


def _found(value: Any) -> str:
    if value in ("", ()):
        return "nothing"
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _expected(detail: pydantic_core.ErrorDetails, constraints: FieldInfo) -> str:
    """Return the description of the field's bounds, or else state them."""
    if constraints.description:
        return constraints.description
    match detail["type"]:
        case "too_short" | "string_too_short":
            return "at least one entry" if detail["type"] == "too_short" else "a value that is not empty"
        case "int_type" | "float_type" | "string_type" | "tuple_type" | "int_from_float":
            return detail["msg"].removeprefix("Input should be ")
    return _limits_text(constraints) or detail["msg"].removeprefix("Input should be ")


def _limits_text(constraints: FieldInfo) -> str:
    """Return the limits of a number in words; "" if there is neither a lower limit nor an interval."""
    limits = {name: getattr(bound, name) for bound in constraints.metadata for name in _LIMITS if hasattr(bound, name)}
    lower = f"[{limits['ge']}" if "ge" in limits else f"({limits['gt']}" if "gt" in limits else None
    upper = f"{limits['le']}]" if "le" in limits else f"{limits['lt']})" if "lt" in limits else None
    if lower and upper:
        return f"a number in {lower}, {upper}"
    if "ge" in limits:
        return f"{limits['ge']} or more"
    return f"a number above {limits['gt']}" if "gt" in limits else ""


def _without_bounds(schema: Any) -> Any:
    """Return a core schema of pydantic without its bounds."""
    if isinstance(schema, list | tuple):
        return type(schema)(_without_bounds(child) for child in schema)
    if not isinstance(schema, dict):
        return schema
    bounded = schema.get("type") in _CONSTRAINED
    return {
        key: child if key == "default" else _without_bounds(child)
        for key, child in schema.items()
        if not (bounded and key in _CONSTRAINTS)
    }
