"""The one place where the rooms are wired together: a run and some devices make a program."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax

from t5x_like.config import BatchSpec, ConfigError, RunConfig, batch_spec, evaluation_spec
from t5x_like.data.share import Share
from t5x_like.models.build import ModelSpec, abstract, build, merge
from t5x_like.models.lora import Adaptation, adapt
from t5x_like.models.model import Model
from t5x_like.monitoring.metrics import Mean
from t5x_like.outputs import Output
from t5x_like.partitioning.check import check_partitioning
from t5x_like.partitioning.choose import choose_partitioning
from t5x_like.partitioning.constrain import activation_context
from t5x_like.partitioning.mesh import make_mesh
from t5x_like.partitioning.rows import own_rows, put_own, put_whole, row_groups
from t5x_like.partitioning.rules import Rules, standard
from t5x_like.partitioning.shardings import batch_shardings, tree_shardings
from t5x_like.training.optimizers import make_optimizer, state_logical_axes
from t5x_like.training.schedules import make_schedule
from t5x_like.training.state import init_state
from t5x_like.training.step import make_eval_step, make_train_step

Tree = Any
Batch = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Everything that a run computes, compiled for a mesh or ready to be. Equal to itself only, so that it can be a
    static argument of a function that is compiled for it.

    Attributes:
      mesh_reason: Why this mesh, where it was chosen (`partitioning.auto`); None where the run names its degrees.
      abstract_state: The training state {params, opt_state, step, rng} as `jax.ShapeDtypeStruct`s with shardings:
        what a checkpoint is restored into.
      adaptation: Of a run that trains adapters, else None. Its "params" are the adapters, and the state that it trains
        has the frozen parameters beside them, under "base".
      abstract_base: The frozen parameters, as `jax.ShapeDtypeStruct`s with shardings; None without adapters.
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
    abstract_state: Tree
    logical_axes: Tree
    adaptation: Adaptation | None
    abstract_base: Tree | None
    train_step: Callable[[Tree, Batch], tuple[Tree, dict[str, Mean]]]
    eval_step: Callable[[Tree, Batch], dict[str, Mean]]

    @property
    def abstract_params(self) -> Tree:
        return self.abstract_state["params"]

    def init(self) -> Tree:
        """A fresh training state, but for a base, made where it will live: no host holds the whole of it."""
        return init_program_state(self)

    def model_params(self, state: Tree) -> Tree:
        """What `model` and `eval_step` take, out of a state that is trained."""
        if self.adaptation is None:
            return state["params"]
        return self.adaptation.joined(state["base"], state["params"])

    def saved(self, state: Tree) -> Tree:
        """What of a state that is trained belongs into a checkpoint: all but the base."""
        return {name: part for name, part in state.items() if name != "base"}

    def model(self, params: Tree) -> Model:
        """The model with these parameters; call it within `activations()`."""
        return merge(self.spec.graphdef, params)

    @contextlib.contextmanager
    def activations(self) -> Iterator[None]:
        """While tracing in here, the model's activations are constrained to this program's mesh."""
        with activation_context(self.mesh, self.rules):
            yield

    def share(self) -> Share:
        """The rows of global batches that this process is to load, because its devices hold them."""
        groups = row_groups(self.mesh, self.rules)
        group = next(index for index, processes in enumerate(groups) if jax.process_index() in processes)
        keeps_state = groups[group][0] == jax.process_index()
        return Share(group, len(groups), functools.partial(own_rows, self.mesh, self.rules), keeps_state)

    def put(self, batch: Batch) -> Batch:
        """This process's `share` of a global batch, placed on the mesh without waiting for it."""
        return put_own(self.mesh, self.rules, batch)

    def put_whole(self, batch: Batch) -> Batch:
        """A global batch that every process has the whole of, placed on the mesh without waiting for it."""
        return put_whole(self.mesh, self.rules, batch)


def assemble(run: RunConfig, devices: Sequence[Any]) -> Program:
    """Wires a run for `devices`, which may be described only (a topology to compile for).

    Raises:
      ConfigError: the run does not fit the devices; all problems are listed.
    """
    rules = standard(run.partitioning)
    spec = abstract(run.model)
    shape = batch_spec(run)
    schedule = make_schedule(run.training)
    adaptation = None if run.training.lora is None else adapt(run.training.lora, run.model)
    trained, trained_axes = (
        (spec.params, spec.logical_axes) if adaptation is None else (adaptation.shapes, adaptation.logical_axes)
    )
    optimizer = make_optimizer(run.training, trained_axes)

    state = jax.eval_shape(lambda params: init_state(params, optimizer, run.training.seed), trained)
    axes = {
        "params": trained_axes,
        "opt_state": state_logical_axes(state["opt_state"], trained, trained_axes),
        "step": (),
        "rng": (None,),
    }
    partitioning, mesh_reason = run.partitioning, None
    if partitioning.auto:
        trees = {"state": state, "gradients": trained} | ({} if adaptation is None else {"base": spec.params})
        names = {"state": axes, "gradients": trained_axes} | ({} if adaptation is None else {"base": spec.logical_axes})
        partitioning, mesh_reason = choose_partitioning(
            run, rules, devices, (spec.logical_axes, spec.params), (names, trees)
        )
    mesh = make_mesh(partitioning, devices)
    problems = check_partitioning(run, mesh, rules, spec.logical_axes, spec.params)
    if problems:
        raise ConfigError(problems)
    shardings = tree_shardings(mesh, rules, axes, state)
    abstract_state = _placed(state, shardings)
    abstract_base = None
    carried = shardings
    if adaptation is not None:
        carried = shardings | {"base": tree_shardings(mesh, rules, spec.logical_axes, spec.params)}
        abstract_base = _placed(spec.params, carried["base"])

    def apply(params: Tree, batch: Mapping[str, jax.Array], dropout_rng: jax.Array | None) -> Output:
        return merge(spec.graphdef, params).output(batch, dropout_rng=dropout_rng)

    def train(state: Tree, batch: Batch) -> tuple[Tree, dict[str, Mean]]:
        if adaptation is None:
            return make_train_step(run, apply, optimizer, schedule)(state, batch)

        def adapted(adapters: Tree, batch: Mapping[str, jax.Array], dropout_rng: jax.Array | None) -> Output:
            return apply(adaptation.joined(base, adapters), batch, dropout_rng)

        rest = dict(state)
        base = rest.pop("base")
        rest, metrics = make_train_step(run, adapted, optimizer, schedule)(rest, batch)
        return rest | {"base": base}, metrics

    def constrained(step: Callable[..., Any]) -> Callable[..., Any]:
        """The step, traced with its activations constrained to the mesh."""
        return activation_context(mesh, rules)(step)

    inputs = batch_shardings(mesh, rules, shape)
    train_step = jax.jit(
        constrained(train),
        in_shardings=(carried, inputs),
        out_shardings=(carried, None),
        donate_argnums=0,
    )
    held_out = batch_shardings(mesh, rules, evaluation_spec(run))
    # With adapters, parameters may come merged or not: they are taken as they lie.
    of_params = shardings["params"] if adaptation is None else None
    eval_step = jax.jit(constrained(make_eval_step(run, apply)), in_shardings=(of_params, held_out))
    return Program(
        run=run,
        mesh=mesh,
        mesh_reason=mesh_reason,
        rules=rules,
        spec=spec,
        optimizer=optimizer,
        batch_spec=shape,
        abstract_state=abstract_state,
        logical_axes=axes,
        adaptation=adaptation,
        abstract_base=abstract_base,
        train_step=train_step,
        eval_step=eval_step,
    )


def _placed(tree: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)


def init_program_state(program: Program) -> Tree:
    run = program.run
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)

    def make() -> Tree:
        key = jax.random.key(run.training.seed)
        params = build(run.model, key) if program.adaptation is None else program.adaptation.init(key)
        state = init_state(params, program.optimizer, run.training.seed)
        # The zeros of an optimizer can be weakly typed, those of a step are not: it would be compiled twice.
        return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state)

    return jax.jit(make, out_shardings=shardings)()
