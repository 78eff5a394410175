"""Writing of an exported directory:

manifest.json         description of the model: special ids, lengths, functions with their arguments and results
encode.stablehlo ...  functions, serialized by `jax.export`
weights.safetensors   weights by path; the scales of an int8 weight have its name with the suffix ".scale"
loader.py             loader of these files that imports only jax
tokenizer files       in the formats of Hugging Face's libraries
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
from t5x_like.export.traced_functions import PLATFORMS, Lengths, Platform, Weights, exported_functions
from t5x_like.interop.safetensors_file import Pending, write

ARGUMENTS = {
    "encode": ["tokens", "lengths"],
    "predict": ["tokens", "lengths"],
    "prefill": ["tokens", "lengths"],
    "decode": ["cache", "tokens"],
}
"""Names of each function's arguments after the weights."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompt format of training, and the ids that answers cannot have.

    Attributes:
      before, after: Token ids in front of and after those of the text.
      bidirectional: Tokens of a decoder's prompt attend to each other in both directions.
      forbidden_ids: Ids that must not be generated.
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
    """Write all files except the tokenizer's; return the size of each function's program in bytes.

    Args:
      weights: Weights by path, see `quantization`.
      lengths: Lengths of prompts and answers.
      prompts: Prompt format, for the manifest.
      dtype: Type of the matrices and tables, for the manifest.
      platforms: Platforms that the programs run on.
      cost: Measured change of the loss, for the manifest.
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
        "decoder_start_token_id": config.decoder_start_token_id,
        "eos_ids": list(config.eos_ids),
        "pad_token_id": config.pad_token_id,
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
    """Return the arguments after the weights and the results as types with shapes; "b" is the number of rows."""
    (_, *arguments), _ = jax.tree.unflatten(function.in_tree, [_text(aval) for aval in function.in_avals])
    results = jax.tree.unflatten(function.out_tree, [_text(aval) for aval in function.out_avals])
    return {"arguments": dict(zip(ARGUMENTS[name], arguments, strict=True)), "results": results}


def _text(aval: Any) -> str:
    return f"{aval.dtype}[{', '.join(map(str, aval.shape))}]"
