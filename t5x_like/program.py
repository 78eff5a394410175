"""Assembly of a run: the one module that wires model, data, optimizer and sharding into compiled steps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_like.adapters.lora import LoraSpec, lora_spec
from t5x_like.config import BatchSpec, RunConfig, batch_spec, evaluation_spec
from t5x_like.data.stream.host_shard import HostShard
from t5x_like.errors import ConfigError
from t5x_like.hardware.xla_flags import options_to_run_once
from t5x_like.model_output import ModelOutput
from t5x_like.models.factory import ModelSpec, abstract_model, bind_params, init_params
from t5x_like.models.model import Model
from t5x_like.monitoring.metrics import WeightedMean
from t5x_like.sharding.attention_choice import describe_attention, sequence_split_of
from t5x_like.sharding.auto_mesh import choose_sharding
from t5x_like.sharding.batch_placement import local_rows, row_groups, shard_batch, shard_global_batch
from t5x_like.sharding.constrain import activation_context
from t5x_like.sharding.host_memory import host_shardings, keeps_optimizer_state, on_device
from t5x_like.sharding.mesh import make_mesh
from t5x_like.sharding.rules import FOREIGN_MAY_STAY_WHOLE, Rules, default_rules
from t5x_like.sharding.shardings import batch_shardings, tree_shardings
from t5x_like.sharding.validation import validate_sharding
from t5x_like.training.distillation import distillation_apply
from t5x_like.training.losses import ModelApply
from t5x_like.training.optimizers.make_optimizer import make_optimizer, state_logical_axes
from t5x_like.training.preference import preference_apply
from t5x_like.training.schedules import make_schedule
from t5x_like.training.stochastic_rounding import widened
from t5x_like.training.train_step import init_state, make_eval_step, make_train_step
from t5x_like.utils.type_aliases import PyTree

Batch = Mapping[str, Mapping[str, Any]]
FROZEN = ("base", "teacher")
"""Parts of the training state of a process that no step changes and no checkpoint holds."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Everything that a run computes, compiled for a mesh or ready to be compiled.

    A program is equal to itself only, so that it can be a static argument of a function that is compiled for it.

    Attributes:
      mesh_reason: Reason for the mesh if it was chosen (`sharding.auto`); None if the run gives its degrees.
      abstract_state: Training state {params, opt_state, step, rng} as `jax.ShapeDtypeStruct`s with shardings;
        checkpoints are restored into it.
      lora: Specification of the adapters of a LoRA run, else None. In a LoRA run "params" are the adapters, and the
        training state holds the frozen parameters beside them, as "base".
      abstract_base_params: Frozen parameters as `jax.ShapeDtypeStruct`s with shardings, as a base is read; None without
        adapters.
      abstract_base: The same as the training state holds them as "base": in 8 bits if `LoraConfig.base_type` is int8.
      abstract_teacher_params: The same of the teacher of a run with distillation, which the training state holds as
        "teacher"; None without one, or if its distributions are stored.
      train_step: (state, batch) -> (state, metrics), jitted; the state is donated.
      eval_step: (params, batch) -> metrics, jitted, for batches of the shape of `evaluation_spec`.
    """

    run: RunConfig
    mesh: jax.sharding.Mesh
    mesh_reason: str | None
    rules: Rules
    spec: ModelSpec
    optimizer: optax.GradientTransformation
    batch_spec: BatchSpec
    abstract_state: PyTree
    logical_axes: PyTree
    lora: LoraSpec | None
    abstract_base_params: PyTree | None
    abstract_base: PyTree | None
    abstract_teacher_params: PyTree | None
    train_step: Callable[[PyTree, Batch], tuple[PyTree, dict[str, WeightedMean]]]
    eval_step: Callable[[PyTree, Batch], dict[str, WeightedMean]]

    @property
    def abstract_params(self) -> PyTree:
        """Trained parameters as `jax.ShapeDtypeStruct`s with shardings."""
        return self.abstract_state["params"]

    @property
    def abstract_whole_params(self) -> PyTree:
        """The whole parameters, float32, as `jax.ShapeDtypeStruct`s with shardings, for reading them from a
        checkpoint."""
        if self.abstract_base_params is not None:
            return self.abstract_base_params
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), self.abstract_params
        )

    @property
    def attention(self) -> str:
        """Backends that run the attentions of a training step, in words."""
        platform = self.mesh.devices.flat[0].platform
        split = sequence_split_of(self.mesh, self.rules)
        return describe_attention(self.run.model, self.batch_spec, platform, split=split)

    def init(self) -> PyTree:
        """Return a new training state, without base parameters, created on its devices: no host holds all of it."""
        return init_program_state(self)

    def kept_base(self, params: PyTree) -> PyTree:
        """Return the parameters of a base as the training state holds them. If kernels are rounded, all are donated."""
        if self.lora is None or not self.lora.quantized:
            return params
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_base)
        return jax.jit(self.lora.kept, out_shardings=shardings, donate_argnums=0)(params)

    def full_params(self, state: PyTree) -> PyTree:
        """Return the parameters that `model` and `eval_step` take from a training state: the average if there is one,
        and adapters joined."""
        params = state.get("ema", state["params"])
        return params if self.lora is None else self.lora.joined(state["base"], params)

    def checkpointable_state(self, state: PyTree) -> PyTree:
        """Return the training state as a checkpoint has it.

        It is without frozen parameters of a LoRA base and of a teacher. If there is an average of the parameters, that
        is "params", which other commands read, and the parameters themselves are "raw_params".
        """
        saved = {name: part for name, part in state.items() if name not in (*FROZEN, "ema")}
        return saved | {"params": state["ema"], "raw_params": state["params"]} if "ema" in state else saved

    def training_state(self, saved: PyTree) -> PyTree:
        """Return the training state without base parameters: the inverse of `checkpointable_state`."""
        state = {name: part for name, part in saved.items() if name != "raw_params"}
        return state | {"params": saved["raw_params"], "ema": saved["params"]} if "raw_params" in saved else state

    def with_new_average(self, state: PyTree) -> PyTree:
        """Return a state whose average, if it has one, begins at its parameters."""
        return state | {"ema": widened(jax.tree.map(jnp.copy, state["params"]))} if "ema" in state else state

    def model(self, params: PyTree) -> Model:
        """Return the model with these parameters; call it within `mesh_context()`."""
        return bind_params(self.spec.graphdef, params)

    @contextlib.contextmanager
    def mesh_context(self) -> Iterator[None]:
        """Constrain the activations of models that are traced within to this program's mesh."""
        with activation_context(self.mesh, self.rules):
            yield

    def host_shard(self) -> HostShard:
        """Return the rows of global batches that this process must load, because its devices hold them."""
        groups = row_groups(self.mesh, self.rules)
        group = next(index for index, processes in enumerate(groups) if jax.process_index() in processes)
        keeps_state = groups[group][0] == jax.process_index()
        return HostShard(group, len(groups), functools.partial(local_rows, self.mesh, self.rules), keeps_state)

    def shard_batch(self, batch: Batch) -> Batch:
        """Place this process's `host_shard` of a global batch on the mesh, asynchronously."""
        return shard_batch(self.mesh, self.rules, batch)

    def shard_global_batch(self, batch: Batch) -> Batch:
        """Place a global batch that every process holds as a whole on the mesh, asynchronously."""
        return shard_global_batch(self.mesh, self.rules, batch)


def build_program(run: RunConfig, devices: Sequence[Any]) -> Program:
    """Build the program of a run for `devices`, which may be described only (a topology to compile for).

    Raises:
      ConfigError: The run does not fit the devices; all problems are listed.
    """
    rules = default_rules(run.sharding)
    spec = abstract_model(run.model)
    batch_shapes = batch_spec(run)
    schedule = make_schedule(run.training)
    lora = None if run.training.lora is None else lora_spec(run.training.lora, run.model)
    trained, trained_axes = (spec.params, spec.logical_axes) if lora is None else (lora.shapes, lora.logical_axes)
    optimizer = make_optimizer(run.training, trained_axes)

    averaged = run.training.ema_decay is not None
    state = jax.eval_shape(functools.partial(_new_state, run, optimizer), trained)
    axes = {
        "params": trained_axes,
        "opt_state": state_logical_axes(state["opt_state"], trained, trained_axes),
        "step": (),
        "rng": (None,),
    } | ({"ema": trained_axes} if averaged else {})
    if "guard" in state:
        axes["guard"] = {name: (None,) * leaf.ndim for name, leaf in state["guard"].items()}
    base, base_axes = (None, None)
    if lora is not None:
        base, base_axes = jax.eval_shape(lora.kept, spec.params), lora.kept_axes(spec.logical_axes)
    sharding, mesh_reason = run.sharding, None
    if sharding.auto:
        # The choice counts everything that stays on the devices during a step, frozen base parameters among it.
        trees = {**state, "gradients": state["params"]} | ({} if lora is None else {"base": base})
        names = {**axes, "gradients": trained_axes} | ({} if lora is None else {"base": base_axes})
        opt_state = (names.pop("opt_state"), trees.pop("opt_state"))
        params = (spec.logical_axes, spec.params)
        sharding, mesh_reason = choose_sharding(run, rules, devices, params, (names, trees), opt_state)
    mesh = make_mesh(sharding, devices)
    problems = validate_sharding(run, mesh, rules, spec.logical_axes, spec.params)
    if problems:
        raise ConfigError(problems)
    shardings = tree_shardings(mesh, rules, axes, state)
    state_on_host = keeps_optimizer_state(run)
    if state_on_host:
        shardings["opt_state"] = host_shardings(shardings["opt_state"], state["opt_state"])
    abstract_state = _with_shardings(state, shardings)
    abstract_base_params = abstract_base = None
    carried = shardings
    if lora is not None:
        carried = carried | {"base": tree_shardings(mesh, rules, base_axes, base)}
        abstract_base = _with_shardings(base, carried["base"])
        abstract_base_params = _with_shardings(spec.params, tree_shardings(mesh, rules, spec.logical_axes, spec.params))
    distillation, teacher, abstract_teacher = run.training.distillation, None, None
    if distillation is not None and distillation.top_k is None:
        assert distillation.model is not None
        teacher = abstract_model(distillation.model)
        placed = tree_shardings(
            mesh, rules, teacher.logical_axes, teacher.params, may_stay_whole=FOREIGN_MAY_STAY_WHOLE
        )
        carried, abstract_teacher = carried | {"teacher": placed}, _with_shardings(teacher.params, placed)

    def output(params: PyTree, batch: Mapping[str, jax.Array], dropout_rng: jax.Array | None) -> ModelOutput:
        return bind_params(spec.graphdef, params).output(batch, dropout_rng=dropout_rng)

    preference = run.data.preference
    apply = output if preference is None else preference_apply(output, preference)

    def train(state: PyTree, batch: Batch) -> tuple[PyTree, dict[str, WeightedMean]]:
        # Frozen parameters enter by closure: they are neither differentiated nor updated.
        trainable = {name: part for name, part in state.items() if name not in FROZEN}
        frozen = {name: part for name, part in state.items() if name in FROZEN}
        if state_on_host:
            # The shardings of the result send it back.
            trainable["opt_state"] = on_device(trainable["opt_state"])

        def apply_trained(params: PyTree, batch: Mapping[str, jax.Array], dropout_rng: jax.Array | None) -> ModelOutput:
            return apply(params if lora is None else lora.joined(frozen["base"], params), batch, dropout_rng)

        def teacher_logits(batch: Mapping[str, jax.Array]) -> jax.Array:
            assert teacher is not None
            logits: jax.Array = bind_params(teacher.graphdef, frozen["teacher"])(batch)
            return logits

        step_apply: ModelApply = apply_trained
        if distillation is not None:
            live = teacher_logits if distillation.top_k is None else None
            step_apply = distillation_apply(apply_trained, live, distillation)
        trainable, metrics = make_train_step(run, step_apply, optimizer, schedule)(trainable, batch)
        return trainable | frozen, metrics

    def constrained(step: Callable[..., Any]) -> Callable[..., Any]:
        """Return the step, traced with its activations constrained to the mesh."""
        return activation_context(mesh, rules)(step)

    inputs = batch_shardings(mesh, rules, batch_shapes)
    train_step = jax.jit(
        constrained(train),
        in_shardings=(carried, inputs),
        out_shardings=(carried, None),
        donate_argnums=0,
    )
    evaluation_inputs = batch_shardings(mesh, rules, evaluation_spec(run))
    # With adapters, parameters may arrive merged or not: jit takes the sharding that they have.
    params_shardings = shardings["params"] if lora is None else None
    eval_step = jax.jit(constrained(make_eval_step(run, apply)), in_shardings=(params_shardings, evaluation_inputs))
    return Program(
        run=run,
        mesh=mesh,
        mesh_reason=mesh_reason,
        rules=rules,
        spec=spec,
        optimizer=optimizer,
        batch_spec=batch_shapes,
        abstract_state=abstract_state,
        logical_axes=axes,
        lora=lora,
        abstract_base_params=abstract_base_params,
        abstract_base=abstract_base,
        abstract_teacher_params=abstract_teacher,
        train_step=train_step,
        eval_step=eval_step,
    )


def _with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)


def _new_state(run: RunConfig, optimizer: optax.GradientTransformationExtraArgs, params: PyTree) -> PyTree:
    training = run.training
    return init_state(
        params,
        optimizer,
        training.seed,
        parameter_type=training.parameter_type,
        averaged=training.ema_decay is not None,
        guard=training.guard,
    )


def init_program_state(program: Program) -> PyTree:
    """Return a new training state on the program's devices."""
    run = program.run
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)

    def make() -> PyTree:
        key = jax.random.key(run.training.seed)
        params = init_params(run.model, key) if program.lora is None else program.lora.init(key)
        state = _new_state(run, program.optimizer, params)
        # Zeros of an optimizer can be weakly typed, those that a step returns are not: the step would compile twice.
        return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state)

    options = options_to_run_once(program.mesh.devices.flat[0].platform, os.environ)
    return jax.jit(make, out_shardings=shardings, compiler_options=options)()
