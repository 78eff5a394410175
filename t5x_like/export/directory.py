"""An exported directory:

manifest.json         what the model is: special ids, lengths, functions with their arguments and results
encode.stablehlo ...  the functions, as `jax.export` serialises them
weights.safetensors   by path; int8 weights have their scales beside them, under ".scale"
loader.py             reads all of this with jax alone
tokenizer files       as Hugging Face's libraries read them
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

import t5x_like
from t5x_like.config.model import ModelConfig
from t5x_like.export import loader
from t5x_like.export.functions import PLATFORMS, Lengths, Platform, Weights, exported_functions
from t5x_like.interop.safetensors import Pending, write

ARGUMENTS = {
    "encode": ["tokens", "lengths"],
    "predict": ["tokens", "lengths"],
    "prefill": ["tokens", "lengths"],
    "decode": ["cache", "tokens"],
}
"""After the weights."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What a caller must know to write prompts as in training and to read the answers.

    Attributes:
      before, after: Token ids around a text's.
      bidirectional: The tokens of a decoder's prompt see each other in both directions.
      forbidden_ids: Ids that are never an answer's.
    """

    before: Sequence[int] = ()
    after: Sequence[int] = ()
    bidirectional: bool = False
    forbidden_ids: Sequence[int] = ()


def write_exported(
    directory: Path,
    config: ModelConfig,
    weights: Weights,
    lengths: Lengths,
    *,
    prompts: Prompts,
    dtype: str,
    platforms: Sequence[Platform] = PLATFORMS,
    cost: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Writes all but the tokenizer; returns the bytes of each function's program.

    Args:
      weights: By path, see `int8`.
      dtype: What the weights are kept in, for the manifest.
      cost: What was measured of the loss, for the manifest.
    """
    functions = exported_functions(config, weights, lengths, bidirectional=prompts.bidirectional, platforms=platforms)
    sizes = {}
    for name, function in functions.items():
        program = function.serialize()
        (directory / f"{name}.stablehlo").write_bytes(program)
        sizes[name] = len(program)
    tensors = [
        Pending(name, np.dtype(leaf.dtype), leaf.shape, partial(np.asarray, leaf)) for name, leaf in weights.items()
    ]
    write(directory / "weights.safetensors", tensors, {"format": "t5x_like"})
    shutil.copyfile(loader.__file__, directory / "loader.py")
    last = next(reversed(config.stacks.values()))
    manifest = {
        "schema_version": loader.SCHEMA_VERSION,
        "made_by": {"t5x_like": t5x_like.__version__, "jax": jax.__version__},
        "architecture": config.architecture,
        "has_encoder": config.encoder is not None,
        "vocab_size": config.vocab_size,
        "width": last.d_model,
        "start_id": config.start_id,
        "eos_ids": list(config.eos_ids),
        "pad_id": config.pad_id,
        "prompt_length": lengths.prompt,
        "new_tokens": lengths.new,
        "prompt": {
            "before": list(prompts.before),
            "after": list(prompts.after),
            "bidirectional": prompts.bidirectional,
        },
        "forbidden_ids": list(prompts.forbidden_ids),
        "weights": {"dtype": dtype, "bytes": sum(leaf.nbytes for leaf in weights.values())},
        "cost": None if cost is None else dict(cost),
        "platforms": list(platforms),
        "calling_convention_version": next(iter(functions.values())).calling_convention_version,
        "functions": {name: _described(name, function) for name, function in functions.items()},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return sizes


def _described(name: str, function: export.Exported) -> dict[str, Any]:
    """Arguments after the weights, and results, as shapes with types; "b" is the number of rows."""
    (_, *arguments), _ = jax.tree.unflatten(function.in_tree, [_text(aval) for aval in function.in_avals])
    results = jax.tree.unflatten(function.out_tree, [_text(aval) for aval in function.out_avals])
    return {"arguments": dict(zip(ARGUMENTS[name], arguments, strict=True)), "results": results}


def _text(aval: Any) -> str:
    return f"{aval.dtype}[{', '.join(map(str, aval.shape))}]"
