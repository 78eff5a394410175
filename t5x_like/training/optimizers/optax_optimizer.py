"""OptaxOptimizer: any optimizer of optax, or a user's own function with the same signature."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_like.config.optimizers import OPTAX_FACTORIES, OptaxOptimizer
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.training.optimizers.adamw import is_decayed
from t5x_like.training.optimizers.per_layer import STACKED
from t5x_like.utils.type_aliases import PyTree

Factory = Callable[..., optax.GradientTransformation]

_WHERE = "training.optimizer"
_OF_WHOLE_ARRAYS = {
    "adafactor": "adafactor",
    "contrib.muon": "muon",
    "fromage": None,
    "lamb": "lamb",
    "lars": None,
    "novograd": None,
}
"""Functions of optax whose steps depend on statistics of whole arrays or on their number of dimensions, with the kind
of the package's own optimizer. They are wrong for arrays of several layers or experts."""


def optax_optimizer(config: OptaxOptimizer, logical_axes: PyTree) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer for parameters with these logical axes; `update` takes the learning rate as a keyword.

    Raises:
      ConfigError: no such function, it does not take the arguments, or it is wrong for stacked layers.
    """
    _refuse_stacks(config.factory, logical_axes)
    factory = _factory(config.factory)
    parameters = _parameters(factory)
    kwargs: dict[str, Any] = dict(config.kwargs)
    if config.decay_matrices_only and "mask" in parameters and "mask" not in kwargs:
        kwargs["mask"] = jax.tree_util.tree_map_with_path(
            is_decayed, logical_axes, is_leaf=lambda node: isinstance(node, tuple)
        )
    _require_arguments(config.factory, parameters, kwargs)
    return with_learning_rate(lambda learning_rate: factory(learning_rate=learning_rate, **kwargs))


def _refuse_stacks(name: str, logical_axes: PyTree) -> None:
    """Raise ConfigError if the function is wrong for the stacked parameters."""
    axes = jax.tree.leaves(logical_axes, is_leaf=lambda node: isinstance(node, tuple))
    if name not in _OF_WHOLE_ARRAYS or name in OPTAX_FACTORIES or not any(STACKED & set(names) for names in axes):
        return
    found = f"{name}, which does not treat the layers of a stacked array separately"
    kind = _OF_WHOLE_ARRAYS[name]
    expected = "a function that works on each element" if kind is None else f"training.optimizer of kind {kind!r}"
    raise ConfigError([ConfigProblem(f"{_WHERE}.factory", found, expected)])


def with_learning_rate(make: Callable[[jax.Array], optax.GradientTransformation]) -> Any:
    """Return an optimizer whose `update` takes the learning rate, from a function that takes it at construction.

    The transformation is made anew inside each traced update, with the learning rate of the step as a traced scalar, as
    `optax.inject_hyperparams` does. So the schedule follows the step of the run, which counts skipped updates as well,
    and an optimizer that uses the learning rate in several places is computed exactly.
    """

    def init(params: PyTree) -> PyTree:
        return make(jnp.zeros((), jnp.float32)).init(params)

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, *, learning_rate: jax.Array, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        optimizer = optax.with_extra_args_support(make(learning_rate))
        return optimizer.update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _factory(name: str) -> Factory:
    """Return the registered function of this name, or the one of optax."""
    if name in OPTAX_FACTORIES:
        return OPTAX_FACTORIES[name]
    found: Any = optax
    for part in name.split("."):
        # A leading underscore or a module beside optax's own is never an optimizer.
        found = None if part.startswith("_") else getattr(found, part, None)
    if callable(found) and "learning_rate" in _parameters(found):
        return found
    known = [name for name in dir(optax) if callable(getattr(optax, name)) and "learning_rate" in _parameters(name)]
    names = sorted({*OPTAX_FACTORIES, *known})
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    expected = f"{near[0]!r}, perhaps" if near else f"one of: {', '.join(names)}"
    what = "no function of optax" if found is None else "a name in optax that is no optimizer with a learning rate"
    fix = "register a function of your own with register_optax_factory in a file named in `plugins`"
    raise ConfigError([ConfigProblem(f"{_WHERE}.factory", f"{name!r}, {what}", expected, fix)])


def _parameters(factory: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a callable, or of the callable of optax with this name; none if they are not known."""
    if isinstance(factory, str):
        factory = getattr(optax, factory)
    try:
        return dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return {}


def _require_arguments(name: str, parameters: dict[str, inspect.Parameter], kwargs: dict[str, Any]) -> None:
    """Raise ConfigError unless a call with `learning_rate` and `kwargs` fits the signature."""
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    accepted = f"one of: {', '.join(key for key in parameters if key != 'learning_rate')}"
    problems = [
        ConfigProblem(f"{_WHERE}.kwargs.{key}", f"an argument that {name} does not take", accepted)
        for key in kwargs
        if key not in parameters and not takes_any
    ]
    needed = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    problems += [
        ConfigProblem(f"{_WHERE}.kwargs.{key}", "nothing", f"a value: {name} has no default for it")
        for key, parameter in parameters.items()
        if parameter.kind in needed
        and parameter.default is parameter.empty
        and key not in kwargs
        and key != "learning_rate"
    ]
    if problems:
        raise ConfigError(problems)
