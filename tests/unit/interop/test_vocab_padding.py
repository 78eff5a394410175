"""Weights of published models in padded tables: warm starts add the padding, exports leave it out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
from helpers.model_examples import parameters
from helpers.parallel_programs import run_for

from t5x_like.checkpoints import model_dir
from t5x_like.config import InitializeFrom, ModelConfig, ShardingConfig
from t5x_like.export.huggingface_directory import export_directory
from t5x_like.interop.huggingface.checkpoint import write_directory
from t5x_like.interop.safetensors_file import SINGLE
from t5x_like.interop.warm_start import initial_state
from t5x_like.models import presets
from t5x_like.models.vocab_padding import padded
from t5x_like.program import Program, build_program


def llama(multiple: int) -> ModelConfig:
    """Return a Llama of 31 ids with an output projection of its own."""
    preset = presets.llama_3("8b")
    assert preset.decoder is not None
    stack = dataclasses.replace(
        preset.decoder, num_layers=2, d_model=16, num_heads=4, num_kv_heads=4, head_dim=4, d_ff=24
    )
    return dataclasses.replace(
        preset, decoder=stack, vocab_size=31, dtype="float32", remat="none", pad_vocab_to_multiple_of=multiple
    )


def started(directory: Path, multiple: int, tensor: int) -> tuple[Program, dict]:
    """Return the program of a run that begins from the model in a directory, and its initial state."""
    run = run_for("decoder", ShardingConfig(fsdp=1, tensor=tensor))
    run = dataclasses.replace(run, model=llama(multiple), initialize_from=InitializeFrom(directory=str(directory)))
    program = build_program(run, jax.devices()[:tensor])
    return program, initial_state(program, lambda line: None)


def test_published_tables_are_padded_for_the_mesh_and_exported_bitwise(tmp_path: Path) -> None:
    published, imported, exported = (tmp_path / name for name in ("published", "imported", "exported"))
    published.mkdir()
    params = parameters(llama(1))
    write_directory(published, llama(1), params, "llama")
    program, state = started(published, 4, tensor=4)
    assert {shard.data.shape for shard in state["params"]["head"]["kernel"].addressable_shards} == {(16, 8)}
    jax.tree.map(np.testing.assert_array_equal, state["params"], padded(params, llama(4)))

    with model_dir.made_whole(imported) as partial:
        model_dir.save(partial, program.run.model, None, {"params": state["params"]})
    export_directory(str(imported), exported, report=lambda line: None)
    assert (exported / SINGLE).read_bytes() == (published / SINGLE).read_bytes()
    assert (exported / "config.json").read_bytes() == (published / "config.json").read_bytes()

    # From one padding to another.
    _, state = started(imported, 10, tensor=2)
    jax.tree.map(np.testing.assert_array_equal, state["params"], padded(params, llama(10)))
