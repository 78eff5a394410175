"""Optimizers: one configuration class each, registered by its `kind`.

The classes know neither jax nor optax. `OptimizerConfig.build` imports the implementation, named at the registration,
when the optimizer is made. To add an optimizer to the package, add its class here and its module in
`t5x_like/training/optimizers/`. A user's own class overrides `build` instead of naming an implementation.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from t5x_like.config.bounds import (
    NonEmptyStr,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    UnitFloatBelowOne,
)
from t5x_like.config.config_registry import ConfigRegistry
from t5x_like.config.dataclass import config_dataclass
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.utils.name_registry import Registry


@config_dataclass
class OptimizerConfig:
    """Base class of the optimizers' configurations.

    Attributes:
      implementation: "MODULE:FUNCTION" of a function (config, logical_axes) -> optimizer; used by `build`.
    """

    implementation: ClassVar[str] = ""

    kind: str
    """Name of the optimizer in recipes, overrides and config.json."""

    def build(self, logical_axes: Any) -> Any:
        """Return the optimizer for parameters with these logical axes.

        Args:
          logical_axes: A tree like the parameters with a tuple of axis names in place of each array.

        Returns:
          An `optax.GradientTransformationExtraArgs` whose `update` takes the learning rate of the step as the keyword
          `learning_rate` and returns what is added to the parameters.
        """
        module, _, function = self.implementation.partition(":")
        if not function:
            raise NotImplementedError(f"{type(self).__name__} must define build(self, logical_axes)")
        return getattr(importlib.import_module(module), function)(self, logical_axes)

    def matmul_flops(self, inputs: int, outputs: int) -> int:
        """Return the FLOPs of the matrix products of a step for a kernel of this size; for most optimizers 0."""
        del inputs, outputs
        return 0

    def problems(self, where: str) -> Iterator[ConfigProblem]:
        """Yield what is wrong with the values; `where` is the dotted path of this configuration."""
        yield from ()


OPTIMIZERS = ConfigRegistry("optimizer", OptimizerConfig)
Optimizer = Annotated[OptimizerConfig, OPTIMIZERS]
"""Annotation of a field that holds any registered optimizer."""

T = TypeVar("T", bound=OptimizerConfig)


def register_optimizer(cls: type[T]) -> type[T]:
    """Register an optimizer's configuration class by its `kind`; a decorator above `@config_dataclass`.

    Raises:
      ConfigError: the class does not derive from `OptimizerConfig`, defines neither `build` nor `implementation`, has
        no `kind`, or the `kind` is taken.
    """
    if not cls.implementation and cls.build is OptimizerConfig.build:
        where = f"registration of {cls.__module__}.{cls.__qualname__}"
        raise ConfigError([ConfigProblem(where, "no method build", "build(self, logical_axes) -> optimizer")])
    return OPTIMIZERS.add(cls)


OPTAX_FACTORIES: Registry[Callable[..., Any]] = Registry("optimizer factory")
"""Functions that `OptaxOptimizer.factory` can name besides those of optax."""


def register_optax_factory(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that registers a function (learning_rate, **kwargs) -> optax.GradientTransformation."""
    return OPTAX_FACTORIES.decorator(name)


@register_optimizer
@config_dataclass
class AdafactorConfig(OptimizerConfig):
    """Adafactor with T5X's semantics (Shazeer and Stern 2018; T5X's `adafactor.py`).

    There is no momentum, second moments are factored by logical axis, updates are clipped, and steps are relative to
    the scale of each parameter.
    """

    implementation = "t5x_like.training.optimizers.adafactor:adafactor"

    kind: Literal["adafactor"] = "adafactor"
    decay_rate: PositiveFloat = 0.8
    """beta2 at step t is 1 - t**-decay_rate."""
    clipping_threshold: PositiveFloat | None = 1.0
    """Upper bound on the root mean square of an update."""
    multiply_by_parameter_scale: bool = True
    """Multiply each update by the root mean square of its parameter, so that the learning rate is relative."""
    epsilon1: PositiveFloat = 1e-30
    """Number that is added to squared gradients, to avoid a division by zero."""
    epsilon2: PositiveFloat = 1e-3
    """Lower bound on a parameter's scale."""
    min_dim_size_to_factor: PositiveInt = 128
    """Number of rows and of columns from which on the second moment of a matrix is factored."""
    momentum: UnitFloatBelowOne | None = None
    """Decay of an average of the updates; None: no momentum, and no memory for it."""
    weight_decay: NonNegativeFloat = 0.0
    """Fraction of each parameter that a step subtracts. As in T5X it is not multiplied by the learning rate."""


@register_optimizer
@config_dataclass
class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    implementation = "t5x_like.training.optimizers.adamw:adamw"

    kind: Literal["adamw"] = "adamw"
    b1: UnitFloatBelowOne = 0.9
    """Decay of the average of the gradients."""
    b2: UnitFloatBelowOne = 0.95
    """Decay of the average of the squared gradients."""
    eps: PositiveFloat = 1e-8
    """Number that is added to the root of the average of the squared gradients."""
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices only, not to norms, biases and relative-position tables."""
    rms_scaled: bool = False
    """Scale each update by the root mean square of its parameter, which T5 needs to train with Adam (nanoT5)."""


@register_optimizer
@config_dataclass
class LambConfig(OptimizerConfig):
    """LAMB (You et al. 2020), for large batches: AdamW's step, scaled to the norm of each layer's parameter."""

    implementation = "t5x_like.training.optimizers.lamb:lamb"

    kind: Literal["lamb"] = "lamb"
    b1: UnitFloatBelowOne = 0.9
    """Decay of the average of the gradients."""
    b2: UnitFloatBelowOne = 0.999
    """Decay of the average of the squared gradients."""
    eps: PositiveFloat = 1e-6
    """Number that is added to the root of the average of the squared gradients."""
    weight_decay: NonNegativeFloat = 0.01
    """Applied to matrices only, not to norms, biases and relative-position tables."""


@register_optimizer
@config_dataclass
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024) for the kernels of the layers, AdamW for all other parameters.

    The step of a kernel is its momentum with all singular values moved close to 1 by Newton-Schulz iterations.
    """

    implementation = "t5x_like.training.optimizers.muon:muon"

    kind: Literal["muon"] = "muon"
    beta: UnitFloatBelowOne = 0.95
    """Decay of the momentum, which is Nesterov's."""
    newton_schulz_steps: PositiveInt = 5
    """Number of Newton-Schulz iterations of a step."""
    update_rms: PositiveFloat | None = 0.2
    """Root mean square of a kernel's step at a learning rate of 1. 0.2 is that of AdamW's steps, so that AdamW's
    learning rate and weight decay can be used (Liu et al. 2025). None: scale the orthogonal matrix by
    sqrt(max(1, outputs / inputs))."""
    b1: UnitFloatBelowOne = 0.9
    """AdamW's decay of the average of the gradients."""
    """AdamW's, as are b2 and eps."""
    b2: UnitFloatBelowOne = 0.95
    """AdamW's decay of the average of the squared gradients."""
    eps: PositiveFloat = 1e-8
    """Constant for numerical stability: added to AdamW's denominator, and to the norm by which the momentum of a kernel
    is divided before the Newton-Schulz iterations."""
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices only, not to norms, biases and relative-position tables."""

    def matmul_flops(self, inputs: int, outputs: int) -> int:
        small, large = sorted((inputs, outputs))
        # x xT, (x xT)**2 and their product with x.
        return self.newton_schulz_steps * (4 * small**2 * large + 2 * small**3)


@register_optimizer
@config_dataclass
class ScheduleFreeConfig(OptimizerConfig):
    """Schedule-free AdamW (Defazio et al. 2024), for `schedule.kind="constant"` with a warm-up.

    The parameters of checkpoints and evaluations are the weighted average of the iterates, which replaces the decay of
    the learning rate.
    """

    implementation = "t5x_like.training.optimizers.schedule_free:schedule_free"

    kind: Literal["schedule_free"] = "schedule_free"
    b1: UnitFloatBelowOne = 0.9
    """Weight of the average in the point at which the gradient is taken."""
    b2: UnitFloatBelowOne = 0.999
    """Decay of the average of the squared gradients."""
    eps: PositiveFloat = 1e-8
    """Number that is added to the root of the average of the squared gradients."""
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices only, not to norms, biases and relative-position tables."""


@register_optimizer
@config_dataclass
class OptaxOptimizer(OptimizerConfig):
    """Optimizer made by a function of optax, or by one registered with `register_optax_factory`.

    The function is called with `learning_rate` and `kwargs`. The learning rate is that of `training.schedule`.
    """

    implementation = "t5x_like.training.optimizers.optax_optimizer:optax_optimizer"

    kind: Literal["optax"] = "optax"
    factory: NonEmptyStr
    """Registered name, or name in optax such as "lion" or "contrib.muon"."""
    kwargs: dict[str, bool | int | float | str | None] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the function, besides the learning rate."""
    decay_matrices_only: bool = True
    """If the function takes a `mask` for its weight decay, exclude norms, biases and relative-position tables from it,
    as `AdamWConfig` does. False: leave the mask to the function's own default."""

    def problems(self, where: str) -> Iterator[ConfigProblem]:
        if "learning_rate" in self.kwargs:
            expected = "the learning rate in training.schedule only"
            yield ConfigProblem(f"{where}.kwargs.learning_rate", repr(self.kwargs["learning_rate"]), expected)
