"""Whole directories: a Hugging Face model to a checkpoint of ours, and back.

What `import_directory` writes:

    model.json          the family and the model's configuration
    checkpoints/0/      the parameters
    huggingface/        config.json, tokenizer files, and tensors that the model has no place for: for the way back
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

from t5x_like import run_directory
from t5x_like.config.errors import DataError
from t5x_like.config.model import ModelConfig
from t5x_like.data.prepare import open_stores
from t5x_like.interop import adapted, imported
from t5x_like.interop.huggingface import convert, families, special_ids
from t5x_like.interop.huggingface.fields import Fields
from t5x_like.interop.huggingface.names import tensors
from t5x_like.interop.huggingface.tokenizer import write_tokenizer
from t5x_like.interop.safetensors import Pending, TensorFile, write, write_sharded
from t5x_like.interop.weights import Weights
from t5x_like.models.build import abstract

Tree = Any
KEPT = "huggingface"
LEFT_OUT = "left_out.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
"""What sentence-transformers keeps beside an encoder: how its states become one vector."""
SHARD_BYTES = 5_000_000_000
_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Source:
    """A directory of Hugging Face's, checked: its tensors are exactly those of its model, but for those left out."""

    described: families.Described
    weights: Weights

    @property
    def model(self) -> ModelConfig:
        return self.described.model

    def params(self, abstract_params: Tree) -> Tree:
        """The parameters, float32, each made where its sharding puts it.

        Args:
          abstract_params: `jax.ShapeDtypeStruct`s, with shardings or without.
        """
        rules = families.FAMILIES[self.described.kind].rules
        return convert.read_params(rules, abstract_params, self.weights, self.described.names)


def open_directory(directory: Path, *, scale_logits: bool | None = None) -> Source:
    """Reads config.json and the headers of the tensors.

    Args:
      scale_logits: Overrules what config.json says of T5s' logits; umT5's cannot say it.

    Raises:
      DataError: something is missing, malformed, not known or of another shape; the message names it.
    """
    fields = Fields.read(directory / "config.json")
    weights = Weights(directory)
    described = families.describe(fields, weights, scale_logits=scale_logits)
    expected = list(
        tensors(families.FAMILIES[described.kind].rules, convert.shapes_of(abstract(described.model).params))
    )
    convert.check(expected, weights, described.names, described.left_out)
    return Source(described, weights)


def import_directory(
    directory: Path, out: Path, *, scale_logits: bool | None = None, report: Callable[[str], None] = print
) -> None:
    """Hugging Face's `directory` to one of ours.

    Raises:
      DataError: see `open_directory`.
      RefusedError: `out` is there already.
    """
    source = open_directory(directory, scale_logits=scale_logits)
    described = source.described
    spec = abstract(source.model)
    with imported.made_whole(out) as partial:
        kept = partial / KEPT
        kept.mkdir()
        for name in ("config.json", *TOKENIZER_FILES, *SENTENCE_FILES):
            if (directory / name).is_file():
                (kept / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(directory / name, kept / name)
        if described.left_out:
            write(kept / LEFT_OUT, [_copied(source.weights, name) for name in described.left_out], {"format": "pt"})
        imported.save(partial, source.model, described.kind, {"params": source.params(spec.params)})
    report(f"{out}: {described.kind}, {sum(map(_size, jax.tree.leaves(spec.params))):,} parameters")
    for name in described.left_out:
        report(f"  left out: {name} {source.weights[name].shape}")


def export_directory(
    directory: Path,
    out: Path,
    *,
    family: str | None = None,
    dtype: str = "float32",
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[str], None] = print,
) -> None:
    """A run's directory, or what `import_directory` wrote, to one of Hugging Face's. Adapters are merged.

    Args:
      family: Its `model_type`; None takes what was imported, or the plainest family that the model is of.
      dtype: Of the tensors: float32 or bfloat16.
      step: Which checkpoint; None takes the newest.

    Raises:
      DataError, RefusedError: there is no checkpoint, or the model is of no such family; `out` is there already.
    """
    model, origin = imported.read_model(directory)
    kept = directory / KEPT
    lora = adapted.lora_of(directory)
    if lora is not None and (Path(lora.base) / imported.MODEL).is_file():
        kept = Path(lora.base) / KEPT
        _, origin = imported.read_model(Path(lora.base))
    kind = families.require(model, family or origin)
    _, params, _ = adapted.restore_whole(directory, model, step)
    with imported.made_whole(out) as partial:
        base: dict[str, Any] = {}
        left_out: list[Pending] = []
        if origin == kind and (kept / "config.json").is_file():
            base = Fields.read(kept / "config.json").values
            if (kept / LEFT_OUT).is_file():
                file = TensorFile(kept / LEFT_OUT)
                left_out = [_copied(file, name) for name in file.tensors]
            for name in (*TOKENIZER_FILES, *SENTENCE_FILES):
                if (kept / name).is_file():
                    (partial / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(kept / name, partial / name)
        else:
            for line in _write_run_tokenizer(partial, directory):
                report(f"  not written: {line}")
        if families.FAMILIES[kind].never_made and not left_out:
            report(f"  not written: {families.FAMILIES[kind].never_made}")
        write_directory(
            partial, model, params, kind, base=base, left_out=left_out, dtype=dtype, shard_bytes=shard_bytes
        )
    report(f"{out}: {kind}, {sum(map(_size, jax.tree.leaves(params))):,} parameters in {dtype}")


def _write_run_tokenizer(out: Path, directory: Path) -> list[str]:
    """The tokenizer of the store that the run in `directory` reads, if it is one; returns what could not be written."""
    if not (directory / run_directory.CONFIG).is_file():
        return []
    data = run_directory.read_config(directory).data
    if data.seqio is not None:
        return ["a tokenizer: the run reads a seqio Task live"]
    try:
        return write_tokenizer(out, open_stores(data)[0].tokenizer)
    except DataError as error:
        return [f"a tokenizer: {error}"]


def write_directory(
    directory: Path,
    model: ModelConfig,
    params: Tree,
    kind: str,
    *,
    base: dict[str, Any] | None = None,
    left_out: list[Pending] | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """config.json and tensors, which `from_pretrained` reads.

    Args:
      base: Fields of config.json that the model does not decide (ids of special tokens, say).
      left_out: Further tensors.
    """
    if dtype not in _DTYPES:
        raise DataError(f"dtype {dtype!r}, expected one of {', '.join(_DTYPES)}")
    family = families.FAMILIES[families.require(model, kind)]
    config = _merged(
        special_ids.write(model) | (base or {}), {"model_type": kind, "dtype": dtype, **family.write(model, kind)}
    )
    for old in ("torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern"):
        config.pop(old, None)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    found = list(convert.pending(family.rules, params, _DTYPES[dtype]))
    if model.decoder is None and not model.head_transform:
        # Files of an encoder without its head leave the prefix out.
        found = [dataclasses.replace(tensor, name=tensor.name.removeprefix(family.prefix)) for tensor in found]
    write_sharded(directory, [*found, *(left_out or [])], max_bytes=shard_bytes)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `over`, and so within objects that both have, but for those of rotary positions."""
    merged = dict(base)
    for name, value in over.items():
        inner = merged.get(name)
        if isinstance(inner, dict) and isinstance(value, dict) and name != "rope_parameters":
            value = _merged(inner, value)
        merged[name] = value
    return merged


def _copied(source: Weights | TensorFile, name: str) -> Pending:
    stored = source[name] if isinstance(source, Weights) else source.tensors[name]
    return Pending(name, stored.dtype, stored.shape, lambda: source.read(name))


def _size(leaf: Any) -> int:
    return int(np.prod(leaf.shape))
