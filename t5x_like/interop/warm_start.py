"""Warm starts: initial parameters from another model, by assignment maps (`config.initialization`)."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from t5x_like import run_directory
from t5x_like.adapters.restore import restore_whole
from t5x_like.checkpoints import model_dir
from t5x_like.checkpoints.interface import Checkpoints
from t5x_like.checkpoints.opening import open_checkpoints
from t5x_like.config import CheckpointConfig, InitializeFrom, ModelConfig, RunConfig
from t5x_like.data.store.token_store import Store
from t5x_like.data.tokenizers.loading import has_tokenizer, kept_tokenizer, load_directory_tokenizer, stored_config
from t5x_like.data.tokenizers.published import load_published
from t5x_like.data.tokenizers.tokenizer import Tokenizer, have_same_pieces
from t5x_like.errors import ConfigError, ConfigProblem, SafetyError
from t5x_like.interop.huggingface.checkpoint import HuggingFaceModel, open_directory
from t5x_like.interop.weight_files import has_weights
from t5x_like.models import vocab_padding
from t5x_like.models.factory import ModelSpec, abstract_model
from t5x_like.program import Program
from t5x_like.sharding.rules import FOREIGN_MAY_STAY_WHOLE
from t5x_like.sharding.shardings import tree_shardings
from t5x_like.storage.mirror import local_copy
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

Assignment = dict[str, str | None]
"""Path in the source of each parameter; None for a parameter that keeps its fresh value."""
SOURCE = "initialize_from.directory"
NOISE = 0.1
"""Noise of a table's new rows, in standard deviations of the old rows."""
_SHOWN = 20
"""Largest number of problems in one message."""


def initial_state(program: Program, report: Callable[[str], None]) -> PyTree:
    """Return the sharded state that a run starts from: fresh, or with the parameters that its configuration names.

    Args:
      program: Program of the run.
      report: Called with each line of the report.

    Raises:
      ConfigError: the maps do not fit the two models; all problems are listed.
      UserError: the source cannot be read.
    """
    source = program.run.initialize_from
    if source is None:
        return program.init()
    directory = local_copy(source.directory, SOURCE)
    published = _published(directory)
    old_model = model_dir.read_model(directory)[0] if published is None else published.model
    stored = abstract_model(old_model)
    shardings = tree_shardings(
        program.mesh, program.rules, stored.logical_axes, stored.params, may_stay_whole=FOREIGN_MAY_STAY_WHOLE
    )
    wanted = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), stored.params, shardings
    )
    # The models may be padded to different multiples: their parameters are compared without padding.
    specs = _without_padding(old_model, stored), _without_padding(program.run.model, program.spec)
    assignment = plan_mapping(source, *specs)
    adapted = functools.partial(_adapted, program, assignment, old_model, *specs, report=report)
    if published is not None:
        return adapted(published.params(wanted), f"parameters of {directory}")
    manager = open_checkpoints(directory, CheckpointConfig(), read_only=True)
    if source.restore_optimizer:
        return _with_optimizer(program, manager, directory, source, report)
    step, params, _ = restore_whole(directory, old_model, source.step, wanted)
    return adapted(params, f"parameters of step {step} of {directory}")


def _without_padding(model: ModelConfig, spec: ModelSpec) -> ModelSpec:
    """Return the specification of the model without padding of its vocabulary; `spec` is that of the model itself."""
    return abstract_model(vocab_padding.without_padding(model)) if model.vocab_padding_rows else spec


def _adapted(
    program: Program,
    assignment: Assignment,
    source: ModelConfig,
    old_spec: ModelSpec,
    new_spec: ModelSpec,
    params: PyTree,
    title: str,
    *,
    report: Callable[[str], None],
) -> PyTree:
    """Return the state with the parameters of the source, and print where each is from. The specifications, of the
    source and of the new model, are without padding of their vocabularies."""
    state = program.init()
    model, seed = program.run.model, program.run.training.seed
    report(f"{title}:")
    for line in table(assignment, tree_paths.shapes(old_spec.params), tree_paths.shapes(new_spec.params)):
        report(line)

    def adapted(old: PyTree, new: PyTree) -> PyTree:
        old, new = vocab_padding.cut(old, source), vocab_padding.cut(new, model)
        return vocab_padding.padded(apply_mapping(assignment, old, new, new_spec, seed), model)

    out = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_params)
    return {**state, "params": jax.jit(adapted, out_shardings=out)(params, state["params"])}


def _published(directory: Path) -> HuggingFaceModel | None:
    """Return the model of a Hugging Face directory; None for a run or an imported model."""
    if (directory / model_dir.MODEL).is_file() or (directory / run_directory.CHECKPOINTS).is_dir():
        return None
    return open_directory(directory) if (directory / "config.json").is_file() and has_weights(directory) else None


def require_tokenizer_of_source(run: RunConfig, stores: Sequence[Store]) -> None:
    """Check that the ids of the run's data mean what they mean in the model that it starts from.

    Raises:
      SafetyError: the tokenizers differ, and the run does not initialize the token table itself.
    """
    source = run.initialize_from
    if source is None or not stores:
        return
    if any(re.fullmatch(pattern, "token_embedder/embedding") for pattern in source.reinit):
        return
    directory = local_copy(source.directory, SOURCE)
    require_tokenizer_of(directory, stores, ", or name token_embedder/embedding in initialize_from.reinit")


def require_tokenizer_of(directory: Path, stores: Sequence[Store], fix: str = "") -> None:
    """Check that the ids of the stores mean what they mean in the model of a directory. `fix` ends the message.

    Raises:
      SafetyError: the tokenizers differ.
    """
    if not stores:
        return
    tokenizer = _tokenizer_of(directory, is_published=stored_config(stores[0].tokenizer).kind == "published")
    if tokenizer is not None and not have_same_pieces(stores[0].tokenizer, tokenizer):
        raise SafetyError(
            f"{directory}: found another tokenizer ({tokenizer.vocabulary.base_size:,} pieces) than that of "
            f"{stores[0].path} ({stores[0].tokenizer.vocabulary.base_size:,}), by whose ids the parameters would read "
            "other text; prepare the data with --data.tokenizer.kind published --data.tokenizer.path and the model's "
            f"directory{fix}"
        )


def _tokenizer_of(directory: Path, *, is_published: bool) -> Tokenizer | None:
    """Return the tokenizer of a run, of an imported model or of a Hugging Face directory; None if it has none.

    Args:
      is_published: Read the files of a published model as a tokenizer of that kind does. Of a directory that was
        exported from here, other readers take the SentencePiece model, which does not list the mode tokens.
    """
    kept = kept_tokenizer(directory / run_directory.TOKENIZER)
    if kept is not None:
        return kept
    imported = (directory / model_dir.MODEL).is_file()
    folder = directory / model_dir.HUGGINGFACE_DIR if imported else directory
    if not has_tokenizer(folder):
        return None
    if is_published:
        return load_published(folder, 0)
    published = _published(directory)
    model = model_dir.read_model(directory)[0] if published is None else published.model
    return load_directory_tokenizer(folder, model)


def _with_optimizer(
    program: Program, manager: Checkpoints, directory: Path, source: InitializeFrom, report: Callable[[str], None]
) -> PyTree:
    """Return the state with parameters and optimizer state of the same model; step and random key are fresh."""
    names = ("params", "opt_state") if (directory / model_dir.MODEL).is_file() else None
    saved = program.checkpointable_state(program.abstract_state)
    step, found, _ = manager.restore({name: saved[name] for name in names or saved}, source.step)
    report(f"parameters and optimizer state of step {step} of {directory}")
    return {**program.init(), "params": found["params"], "opt_state": found["opt_state"]}


def plan_mapping(source: InitializeFrom, old: ModelSpec, new: ModelSpec) -> Assignment:
    """Return the parameter of the source for each parameter of the new model.

    Raises:
      ConfigError: a rule or pattern has no effect, a parameter has no source, or shapes differ.
    """
    source_shapes, new_shapes = tree_paths.shapes(old.params), tree_paths.shapes(new.params)
    assignment, problems = assign(source, source_shapes, new_shapes)
    axes = _axes(new)
    for path, origin in assignment.items():
        if origin is None or source_shapes[origin] == new_shapes[path]:
            continue
        may_grow = any(re.fullmatch(pattern, path) for pattern in source.resize)
        grows = _grows(source_shapes[origin], new_shapes[path], axes[path])
        if not (may_grow and grows):
            found = f"{source_shapes[origin]} from {origin}"
            fix = f"name the table in initialize_from.resize: {path!r}" if grows else ""
            problems.append(ConfigProblem(path, found, str(new_shapes[path]), fix))
    if problems:
        more = len(problems) - _SHOWN
        rest = [ConfigProblem("initialize_from", f"{more} more problems", "none")] if more > 0 else []
        raise ConfigError([*problems[:_SHOWN], *rest])
    return assignment


def assign(
    source: InitializeFrom, source_paths: Iterable[str], new_paths: Iterable[str]
) -> tuple[Assignment, list[ConfigProblem]]:
    """Apply the rules to the paths of the source's parameters and of the new model's, regardless of shapes.

    Returns:
      The path in the source of each parameter of the new model, and the problems.
    """
    source_paths, new_paths = list(source_paths), list(new_paths)
    problems: list[ConfigProblem] = []
    assignment: Assignment = {}
    for field, patterns in (("reinit", source.reinit), ("resize", source.resize)):
        for number, pattern in enumerate(patterns):
            matched = [path for path in new_paths if re.fullmatch(pattern, path)]
            if field == "reinit":
                assignment |= dict.fromkeys(matched)
            if not matched:
                expected = f"a regular expression for whole paths of the new model's parameters, such as {new_paths[0]}"
                problems.append(ConfigProblem(f"initialize_from.{field}.{number}", f"{pattern!r}, unused", expected))
    for number, (pattern, replacement) in enumerate(source.rename_rules):
        used, matches = False, [match for path in source_paths if (match := re.fullmatch(pattern, path))]
        for match in matches:
            path = match.expand(replacement)
            if path in new_paths and path not in assignment:
                assignment[path] = match.string
                used = True
        if not used:
            reason = (
                "that match no parameter of the source" if not matches else f"such as {matches[0].expand(replacement)}"
            )
            expected = "a rule that leads to a parameter of the new model that no rule before it has led to"
            problems.append(
                ConfigProblem(
                    f"initialize_from.rename_rules.{number}",
                    f"{pattern!r} -> {replacement!r}, paths {reason}",
                    expected,
                )
            )
    for path in new_paths:
        if path not in assignment:
            fix = "or name it in initialize_from.reinit to keep its initial values"
            problems.append(ConfigProblem(path, "no source", "a rule of initialize_from that leads there", fix))
    return {path: assignment.get(path) for path in new_paths}, problems


def table(
    assignment: Assignment,
    source_shapes: Mapping[str, tuple[int, ...]],
    new_shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Return the report: a line with the source of each parameter, then the parameters of the source that are
    unused."""
    rows = []
    for path, origin in assignment.items():
        if origin is None:
            rows.append((path, str(new_shapes[path]), "fresh"))
        else:
            grown = "" if source_shapes[origin] == new_shapes[path] else f", grown from {source_shapes[origin]}"
            rows.append((path, str(new_shapes[path]), f"from {origin}{grown}"))
    rows += [
        (path, str(source_shapes[path]), "of the source, not used")
        for path in source_shapes
        if path not in assignment.values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"  {path:{widths[0]}}  {shape:{widths[1]}}  {origin}" for path, shape, origin in rows]


def apply_mapping(assignment: Assignment, old: PyTree, new: PyTree, spec: ModelSpec, seed: int) -> PyTree:
    """Return the parameters: copies of the source's, with grown tables, and fresh ones of `new`.

    Args:
      assignment: Path in the source of each parameter.
      old: Parameters of the source.
      new: Fresh parameters of the new model.
      spec: New model.
      seed: Seed of the noise in new rows.
    """
    by_path = tree_paths.by_path(old)
    axes = _axes(spec)

    def one(name: str, fresh: jax.Array) -> jax.Array:
        origin = assignment[name]
        if origin is None:
            return fresh
        value = by_path[origin]
        if value.shape != fresh.shape:
            # A key per parameter, by its path: the noise does not depend on which other tables grow.
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
            value = grown(value, fresh.shape, axes[name].index("vocab"), key)
        # A source parameter that is used twice must not be one array, which a training step would donate twice.
        return jnp.copy(value).astype(fresh.dtype)

    return tree_paths.map_by_path(one, new)


def grown(value: jax.Array, shape: tuple[int, ...], axis: int, key: jax.Array) -> jax.Array:
    """Return `value` with new rows along `axis`: mean + NOISE * standard deviation * normal, over the existing rows."""
    more = shape[axis] - value.shape[axis]
    # New rows begin near the mean of the old ones: their logits are then ordinary, and the loss does not jump (Hewitt
    # 2021).
    mean, deviation = (statistic(value, axis=axis, keepdims=True) for statistic in (jnp.mean, jnp.std))
    noise = jax.random.normal(key, (*shape[:axis], more, *shape[axis + 1 :]))
    return jnp.concatenate([value, mean + NOISE * deviation * noise], axis=axis)


def _grows(old: tuple[int, ...], new: tuple[int, ...], axes: tuple[str | None, ...]) -> bool:
    if len(old) != len(new) or "vocab" not in axes:
        return False
    at = axes.index("vocab")
    return new[at] > old[at] and all(a == b for dim, (a, b) in enumerate(zip(old, new, strict=True)) if dim != at)


def _axes(spec: ModelSpec) -> dict[str, tuple[str | None, ...]]:
    found: dict[str, tuple[str | None, ...]] = {}
    tree_paths.map_by_path(lambda path, _, axes: found.update({path: axes}), spec.params, spec.logical_axes)
    return found
