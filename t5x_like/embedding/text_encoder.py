"""Text encoder: a model that returns one vector for each text, with its tokenizer and its way of pooling."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.checkpoints.model_dir import HUGGINGFACE_DIR
from t5x_like.config import DataConfig, ModelConfig, ShardingConfig
from t5x_like.config.layouts import has_bidirectional_prefix
from t5x_like.config.model import Pooling
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.model_loading import LoadedModel, open_model
from t5x_like.models.factory import abstract_model, bind_params
from t5x_like.models.model import Model
from t5x_like.models.task_heads import TaskModel, pool, shortened
from t5x_like.sharding.constrain import activation_context
from t5x_like.sharding.mesh import make_mesh
from t5x_like.sharding.rules import Rules, default_rules
from t5x_like.sharding.shardings import tree_shardings
from t5x_like.text_inputs.encoding import LONGEST, Encode, encode_function, max_positions
from t5x_like.utils.json_reader import read_json
from t5x_like.utils.type_aliases import PyTree


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Way in which the states of a text become one vector.

    Attributes:
      pooling: State of the first token, mean of all states, or state of the last token.
      normalize: The vector is scaled to length 1.
      bidirectional: Each token of a decoder attends to the whole text (LLM2Vec); otherwise to the tokens before it.
      transform: The dense layer of the model's own head follows the pooling.
      dimensions: Number of leading dimensions that are kept; None: all.
    """

    pooling: Pooling
    normalize: bool
    bidirectional: bool
    transform: bool
    dimensions: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """Model that embeds texts.

    Attributes:
      encode: Text to ids.
      max_length: Number of tokens to which longer texts are truncated.
    """

    model: ModelConfig
    embedding: Embedding
    encode: Encode
    max_length: int
    graphdef: nnx.GraphDef[Model]
    params: PyTree
    mesh: Mesh
    rules: Rules

    @property
    def width(self) -> int:
        return self.embedding.dimensions or _full_width(self.model)

    @property
    def row_shares(self) -> int:
        """Number of devices that share a batch, whose rows must be a multiple of it."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def vectors(self, rows: Sequence[Sequence[int]], length: int) -> npt.NDArray[np.float32]:
        """Return float32 [N, width], the embeddings of N rows of ids.

        Args:
          rows: Ids of each text; N is a multiple of `row_shares`.
          length: Length to which the rows are padded; no row is longer.
        """
        tokens = np.zeros((len(rows), length), np.int32)
        valid = np.zeros((len(rows), length), np.int32)
        for index, ids in enumerate(rows):
            tokens[index, : len(ids)], valid[index, : len(ids)] = ids, 1
        sharding = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
        return np.asarray(
            _vectors(self, self.params, jax.device_put(tokens, sharding), jax.device_put(valid, sharding))
        )


@functools.partial(jax.jit, static_argnums=0)
def _vectors(encoder: TextEncoder, params: PyTree, tokens_BxL: jax.Array, valid_BxL: jax.Array) -> jax.Array:
    how, config = encoder.embedding, encoder.model
    with activation_context(encoder.mesh, encoder.rules):
        model = bind_params(encoder.graphdef, params)
        if config.encoder is not None:
            states = model.encode(tokens_BxL, segment_ids=valid_BxL)
        else:
            batch = {"decoder_input_tokens": tokens_BxL, "decoder_segment_ids": valid_BxL}
            states, _ = model.states(batch | ({"decoder_causal_attention": valid_BxL} if how.bidirectional else {}))
        x = pool(states, valid_BxL, how.pooling)
        if how.transform:
            x = jnp.tanh(cast(TaskModel, model).head.transform(x))
        x = shortened(x, how.dimensions or x.shape[-1], normalize=how.normalize)
        return jax.lax.with_sharding_constraint(x, NamedSharding(encoder.mesh, PartitionSpec()))


def open_encoder(
    model: str | Path | CheckpointRef | LoadedModel,
    step: int | None = None,
    *,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    bidirectional: bool | None = None,
    max_length: int | None = None,
    dimensions: int | None = None,
) -> TextEncoder:
    """Open a model that embeds texts. An encoder-decoder embeds by its encoder.

    Args:
      model, step: See `model_loading.open_model`.
      pooling, normalize, bidirectional, max_length: None: as the model was trained or published. Where that is not
        known: the mean of the states (of a causal decoder the last one), not normalized, causal attention of a decoder,
        and the row length of the training, the model's number of positions or 512 tokens.
      dimensions: Number of leading dimensions of the embeddings that are kept, and then normalized if `normalize`, as
        for a model that was trained with `TaskHeadConfig.matryoshka_dimensions`. None: all.

    Raises:
      UserError: there is no model or no tokenizer, or the options do not fit the model.
    """
    loaded = model if isinstance(model, LoadedModel) else open_model(model, step)
    config = loaded.model
    known = _known_of_import(loaded) if loaded.trained_on is None else _known_of_run(config, loaded.trained_on)
    bidirectional = known.bidirectional if bidirectional is None else bidirectional
    if config.encoder is None and bidirectional and _has_one_way_buckets(config):
        fix = "a decoder with rotary or learned positions"
        raise ConfigError([ConfigProblem("--attention", "bidirectional, of relative biases to the left only", fix)])
    causal = config.encoder is None and not bidirectional
    head = config.task_head
    if dimensions is not None and dimensions > _full_width(config):
        expected = f"at most {_full_width(config)}, the width of the model's embeddings"
        raise ConfigError([ConfigProblem("--dimensions", str(dimensions), expected)])
    embedding = Embedding(
        pooling=pooling or known.pooling or ("last" if causal else "mean"),
        normalize=known.normalize if normalize is None else normalize,
        bidirectional=bidirectional,
        transform=head is not None and head.transform and head.kind == "embedding",
        dimensions=dimensions,
    )
    most = max_positions(config)
    length = max_length or min(known.max_length or LONGEST, most or LONGEST)
    if most is not None and length > most:
        raise ConfigError(
            [ConfigProblem("--max-length", str(length), f"at most {most}, the positions that the model has")]
        )
    encode = encode_function(loaded)
    mesh = make_mesh(ShardingConfig(), jax.devices())
    rules = default_rules(ShardingConfig())
    spec = abstract_model(config)
    shardings = tree_shardings(mesh, rules, spec.logical_axes, spec.params)
    abstract_params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), spec.params, shardings
    )
    _, params = loaded.params(abstract_params=abstract_params)
    return TextEncoder(config, embedding, encode, length, spec.graphdef, params, mesh, rules)


def _full_width(model: ModelConfig) -> int:
    stack = model.encoder or model.decoder
    assert stack is not None
    return stack.d_model


@dataclasses.dataclass(frozen=True)
class _Known:
    """Settings that a directory records about its own way to embed."""

    pooling: Pooling | None = None
    normalize: bool = False
    bidirectional: bool = False
    max_length: int | None = None


def _known_of_run(model: ModelConfig, data: DataConfig) -> _Known:
    head = model.task_head
    return _Known(
        pooling=None if head is None else head.pooling,
        normalize=head is not None and head.kind == "embedding" and head.normalize,
        bidirectional=has_bidirectional_prefix(data.layout),
        max_length=data.inputs_length if model.encoder is not None else data.row_length,
    )


def _known_of_import(loaded: LoadedModel) -> _Known:
    """Return the settings in the files of sentence-transformers, if the directory has them."""
    folder = loaded.path if loaded.kind == "huggingface" else loaded.path / HUGGINGFACE_DIR
    head = loaded.model.task_head
    pooling: Pooling | None = None if head is None else head.pooling
    pooling_config = _read_json(folder / "1_Pooling" / "config.json")
    names: dict[str, Pooling] = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
    for name, kind in names.items():
        if isinstance(pooling_config, dict) and pooling_config.get(f"pooling_mode_{name}") is True:
            pooling = kind
    modules = _read_json(folder / "modules.json")
    kinds = (
        [str(module.get("type")) for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    )
    lengths = _read_json(folder / "sentence_bert_config.json")
    length = lengths.get("max_seq_length") if isinstance(lengths, dict) else None
    return _Known(
        pooling=pooling,
        normalize=any(kind.endswith(".Normalize") for kind in kinds),
        max_length=length if isinstance(length, int) and length > 0 else None,
    )


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _has_one_way_buckets(model: ModelConfig) -> bool:
    stack = model.decoder
    return stack is not None and stack.positions == "relative_bias" and not stack.relative_bias_bidirectional
