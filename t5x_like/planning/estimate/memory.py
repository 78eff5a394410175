"""Memory of a device during a training step: exact for the state between steps, estimated for everything else.

Parameters, optimizer state and gradients are counted from the program's own shardings. Activations are counted by
`sharding.saved_activations` and split by the program's own rules. Memory can be highest at one of four moments of a
step, and the highest of them is the estimate:

  head         the logits in float32, their cotangents and the gathered head, with all saved activations and no
               gradients; of a loss in chunks those of one chunk, and the gradient of the head
  layers       the backward pass of a layer: all gradients, the activations saved for it and the layers before it, and
               its working memory: recomputed activations, attention scores or the cotangents of the MLP, and the
               layer's parameters gathered over fsdp; with a tied table also the logits, whose gradient is computed last
  embeddings   all gradients; those of the token table in float32, split as the table is: one for each stack that reads
               it, and the zeros that they are added to; a chunk of its rows and the gradient of the head, both whole
               over fsdp
  update       gradients and the updates computed from them, which are float32 whatever the type of the parameters; an
               optimizer state that is kept in host memory, all of which may have arrived

How much memory XLA's scheduler and fusions save is known only after compilation.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from t5x_like.config import RunConfig
from t5x_like.config.batch_spec import ArraySpec
from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.kernels import table_lookup
from t5x_like.program import Program
from t5x_like.sharding import saved_activations
from t5x_like.sharding.host_memory import is_on_host
from t5x_like.sharding.loss_chunks import chunk_share
from t5x_like.sharding.rules import spec
from t5x_like.sharding.saved_activations import SavedArray, accumulation_part
from t5x_like.sharding.shardings import logical_leaves
from t5x_like.training import freezing
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Estimated memory of one device in bytes.

    Attributes:
      state: Exact bytes that persist between steps: parameters, optimizer state, frozen parameters of a base or a
        teacher; and the padding of a TPU's tiles.
      gradients: Bytes of the gradients of trained parameters, in the type of these.
      moments: Moment -> part -> bytes, without `state`.
      host: Bytes in the memory of the host, for each device.
      usable_bytes: Memory that a program can use; 0 if unknown.
    """

    state: Mapping[str, int]
    gradients: int
    moments: Mapping[str, Mapping[str, int]]
    host: Mapping[str, int]
    usable_bytes: int = 0

    @property
    def moment(self) -> str:
        """Name of the moment at which memory is highest."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Part -> bytes at the highest moment; their sum is `peak_bytes`."""
        return {**self.state, **self.moments[self.moment]}

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """True if the step fits; None if the memory of the device is not known."""
        return self.peak_bytes <= self.usable_bytes if self.usable_bytes else None


def estimate(program: Program, usable_bytes: int = 0) -> MemoryEstimate:
    """Estimate the memory of a program, whose devices may be described only.

    Args:
      program: The program.
      usable_bytes: Memory of a device that a program can use; 0 if unknown.
    """
    of_optimizer = [x for x in jax.tree.leaves(program.abstract_state["opt_state"]) if not is_on_host(x)]
    fetched = [x for x in jax.tree.leaves(program.abstract_state["opt_state"]) if is_on_host(x)]
    state = {
        "parameters": bytes_per_device(program.abstract_params),
        "frozen base": bytes_per_device(program.abstract_base),
        "frozen teacher": bytes_per_device(program.abstract_teacher_params),
        "optimizer state": bytes_per_device(of_optimizer),
    }
    if "ema" in program.abstract_state:
        state["average of parameters"] = bytes_per_device(program.abstract_state["ema"])
    activations = ActivationMemory(program)
    if is_tiled(program):
        arrays = (program.abstract_params, program.abstract_base, of_optimizer)
        state["padding of tiles"] = padding_per_device(arrays)
    parts = program.run.training.gradient_accumulation_steps
    trained = trained_params(program)
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=x.sharding), trained)
    gradients, sum_of_gradients = (
        bytes_per_device(tree) + (padding_per_device(tree) if is_tiled(program) else 0) for tree in (trained, wide)
    )
    sums = {"sums of gradients": sum_of_gradients} if parts > 1 else {}
    batch = {"batches": activations.batch_bytes()}
    # Memory peaks at one of four moments of a step. What is alive at each of them is listed, and the largest sum is the
    # estimate.
    moments = {
        "head": {**sums, "saved activations": sum(activations.saved()), **activations.head(), **batch},
        "layers": {"gradients": gradients, **sums, **activations.layers(), **activations.tied_logits(), **batch},
        "embeddings": {"gradients": gradients, **sums, **activations.tables(), **batch},
        "update": {
            "gradients": gradients,
            "optimizer state from the host": bytes_per_device(fetched),
            "updates": _largest(wide),
            **batch,
        },
    }
    host = {"optimizer state": bytes_per_device(fetched), "saved activations": activations.offloaded()}
    return MemoryEstimate(
        state={name: size for name, size in state.items() if size},
        gradients=gradients,
        moments={name: {part: size for part, size in sizes.items() if size} for name, sizes in moments.items()},
        host={name: size for name, size in host.items() if size},
        usable_bytes=usable_bytes,
    )


def bytes_per_device(tree: PyTree) -> int:
    """Return the bytes on a device of a tree of `jax.ShapeDtypeStruct`s with shardings."""
    return sum(leaf_bytes(x) for x in jax.tree.leaves(tree))


def padding_per_device(tree: PyTree) -> int:
    """Return the bytes on a device that a TPU's tiles add to `bytes_per_device`."""
    return sum(
        tiled_bytes(x.sharding.shard_shape(x.shape), x.dtype.itemsize) - leaf_bytes(x) for x in jax.tree.leaves(tree)
    )


def tiled_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Return the bytes of an array on a TPU, which stores tiles of 8 x 128 numbers of 32 bits.

    The two innermost dimensions of the layout are rounded up. XLA chooses which dimensions these are; the best choice
    is counted, and the layouts in compiled programs agree with it.
    """
    if not shape:
        return itemsize
    if len(shape) == 1:
        return -(-shape[0] // 128) * 128 * itemsize
    size = math.prod(shape)
    padded = [
        size // (shape[a] * shape[b]) * (-(-shape[a] // 128) * 128) * (-(-shape[b] // 8) * 8)
        for a, b in itertools.permutations(range(len(shape)), 2)
        if shape[a] and shape[b]
    ]
    return min(padded, default=0) * itemsize


def leaf_bytes(x: Any) -> int:
    """Return the bytes on a device of one array that knows its sharding."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _plain_bytes(shape: Sequence[int], itemsize: int) -> int:
    return math.prod(shape) * itemsize


def is_tiled(program: Program) -> bool:
    """Return whether the program's devices store arrays in tiles, as TPUs do."""
    return bool(program.mesh.devices.flat[0].platform == "tpu")


def _largest(tree: PyTree) -> int:
    return max((leaf_bytes(x) for x in jax.tree.leaves(tree)), default=0)


def trained_params(program: Program) -> PyTree:
    """Return the parameters that have gradients: all except those that are frozen permanently."""
    params = program.abstract_params
    starts = freezing.unfreeze_steps(program.run.training.freeze, tree_paths.paths(params))
    return freezing.split(params, starts)[0]


class ActivationMemory:
    """Bytes per device of the arrays of a step, split by the program's rules."""

    def __init__(self, program: Program):
        self.program = program
        self.run: RunConfig = program.run
        self.config: ModelConfig = program.run.model
        self.platform: str = program.mesh.devices.flat[0].platform
        self.size = saved_activations.itemsize(self.config)
        self.size_of = tiled_bytes if is_tiled(program) else _plain_bytes
        parts = self.run.training.gradient_accumulation_steps
        self.sub_batches = [accumulation_part(features, parts) for features in program.batch_spec.values()]

    def bytes_of(self, arrays: Iterable[SavedArray]) -> int:
        """Return the bytes per device."""
        return round(sum(self._bytes_of_array(array) for array in arrays))

    def _bytes_of_array(self, array: SavedArray) -> float:
        mesh = self.program.mesh
        sharding = NamedSharding(mesh, spec(array.axes, self.program.rules.activations, array.shape, mesh))
        return self.size_of(sharding.shard_shape(array.shape), array.itemsize) * array.count

    def saved(self) -> list[int]:
        """Return the bytes of saved activations of each sub-batch, over its stacks."""
        return [sum(self._saved_by_stack(features).values()) for features in self.sub_batches]

    def offloaded(self) -> int:
        """Return the bytes of activations that are kept in host memory."""
        return sum(
            self.bytes_of(saved_activations.offloaded_activations(self.config, each)) for each in self.sub_batches
        )

    def _saved_by_stack(self, features: Mapping[str, ArraySpec]) -> dict[str, int]:
        by_stack = saved_activations.saved_activations(self.config, features, self.platform)
        return {name: self.bytes_of(arrays) for name, arrays in by_stack.items()}

    def head(self) -> dict[str, int]:
        """Return the bytes of the logits of the largest sub-batch, their cotangents, and the gathered head."""
        config = self.config
        if config.task_head is not None:
            return {}
        largest = max(self.sub_batches, key=lambda features: self.bytes_of([self._logits(features, 4)]))
        axes, shape = ("vocab", "embed"), (config.padded_vocab_size, config.lm_head_width)
        # A teacher has logits of the same size, in float32.
        distillation = self.run.training.distillation
        teacher = 0 if distillation is None or distillation.top_k is not None else 4
        parts = {
            "logits": self.bytes_of([self._logits(largest, teacher + (4 if config.logits_softcap is None else 8))]),
            "cotangents of logits": self.bytes_of([self._logits(largest, self.size)]),
            "gathered head": self.bytes_of([SavedArray("head", axes, shape, self.size)]),
        }
        if share := self._chunk_share(largest):
            # The gradient of the head is added up, chunk by chunk, in float32.
            parts = {**parts, "gradient of the head": self._whole_table(config.lm_head_width)}
            for name in ("logits", "cotangents of logits"):
                parts[name] = round(parts[name] * share)
        return parts

    def _chunk_share(self, features: Mapping[str, ArraySpec]) -> float | None:
        """Return the share of a sub-batch's tokens whose logits exist at once; None if they all do."""
        logits = self._logits(features, 4)
        sharding = NamedSharding(
            self.program.mesh, spec(logits.axes, self.program.rules.activations, logits.shape, self.program.mesh)
        )
        rows, length, vocabulary = sharding.shard_shape(logits.shape)
        return chunk_share(self.run, rows * length, vocabulary)

    def tied_logits(self) -> dict[str, int]:
        """Return the bytes of the logits that a tied table keeps alive.

        Its gradient is computed last, when the gradient of the lookups exists to be added to; until then the logits are
        needed.
        """
        if self.config.task_head is not None or not self.config.tie_embeddings:
            return {}
        whole = [features for features in self.sub_batches if self._chunk_share(features) is None]
        return {"logits": self.bytes_of(self._logits(features, 4) for features in whole)}

    def _logits(self, features: Mapping[str, ArraySpec], size: int) -> SavedArray:
        return saved_activations.logits(self.config, features, size)

    def layers(self) -> dict[str, int]:
        """Return the bytes by part for the layer whose backward pass needs most memory.

        The decoder's activations are freed before the backward pass of the encoder begins.
        """
        config, all_saved = self.config, sum(self.saved())
        candidates = []
        for features in self.sub_batches:
            by_stack = self._saved_by_stack(features)
            for name, stack in [*config.stacks.items(), ("generator", config.generator)]:
                if stack is not None:
                    freed = by_stack["decoder"] if name == "encoder" and config.decoder is not None else 0
                    candidates.append({"saved activations": all_saved - freed, **self._layer(name, stack, features)})
        return max(candidates, key=lambda parts: sum(parts.values()))

    def _layer(self, name: str, stack: StackConfig, features: Mapping[str, ArraySpec]) -> dict[str, int]:
        all_inputs = saved_activations.stack_inputs(self.config, features, self.platform)
        inputs = all_inputs["encoder" if name == "generator" else name]
        recomputed = 0
        if self.config.remat != "none":
            everything = saved_activations.layer_activations(self.config, stack, inputs, "none")
            saved = saved_activations.layer_activations(self.config, stack, inputs, self.config.remat)
            recomputed = self.bytes_of(everything) - self.bytes_of(saved)
        # The attentions of a layer are differentiated one after the other.
        scores = max(
            (self.bytes_of([each]) for each in saved_activations.attention_scores(self.config, stack, inputs)),
            default=0,
        )
        cotangents = self.bytes_of(saved_activations.mlp_cotangents(self.config, stack, inputs))
        return {
            "recomputed activations": recomputed,
            "attention scores" if scores > cotangents else "cotangents of the MLP": max(scores, cotangents),
            "gathered parameters of a layer": self._gathered_layer(name),
        }

    def _gathered_layer(self, name: str) -> int:
        """Return the bytes of a layer's parameters in the model's type, gathered over parameter-only axes."""
        path = f"{name}/encoder/layers/" if name == "generator" else f"{name}/layers/"
        params, axes = self.program.spec.params, self.program.spec.logical_axes
        table = self.program.rules.activations
        total = 0
        for leaf in logical_leaves(axes, params):
            if leaf.path.startswith(path):
                names = tuple(axis if axis in table and axis != "embed" else None for axis in leaf.axes[1:])
                total += self.bytes_of([SavedArray(leaf.path, names, tuple(leaf.array.shape[1:]), self.size)])
        return total

    def tables(self) -> dict[str, int]:
        """Return the bytes of the gradients of the token table's lookups, and of the head before it is reduced. A tied
        table has both."""
        config = self.config
        width = config.lm_head_width
        lookups = [width] * (len(config.stacks) + (config.generator is not None))
        if config.separate_encoder_embeddings and config.encoder is not None:
            # The gradient of the decoder's table is complete before the backward pass of the encoder begins.
            lookups = [config.encoder.d_model]
        output_table = "head" if not config.tie_embeddings else "token_embedder"
        has_head = config.task_head is None and self._trains(output_table)
        return {
            # The last one is added to zeros, which are an array of their own.
            "gradients of the token table": sum(map(self._stored_table, [*lookups, lookups[-1]]))
            if self._trains("token_embedder")
            else 0,
            "rows of the token table": self._rows_of_table(max(lookups)) if self._trains("token_embedder") else 0,
            "gradient of the head": self._whole_table(width) if has_head else 0,
        }

    def _rows_of_table(self, width: int) -> int:
        """Return the bytes of the rows of the token table that are added up at once, in float32 and whole over fsdp."""
        mesh, rules = self.program.mesh, self.program.rules
        rows, columns = self._stored_shape(width)
        if (rows, columns) == (self.config.padded_vocab_size, width):
            return 0
        ids = [array.shape for features in self.sub_batches for array in features.values() if len(array.shape) == 2]
        of_ids = (NamedSharding(mesh, spec(("batch", "length"), rules.activations, shape, mesh)) for shape in ids)
        tokens = max(math.prod(sharding.shard_shape(shape)) for sharding, shape in zip(of_ids, ids, strict=True))
        return self.size_of((table_lookup.chunk_rows(rows, width, tokens), width), 4)

    def _whole_table(self, width: int) -> int:
        """Return the bytes of a table or head in float32, whole over fsdp."""
        return self.bytes_of([SavedArray("table", ("vocab", "embed"), (self.config.padded_vocab_size, width), 4)])

    def _stored_table(self, width: int) -> int:
        """Return the bytes of a token table in float32, split as it is stored (`kernels.table_lookup`)."""
        return self.size_of(self._stored_shape(width), 4)

    def _stored_shape(self, width: int) -> tuple[int, ...]:
        """Return the shape of a token table on a device."""
        shape = (self.config.padded_vocab_size, width)
        split = spec(("vocab", "embed"), self.program.rules.parameters, shape, self.program.mesh)
        return NamedSharding(self.program.mesh, split).shard_shape(shape)

    def _trains(self, name: str) -> bool:
        return name in trained_params(self.program)

    def batch_bytes(self) -> int:
        features = [array for features in self.program.batch_spec.values() for array in features.values()]
        return self.bytes_of(
            SavedArray("batch", ("batch", "length", None)[: len(array.shape)], array.shape, 4) for array in features
        )
