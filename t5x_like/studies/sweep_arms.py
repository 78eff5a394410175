"""Arms of a sweep: the product of the values that the overrides of a recipe give."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence

from t5x_like.config import RunConfig
from t5x_like.config.overrides import apply_overrides
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.studies.study import Arm


def sweep_arms(
    run: RunConfig, recipe: str, arguments: Sequence[str], configure: Callable[[Sequence[str]], RunConfig]
) -> tuple[Arm, ...]:
    """Return the arms: the product of the values of all options that have several.

    An option whose words are together one value, as the files of a corpus, belongs to every arm.

    Args:
      run: The recipe's run.
      recipe: RECIPE as the user named it.
      arguments: Overrides as of `train`, with several values for the fields that are swept.
      configure: Returns the validated run of the recipe with overrides.

    Raises:
      ConfigError: no option has several values, one has the same value twice, or an arm is not valid.
    """
    fixed: list[str] = []
    axes: list[tuple[str, list[str]]] = []
    for option, values in _options(arguments):
        if len(values) > 1 and not _is_one_value(run, option, values):
            axes.append((option, values))
        else:
            fixed += [option, *values]
    if not axes:
        example = "--training.schedule.learning-rate 0.003 0.01 0.03"
        raise ConfigError([ConfigProblem("sweep", "no field with several values", f"one or more, as {example}")])
    repeated = [(option, value) for option, values in axes for value, n in Counter(values).items() if n > 1]
    if repeated:
        raise ConfigError([ConfigProblem(option, f"{value} more than once", "it once") for option, value in repeated])
    names = _field_names([option for option, _ in axes])
    arms = []
    for chosen in itertools.product(*(values for _, values in axes)):
        name = "-".join(f"{field}_{_plain(value)}" for field, value in zip(names, chosen, strict=True))
        swept = [word for (option, _), value in zip(axes, chosen, strict=True) for word in (option, value)]
        overrides = [*fixed, *swept]
        named = dataclasses.replace(configure(overrides), name=name)
        arms.append(Arm(name, named, (recipe, *overrides)))
    return tuple(arms)


def _options(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return each option with its words."""
    found: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--"):
            option, has_value, value = word.partition("=")
            found.append((option, [value] if has_value else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ConfigError([ConfigProblem(word, "a word that belongs to no option", "overrides as --FIELD VALUE")])
    return found


def _is_one_value(run: RunConfig, option: str, values: Sequence[str]) -> bool:
    try:
        apply_overrides(run, [option, *values])
    except ConfigError:
        return False
    return True


def _field_names(options: Sequence[str]) -> list[str]:
    """Return the last part of each option's path, or the whole path where that is not unique."""
    last = [option.lstrip("-").rpartition(".")[2] for option in options]
    whole = [_plain(option.lstrip("-")) for option in options]
    return [short if last.count(short) == 1 else long for short, long in zip(last, whole, strict=True)]


def _plain(text: str) -> str:
    """Return a value in the letters that the name of a run may have, and different values as different texts.

    A value with other letters ends in its digest: without it, `a/b` and `a b` would have the directory of one run.
    """
    plain = re.sub(r"[^\w.-]+", "_", text)
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
