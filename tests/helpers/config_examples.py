"""A sound configuration to break, and the shipped recipes."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

from t5x_like.config import (
    CausalLM,
    DataConfig,
    MaskedLM,
    ModelConfig,
    RunConfig,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
    ul2,
)
from t5x_like.config.objectives import Layout

REPOSITORY = Path(__file__).parents[2]
STACK = StackConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64)


def example(layout: Layout = "encoder_decoder") -> RunConfig:
    """Return a run without problems in the given layout."""
    causal = dataclasses.replace(STACK, relative_bias_bidirectional=layout == "prefix_lm")
    mixture = {"encoder": (MaskedLM(),), "causal_lm": (CausalLM(),)}.get(layout, ul2())
    return RunConfig(
        name="example",
        model=ModelConfig(
            encoder=STACK if layout in ("encoder", "encoder_decoder") else None,
            decoder=None if layout == "encoder" else causal,
            vocab_size=320,
        ),
        data=DataConfig(
            layout=layout,
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=32),
            mixture=mixture,
            inputs_length=64,
            targets_length=0 if layout == "encoder" else 64,
        ),
        training=TrainingConfig(num_train_steps=10, global_batch_size=8),
    )


def changed(run: Any, path: str, value: Any) -> Any:
    """Return `run` with the field at a dotted path replaced."""
    name, _, rest = path.partition(".")
    if isinstance(run, tuple):
        index = int(name)
        return (*run[:index], changed(run[index], rest, value) if rest else value, *run[index + 1 :])
    return dataclasses.replace(run, **{name: changed(getattr(run, name), rest, value) if rest else value})


def shipped_recipes() -> list[str]:
    """Return `configs/runs/FILE.py:FUNCTION` of every recipe."""
    references = []
    for path in sorted((REPOSITORY / "configs/runs").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.args.args and not node.name.startswith("_"):
                references.append(f"{path}:{node.name}")
    return references
