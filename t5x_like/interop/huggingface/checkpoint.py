"""Import and export of whole Hugging Face directories.

`import_directory` writes:

    model.json          the family and the model's configuration
    checkpoints/0/      the parameters
    huggingface/        config.json, tokenizer files, and tensors that the model does not use, for a later export
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.checkpoints import model_dir
from t5x_like.checkpoints.model_dir import HUGGINGFACE_DIR
from t5x_like.config.model import ModelConfig
from t5x_like.errors import DataError
from t5x_like.interop.huggingface import family_matching, special_tokens, state_dict
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.weight_map import tensors
from t5x_like.interop.safetensors_file import Pending, TensorFile, write, write_sharded
from t5x_like.interop.weight_files import Weights
from t5x_like.models import vocab_padding
from t5x_like.models.factory import abstract_model
from t5x_like.utils import tree_paths
from t5x_like.utils.links import require_links_inside
from t5x_like.utils.sanitize import say
from t5x_like.utils.type_aliases import PyTree

LEFT_OUT = "left_out.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
"""Files of sentence-transformers beside an encoder, which say how its states become one vector."""
SHARD_BYTES = 5_000_000_000
_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}


@dataclasses.dataclass(frozen=True)
class HuggingFaceModel:
    """Checked Hugging Face directory: its tensors are exactly those of its model, except unused ones."""

    description: family_matching.CheckpointDescription
    weights: Weights

    @property
    def model(self) -> ModelConfig:
        return self.description.model

    def params(self, abstract_params: PyTree) -> PyTree:
        """Return the parameters, float32, each created on the devices of its sharding.

        Args:
          abstract_params: `jax.ShapeDtypeStruct`s, with or without shardings.
        """
        return state_dict.read_params(
            self.description.family.rules, abstract_params, self.weights, self.description.names
        )


def open_directory(directory: Path, *, scale_logits: bool | None = None) -> HuggingFaceModel:
    """Open a directory: read config.json and the headers of the tensors.

    Args:
      directory: Hugging Face directory.
      scale_logits: Overrides whether a T5's logits are scaled; umT5's config.json cannot express it.

    Raises:
      DataError: something is missing, malformed, unknown or of another shape; the message names it.
      SafetyError: a symbolic link leads out of the directory.
    """
    if not directory.is_dir():
        found = "a file" if directory.exists() else "no such directory"
        raise DataError(f"{directory}: found {found}, expected the directory of a Hugging Face model")
    require_links_inside(directory)
    fields = Fields.read(directory / "config.json")
    weights = Weights(directory)
    description = family_matching.describe(fields, weights, scale_logits=scale_logits)
    expected = list(tensors(description.family.rules, tree_paths.shapes(abstract_model(description.model).params)))
    state_dict.check(expected, weights, description.names, description.unused)
    return HuggingFaceModel(description, weights)


def import_directory(
    directory: Path, out: Path, *, scale_logits: bool | None = None, report: Callable[[str], None] = say
) -> None:
    """Import a Hugging Face directory as a model directory.

    Args:
      directory: Hugging Face directory.
      out: Directory to create.
      scale_logits: See `open_directory`.
      report: Called with each line of the report.

    Raises:
      DataError: see `open_directory`.
      SafetyError: `out` exists already.
    """
    source = open_directory(directory, scale_logits=scale_logits)
    description = source.description
    spec = abstract_model(source.model)
    with model_dir.made_whole(out) as partial:
        kept = partial / HUGGINGFACE_DIR
        kept.mkdir()
        for name in ("config.json", *TOKENIZER_FILES, *SENTENCE_FILES):
            if (directory / name).is_file():
                (kept / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(directory / name, kept / name)
        if description.unused:
            write(kept / LEFT_OUT, [copied(source.weights, name) for name in description.unused], {"format": "pt"})
        model_dir.save(partial, source.model, description.family.model_type, {"params": source.params(spec.params)})
    report(f"{out}: {description.family.model_type}, {sum(map(_size, jax.tree.leaves(spec.params))):,} parameters")
    for name in description.unused:
        report(f"  not used: {name} {source.weights[name].shape}")


def write_directory(
    directory: Path,
    model: ModelConfig,
    params: PyTree,
    model_type: str,
    *,
    base: dict[str, Any] | None = None,
    left_out: list[Pending] | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json (unless it exists) and tensors, which `from_pretrained` reads.

    Tensors are written without the padding of the vocabulary.

    Args:
      directory: Existing directory.
      model: Configuration of the model.
      params: Parameters.
      model_type: Family to write.
      base: Fields of config.json that the model does not decide, such as ids of special tokens.
      left_out: Further tensors to write.
      dtype: Type of the tensors: float32 or bfloat16.
      shard_bytes: Largest size of one file.

    Raises:
      DataError: the type or the family is unknown.
      SafetyError: the model does not match the family.
    """
    if dtype not in _DTYPES:
        raise DataError(f"dtype {dtype!r}, expected one of {', '.join(_DTYPES)}")
    family = family_matching.require_family(model, model_type)
    config = _merged(
        special_tokens.write(model) | (base or {}),
        {"model_type": family.written_type, "dtype": dtype, **family.write(model)},
    )
    for old in ("torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern"):
        config.pop(old, None)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    generation = directory / "generation_config.json"
    if model.decoder is not None and not generation.exists():
        ids = {name: value for name, value in special_tokens.write(model).items() if value is not None}
        generation.write_text(json.dumps(ids, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    pending = list(state_dict.pending(family.rules, vocab_padding.cut(params, model), _DTYPES[dtype]))
    if family.masked_lm_head and model.decoder is None and not model.lm_head_transform:
        # Files of an encoder without its head omit the prefix.
        pending = [dataclasses.replace(tensor, name=tensor.name.removeprefix(family.prefix)) for tensor in pending]
    write_sharded(directory, [*pending, *(left_out or [])], max_bytes=shard_bytes)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the fields of `over`, merged within common objects except those of rotary positions."""
    merged = dict(base)
    for name, value in over.items():
        inner = merged.get(name)
        if isinstance(inner, dict) and isinstance(value, dict) and name != "rope_parameters":
            value = _merged(inner, value)
        merged[name] = value
    return merged


def copied(source: Weights | TensorFile, name: str) -> Pending:
    stored = source[name] if isinstance(source, Weights) else source.tensors[name]
    return Pending(name, stored.dtype, stored.shape, lambda: source.read(name))


def _size(leaf: Any) -> int:
    return int(np.prod(leaf.shape))
