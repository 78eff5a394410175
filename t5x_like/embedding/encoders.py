"""A model that embeds texts: its parameters on the devices, its tokenizer, and how it makes one vector of a text."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_like import run_directory
from t5x_like.config import ConfigError, ModelConfig, PartitioningConfig, Problem
from t5x_like.config.model import Pooling
from t5x_like.decoding.trained import open_trained
from t5x_like.embedding import texts
from t5x_like.embedding.texts import Encode
from t5x_like.interop import imported
from t5x_like.interop.adapted import restore_whole
from t5x_like.models.build import abstract, merge
from t5x_like.models.heads import TaskModel, normalized, pool
from t5x_like.models.model import Model
from t5x_like.partitioning.constrain import activation_context
from t5x_like.partitioning.mesh import make_mesh
from t5x_like.partitioning.rules import Rules, standard
from t5x_like.partitioning.shardings import tree_shardings

Tree = Any
KEPT = "huggingface"
"""Folder of an imported model with the files of its tokenizer and of its pooling."""
_LONGEST = 512


@dataclasses.dataclass(frozen=True)
class Embedding:
    """How one vector is made of a text.

    Attributes:
      bidirectional: A decoder sees the whole text from each of its tokens (LLM2Vec); otherwise what is to the left.
      transform: The dense layer of the model's own head follows the pooling.
    """

    pooling: Pooling
    normalize: bool
    bidirectional: bool
    transform: bool


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """See the module. `max_length` is the tokens of the longest text; longer ones are cut."""

    model: ModelConfig
    embedding: Embedding
    encode: Encode
    max_length: int
    graphdef: nnx.GraphDef[Model]
    params: Tree
    mesh: Mesh
    rules: Rules

    @property
    def width(self) -> int:
        stack = self.model.encoder or self.model.decoder
        assert stack is not None
        return stack.d_model

    @property
    def row_shares(self) -> int:
        """Rows that are embedded at once are a multiple of it."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def vectors(self, rows: Sequence[Sequence[int]], length: int) -> npt.NDArray[np.float32]:
        """[N, width] of N texts' ids, none longer than `length`; N is a multiple of `row_shares`."""
        tokens = np.zeros((len(rows), length), np.int32)
        valid = np.zeros((len(rows), length), np.int32)
        for index, ids in enumerate(rows):
            tokens[index, : len(ids)], valid[index, : len(ids)] = ids, 1
        sharding = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
        return np.asarray(
            _vectors(self, self.params, jax.device_put(tokens, sharding), jax.device_put(valid, sharding))
        )


@functools.partial(jax.jit, static_argnums=0)
def _vectors(encoder: TextEncoder, params: Tree, tokens_BxL: jax.Array, valid_BxL: jax.Array) -> jax.Array:
    how, config = encoder.embedding, encoder.model
    with activation_context(encoder.mesh, encoder.rules):
        model = merge(encoder.graphdef, params)
        if config.encoder is not None:
            states = model.encode(tokens_BxL, segment_ids=valid_BxL)
        else:
            batch = {"decoder_input_tokens": tokens_BxL, "decoder_segment_ids": valid_BxL}
            states, _ = model.states(batch | ({"decoder_causal_attention": valid_BxL} if how.bidirectional else {}))
        x = pool(states, valid_BxL, how.pooling)
        if how.transform:
            x = jnp.tanh(cast(TaskModel, model).head.transform(x))
        x = normalized(x) if how.normalize else x.astype(jnp.float32)
        return jax.lax.with_sharding_constraint(x, NamedSharding(encoder.mesh, PartitionSpec()))


def open_encoder(
    directory: Path,
    *,
    step: int | None = None,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    bidirectional: bool | None = None,
    max_length: int | None = None,
) -> TextEncoder:
    """A run's directory, or one made by `t5x-like convert --from`. Of an encoder-decoder the encoder embeds.

    Args:
      pooling, normalize, bidirectional, max_length: None: as the model was trained or published; where that is not
        known, the mean (of a causal decoder the last token), not normalised, as a causal decoder, and the row length of
        the training, the model's number of positions or 512 tokens.

    Raises:
      UserError: there is no model or no tokenizer, or the options do not fit the model.
    """
    is_run = not (directory / imported.MODEL).is_file()
    model, _ = imported.read_model(directory)
    known = _of_run(directory) if is_run else _of_import(directory, model)
    bidirectional = known.bidirectional if bidirectional is None else bidirectional
    if model.encoder is None and bidirectional and _has_one_way_buckets(model):
        fix = "a decoder with rotary or learned positions"
        raise ConfigError([Problem("--attention", "bidirectional, of relative biases to the left only", fix)])
    causal = model.encoder is None and not bidirectional
    head = model.task_head
    transform = head is not None and head.transform and head.kind == "embedding"
    embedding = Embedding(
        pooling=pooling or known.pooling or ("last" if causal else "mean"),
        normalize=known.normalize if normalize is None else normalize,
        bidirectional=bidirectional,
        transform=transform,
    )
    most = _max_positions(model)
    length = max_length or min(known.max_length or _LONGEST, most or _LONGEST)
    if most is not None and length > most:
        raise ConfigError([Problem("--max-length", str(length), f"at most {most}, the positions that the model has")])
    encode = known.encode if known.encode is not None else texts.of_directory(directory / KEPT, length)
    mesh = make_mesh(PartitioningConfig(), jax.devices())
    rules = standard(PartitioningConfig())
    spec = abstract(model)
    shardings = tree_shardings(mesh, rules, spec.logical_axes, spec.params)
    wanted = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), spec.params, shardings
    )
    _, params, _ = restore_whole(directory, model, step, wanted)
    return TextEncoder(model, embedding, encode, length, spec.graphdef, params, mesh, rules)


@dataclasses.dataclass(frozen=True)
class _Known:
    """What a directory says of its own way to embed."""

    pooling: Pooling | None = None
    normalize: bool = False
    bidirectional: bool = False
    max_length: int | None = None
    encode: Encode | None = None


def _of_run(directory: Path) -> _Known:
    run = run_directory.read_config(directory)
    head, data = run.model.task_head, run.data
    store = open_trained(directory).store
    return _Known(
        pooling=None if head is None else head.pooling,
        normalize=head is not None and head.kind == "embedding" and head.normalize,
        bidirectional=data.layout == "prefix_lm",
        max_length=data.inputs_length if run.model.encoder is not None else data.row_length,
        encode=texts.of_store(store, data, is_decoder=run.model.encoder is None),
    )


def _of_import(directory: Path, model: ModelConfig) -> _Known:
    """Reads what a sentence-transformers model says of itself, if it is one."""
    pooling: Pooling | None = None if model.task_head is None else model.task_head.pooling
    found = _json(directory / KEPT / "1_Pooling" / "config.json")
    names: dict[str, Pooling] = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
    for name, ours in names.items():
        if isinstance(found, dict) and found.get(f"pooling_mode_{name}") is True:
            pooling = ours
    modules = _json(directory / KEPT / "modules.json")
    kinds = [str(module.get("type")) for module in modules if isinstance(module, dict)] if modules else []
    lengths = _json(directory / KEPT / "sentence_bert_config.json")
    length = lengths.get("max_seq_length") if isinstance(lengths, dict) else None
    return _Known(
        pooling=pooling,
        normalize=any(kind.endswith(".Normalize") for kind in kinds),
        max_length=length if isinstance(length, int) and length > 0 else None,
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _max_positions(model: ModelConfig) -> int | None:
    stack = model.encoder or model.decoder
    return stack.max_positions if stack is not None and stack.positions == "learned" else None


def _has_one_way_buckets(model: ModelConfig) -> bool:
    stack = model.decoder
    return stack is not None and stack.positions == "relative_bias" and not stack.relative_bias_bidirectional
