"""`t5x-like export`: write a model for programs that do not have this package."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from t5x_like.checkpoints import model_dir
from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.checkpoints.model_dir import HUGGINGFACE_DIR
from t5x_like.config import ModelConfig
from t5x_like.decoding.prompt_format import prompt_format
from t5x_like.errors import EXIT_OK, ConfigError, ConfigProblem, DataError
from t5x_like.evaluation.heldout_loss import evaluate_held_out
from t5x_like.evaluation.results_store import DIFFUSION_BOUND
from t5x_like.export.bundle import Prompts, write_exported
from t5x_like.export.quantization import contracted_axes, quantized, unpacked
from t5x_like.export.traced_functions import PLATFORMS, Lengths, Platform
from t5x_like.interop.huggingface.checkpoint import TOKENIZER_FILES
from t5x_like.interop.huggingface.tokenizer_export import write_tokenizer
from t5x_like.model_loading import LoadedModel, open_model
from t5x_like.utils import tree_paths
from t5x_like.utils.console import Console
from t5x_like.utils.type_aliases import PyTree

Scores = dict[str, Any]
DTYPES = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Source:
    """Model that is exported.

    Attributes:
      prompts: Tokens around a prompt, as in training.
      prompt_length: Tokens of the longest prompt in training; None if that is not known.
      write_tokenizer: Writes the tokenizer's files into a directory; returns a line for each that it cannot write.
      evaluate: Scores parameters on held-out text; None for a model without data.
    """

    config: ModelConfig
    params: PyTree
    prompts: Prompts
    prompt_length: int | None
    write_tokenizer: Callable[[Path], list[str]]
    evaluate: Callable[[PyTree], Scores] | None


def export_command(
    model: CheckpointRef,
    out: Path,
    *,
    dtype: str = "float32",
    prompt_length: int | None = None,
    max_new_tokens: int = 128,
    platforms: Sequence[Platform] = PLATFORMS,
    mode: str | None = None,
    num_batches: int | None = None,
) -> int:
    """Export a model as StableHLO with its weights, tokenizer and a loader.

    Args:
      model: Directory of the model, with its step if one is named.
      out: Directory to write, which must not exist.
      dtype: Type of matrices and tables: float32, bfloat16 or int8. Its cost in held-out loss is printed.
      prompt_length: Tokens of the longest prompt; None: as in training, 512 for an imported model.
      max_new_tokens: Tokens of the longest answer.
      platforms: Platforms that the programs run on.
      mode: Mode whose prompts the manifest describes; None for the default of `prompt_format.prompt_format`.
      num_batches: Held-out batches for the cost; None: as in the run's configuration.

    Returns:
      The exit code.

    Raises:
      UserError: the model cannot be exported, or `out` exists or cannot be written.
    """
    model_dir.require_free(out)  # Before minutes of work.
    loaded = open_model(model)
    if loaded.trained_on is None and mode is not None:
        raise ConfigError([ConfigProblem("mode", mode, "none: the model was imported, and its modes are not known")])
    source = _imported_source(loaded) if loaded.trained_on is None else _run_source(loaded, mode, num_batches)
    lengths = Lengths(prompt_length or source.prompt_length or 512, max_new_tokens)
    # A program for several platforms cannot hold the kernels of one.
    config = dataclasses.replace(source.config, attention="reference")
    weights = _packed(source.params, config, dtype)
    console = Console()
    cost = None
    if dtype != "float32":
        cost = _cost(source, unpacked(weights), console, dtype)
    with model_dir.made_whole(out) as partial:
        sizes = write_exported(
            partial, config, weights, lengths, prompts=source.prompts, dtype=dtype, platforms=platforms, cost=cost
        )
        left_out = source.write_tokenizer(partial)
    for line in left_out:
        console.print(f"  not written: {line}", markup=False, highlight=False, soft_wrap=True)
    total = sum(leaf.nbytes for leaf in weights.values())
    programs = ", ".join(f"{name} ({size:,} bytes)" for name, size in sizes.items())
    line = f"{out}: {programs} for {', '.join(platforms)}; weights of {total:,} bytes in {dtype}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    return EXIT_OK


def _packed(params: PyTree, config: ModelConfig, dtype: str) -> dict[str, jax.Array]:
    if dtype == "int8":
        return quantized(params, config)
    if dtype not in DTYPES:
        raise ConfigError([ConfigProblem("--dtype", dtype, f"one of {', '.join(DTYPES)}")])
    large = contracted_axes(config)
    return {
        path: leaf.astype(jnp.dtype(dtype)) if path in large else leaf
        for path, leaf in tree_paths.by_path(params).items()
    }


def _run_source(loaded: LoadedModel, mode: str | None, num_batches: int | None) -> Source:
    run, data = loaded.run, loaded.run.data
    generates = data.layout != "encoder" and data.labelled is None and data.seqio is None
    form = prompt_format(data, mode) if generates else None
    program = loaded.program
    step, params = loaded.params()
    prompts = Prompts()
    if form is not None:
        vocabulary = loaded.tokenizer.vocabulary
        allowed_V = form.allowed(vocabulary, run.model.vocab_size)
        # The tokens around a prompt: those around a token -1 in its place.
        surrounded = form.ids([-1], vocabulary)
        index = surrounded.index(-1)
        forbidden = np.flatnonzero(~allowed_V).tolist()
        prompts = Prompts(surrounded[:index], surrounded[index + 1 :], form.bidirectional, forbidden)

    def scores(params: PyTree) -> Scores:
        placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, loaded.abstract_params)
        batches = num_batches or run.evaluation.num_batches
        return evaluate_held_out(program, placed, loaded.stores, step=step, num_batches=batches)

    def write(out: Path) -> list[str]:
        if run.data.seqio is not None:
            return ["a tokenizer: the run reads a seqio Task live"]
        return write_tokenizer(out, loaded.tokenizer, loaded.model.architecture)

    prompt_length = data.inputs_length if data.seqio is None else None
    return Source(run.model, params, prompts, prompt_length, write, scores)


def _imported_source(loaded: LoadedModel) -> Source:
    _, params = loaded.params()
    folder = loaded.path if loaded.kind == "huggingface" else loaded.path / HUGGINGFACE_DIR

    def write(out: Path) -> list[str]:
        names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
        for name in names:
            shutil.copyfile(folder / name, out / name)
        return [] if names else ["a tokenizer: none came with the imported model"]

    return Source(loaded.model, params, Prompts(), None, write, None)


def _cost(source: Source, params: PyTree, console: Console, dtype: str) -> Scores | None:
    """Print and return the loss on held-out text before and after the change of type."""
    if source.evaluate is None:
        line = f"loss of {dtype}: not measured, since an imported model has no held-out text"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        return None
    before, after = _losses(source.evaluate(source.params)), _losses(source.evaluate(params))
    if not before:
        raise DataError("found no held-out text to measure the loss on, expected a validation split in the stores")
    table = Table(title=f"held-out loss, nats per token, and what {dtype} weights cost")
    for name in ("", "float32", dtype, "difference"):
        table.add_column(name, justify="right" if name else "left")
    for name, loss in before.items():
        table.add_row(name, f"{loss:.4f}", f"{after[name]:.4f}", f"{after[name] - loss:+.5f}")
    console.print(table)
    return {"loss": {name: {"float32": loss, dtype: after[name]} for name, loss in before.items()}}


def _losses(result: Scores) -> dict[str, float]:
    losses = {name: scores["loss"] for name, scores in result["objectives"].items()}
    if result["prefix_lm"] is not None:
        losses["bits per byte of continuations"] = result["prefix_lm"]["bits_per_byte"]
    if DIFFUSION_BOUND in result:
        losses["bits per byte of continuations, upper bound"] = result[DIFFUSION_BOUND]["bits_per_byte"]
    return losses
