"""`t5x-like export`: a run, or an imported model, for programs that do not have this package."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from t5x_like import run_directory
from t5x_like.config import EXIT_OK, ConfigError, DataError, ModelConfig, Problem
from t5x_like.data.store import Store
from t5x_like.decoding.prompts import prompt_format
from t5x_like.decoding.trained import open_trained
from t5x_like.evaluation.evaluator import evaluate
from t5x_like.export.directory import Prompts, write_exported
from t5x_like.export.functions import PLATFORMS, Lengths, Platform
from t5x_like.export.int8 import contracted_axes, flat, quantized, unpacked
from t5x_like.interop import imported
from t5x_like.interop.adapted import restore_whole
from t5x_like.interop.huggingface.directories import KEPT, TOKENIZER_FILES
from t5x_like.interop.huggingface.tokenizer import write_tokenizer

Tree = Any
Scores = dict[str, Any]
DTYPES = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
      prompt_length: Of training; None if that is not known.
      write_tokenizer: Writes its files into a directory; returns what could not be written.
      evaluate: Scores parameters on held-out text; None where there is none.
    """

    config: ModelConfig
    params: Tree
    prompts: Prompts
    prompt_length: int | None
    write_tokenizer: Callable[[Path], list[str]]
    evaluate: Callable[[Tree], Scores] | None


def export_command(
    source_dir: Path,
    out: Path,
    *,
    dtype: str = "float32",
    prompt_length: int | None = None,
    max_new_tokens: int = 128,
    platforms: Sequence[Platform] = PLATFORMS,
    mode: str | None = None,
    step: int | None = None,
    num_batches: int | None = None,
) -> int:
    """Exports a model as StableHLO with its weights, tokenizer and a loader.

    Args:
      source_dir: Of a run, or made by `t5x-like convert --from`.
      out: A directory that is not there yet.
      dtype: Of matrices and tables: float32, bfloat16 or int8. What this costs in loss on held-out text is printed.
      prompt_length: Tokens of the longest prompt; None: as in training, 512 for an imported model.
      mode: Whose prompts are described in the manifest; None for the default of `prompts.prompt_format`.
      step: Checkpoint; None for the newest.
      num_batches: Held-out batches for the cost; None: as the run's configuration has it.

    Returns:
      The exit code.

    Raises:
      UserError: the source cannot be used, `out` is there already or cannot be written.
    """
    imported.require_free(out)  # Before minutes of work.
    if (source_dir / imported.MODEL).is_file():
        if mode is not None:
            raise ConfigError([Problem("mode", mode, "none: the model was imported, and its modes are not known")])
        source = _of_import(source_dir, step)
    else:
        source = _of_run(source_dir, step, mode, num_batches)
    lengths = Lengths(prompt_length or source.prompt_length or 512, max_new_tokens)
    # Kernels of one platform have no place in a program for several.
    config = dataclasses.replace(source.config, attention="reference")
    weights = _packed(source.params, config, dtype)
    console = Console()
    cost = None
    if dtype != "float32":
        cost = _cost(source, unpacked(weights), console, dtype)
    with imported.made_whole(out) as partial:
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


def _packed(params: Tree, config: ModelConfig, dtype: str) -> dict[str, jax.Array]:
    if dtype == "int8":
        return quantized(params, config)
    if dtype not in DTYPES:
        raise ConfigError([Problem("--dtype", dtype, f"one of {', '.join(DTYPES)}")])
    large = contracted_axes(config)
    return {path: leaf.astype(jnp.dtype(dtype)) if path in large else leaf for path, leaf in flat(params).items()}


def _of_run(directory: Path, step: int | None, mode: str | None, num_batches: int | None) -> Source:
    data = run_directory.read_config(directory).data
    generates = data.layout != "encoder" and data.labelled is None and data.seqio is None
    form = prompt_format(data, mode) if generates else None
    trained = open_trained(directory)
    run, program = trained.run, trained.program
    step, params = trained.params(step)
    prompts, length = Prompts(), data.inputs_length if data.seqio is None else None
    if form is not None:
        allowed_V = form.allowed(trained.store.vocabulary, run.model.vocab_size)
        surrounded = form.ids([-1], trained.store.vocabulary)
        place = surrounded.index(-1)
        prompts = Prompts(
            surrounded[:place], surrounded[place + 1 :], form.bidirectional, np.flatnonzero(~allowed_V).tolist()
        )

    def scores(params: Tree) -> Scores:
        placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, program.abstract_params)
        batches = num_batches or run.evaluation.num_batches
        return evaluate(program, placed, trained.stores, step=step, num_batches=batches)

    return Source(
        config=run.model,
        params=params,
        prompts=prompts,
        prompt_length=length,
        write_tokenizer=lambda out: _write_store_tokenizer(out, trained.stores),
        evaluate=scores,
    )


def _write_store_tokenizer(out: Path, stores: Sequence[Store]) -> list[str]:
    return write_tokenizer(out, stores[0].tokenizer) if stores else ["a tokenizer: the run reads a seqio Task live"]


def _of_import(directory: Path, step: int | None) -> Source:
    config, _ = imported.read_model(directory)
    _, params, _ = restore_whole(directory, config, step)

    def write(out: Path) -> list[str]:
        found = [name for name in TOKENIZER_FILES if (directory / KEPT / name).is_file()]
        for name in found:
            shutil.copyfile(directory / KEPT / name, out / name)
        return [] if found else ["a tokenizer: none came with the imported model"]

    return Source(config, params, Prompts(), None, write, None)


def _cost(source: Source, params: Tree, console: Console, dtype: str) -> Scores | None:
    """Loss on held-out text before and after, printed and returned."""
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
    return losses
