"""Memory of a device during a training step: exact for what the program holds between steps, a formula for the rest.

Parameters, optimizer state and gradients are counted from the program's own shardings. Activations are counted by
`planning.activations` and split by the program's own rules. A step is then looked at in the moments at which its memory
can be highest, and the highest of them is the estimate:

  head         the logits in float32, their cotangents and the gathered head, with all kept activations and no gradients
  layers       the backward pass of a layer: all gradients, the activations kept for it and the layers before, and what
               it needs now: what is computed again, attention scores or the cotangents of the MLP, and the layer's
               parameters gathered over fsdp; with a tied table also the logits, of which its gradient is made last
  embeddings   all gradients, and those of the token table and of a head of its own, in float32 and whole over fsdp
               before they are reduced: of the table one for each stack that reads it, and the zeros they are added to
  update       gradients and the updates made of them

It is an estimate: how much of it XLA's scheduler and fusions save is known after compiling only.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from t5x_like.config import RunConfig
from t5x_like.config.batch import ArraySpec
from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.partitioning.rules import spec
from t5x_like.partitioning.shardings import leaves
from t5x_like.planning import activations
from t5x_like.planning.activations import Held
from t5x_like.program import Program
from t5x_like.training import freezing

Tree = Any


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device.

    Attributes:
      state: What stays there from step to step, exactly: parameters, optimizer state, of adapters the base; and what
        the tiles of a TPU add to them.
      gradients: Of what is trained.
      moments: Parts of memory by moment, without `state`.
      usable_bytes: What a program can have; 0 where it is not known.
    """

    state: Mapping[str, int]
    gradients: int
    moments: Mapping[str, Mapping[str, int]]
    usable_bytes: int = 0

    @property
    def moment(self) -> str:
        """At which memory is highest."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Of the highest moment; their sum is `peak_bytes`."""
        return {**self.state, **self.moments[self.moment]}

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """None where the device's memory is not known."""
        return self.peak_bytes <= self.usable_bytes if self.usable_bytes else None


def estimate(program: Program, usable_bytes: int = 0) -> MemoryEstimate:
    """The estimate for a program, whose devices may be described only.

    Args:
      program: The program.
      usable_bytes: Of a device's memory, what a program can have; 0 if that is not known.
    """
    state = {
        "parameters": bytes_per_device(program.abstract_params),
        "frozen base": bytes_per_device(program.abstract_base),
        "optimizer state": bytes_per_device(program.abstract_state["opt_state"]),
    }
    counted = Activations(program)
    if is_tiled(program):
        held = (program.abstract_params, program.abstract_base, program.abstract_state["opt_state"])
        state["padding of tiles"] = padding_per_device(held)
    parts = program.run.training.gradient_accumulation_steps
    trained = trained_params(program)
    gradients = bytes_per_device(trained) + (padding_per_device(trained) if is_tiled(program) else 0)
    sums = {"sums of gradients": gradients} if parts > 1 else {}
    batch = {"batches": counted.batch_bytes()}
    moments = {
        "head": {**sums, "kept activations": sum(counted.kept()), **counted.head(), **batch},
        "layers": {"gradients": gradients, **sums, **counted.layers(), **counted.tied_logits(), **batch},
        "embeddings": {"gradients": gradients, **sums, **counted.tables(), **batch},
        "update": {"gradients": gradients, "updates": _largest(trained), **batch},
    }
    return MemoryEstimate(
        state={name: size for name, size in state.items() if size},
        gradients=gradients,
        moments={name: {part: size for part, size in sizes.items() if size} for name, sizes in moments.items()},
        usable_bytes=usable_bytes,
    )


def bytes_per_device(tree: Tree) -> int:
    """Of a tree of `jax.ShapeDtypeStruct`s with shardings."""
    return sum(leaf_bytes(x) for x in jax.tree.leaves(tree))


def padding_per_device(tree: Tree) -> int:
    """What a TPU's tiles add to `bytes_per_device`."""
    return sum(
        tiled_bytes(x.sharding.shard_shape(x.shape), x.dtype.itemsize) - leaf_bytes(x) for x in jax.tree.leaves(tree)
    )


def tiled_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of an array on a TPU, which stores tiles of 8 x 128 numbers of 32 bits: the two dimensions that are
    innermost are rounded up. XLA chooses which ones; the best choice is counted (the layouts in compiled programs agree
    with it)."""
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
    """Of one array that knows its sharding, on a device."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _plain_bytes(shape: Sequence[int], itemsize: int) -> int:
    return math.prod(shape) * itemsize


def is_tiled(program: Program) -> bool:
    """Whether the program's devices store arrays in tiles, as TPUs do."""
    return bool(program.mesh.devices.flat[0].platform == "tpu")


def _largest(tree: Tree) -> int:
    return max((leaf_bytes(x) for x in jax.tree.leaves(tree)), default=0)


def trained_params(program: Program) -> Tree:
    """The parameters that have gradients: all, but for those that are frozen for good."""
    params = program.abstract_params
    starts = freezing.starts(program.run.training.freeze, freezing.paths_of(params))
    return freezing.split(params, starts)[0]


class Activations:
    """The arrays of a step, split as the program's rules say."""

    def __init__(self, program: Program):
        self.program = program
        self.run: RunConfig = program.run
        self.config: ModelConfig = program.run.model
        self.size = activations.itemsize(self.config)
        self.size_of = tiled_bytes if is_tiled(program) else _plain_bytes
        parts = self.run.training.gradient_accumulation_steps
        self.sub_batches = [_part(features, parts) for features in program.batch_spec.values()]

    def bytes_of(self, held: Iterable[Held]) -> int:
        """Per device."""
        return round(sum(self._of(each) for each in held))

    def _of(self, held: Held) -> float:
        shape = NamedSharding(
            self.program.mesh, spec(held.axes, self.program.rules.activations, held.shape, self.program.mesh)
        ).shard_shape(held.shape)
        return self.size_of(shape, held.itemsize) * held.count

    def kept(self) -> list[int]:
        """Kept activations of each sub-batch, over its stacks."""
        return [sum(self._kept_by_stack(features).values()) for features in self.sub_batches]

    def _kept_by_stack(self, features: Mapping[str, ArraySpec]) -> dict[str, int]:
        return {name: self.bytes_of(held) for name, held in activations.saved(self.config, features).items()}

    def head(self) -> dict[str, int]:
        """Logits of the largest sub-batch, and the matrix that they are made with."""
        config = self.config
        if config.task_head is not None:
            return {}
        largest = max(self.sub_batches, key=lambda features: self.bytes_of([self._logits(features, 4)]))
        axes, shape = ("vocab", "embed"), (config.vocab_size, config.table_width)
        return {
            "logits": self.bytes_of([self._logits(largest, 4 if config.logits_softcap is None else 8)]),
            "cotangents of logits": self.bytes_of([self._logits(largest, self.size)]),
            "gathered head": self.bytes_of([Held("head", axes, shape, self.size)]),
        }

    def tied_logits(self) -> dict[str, int]:
        """A tied table's gradient is made last of all, when that of the lookups is there to be added to: until then the
        logits stay."""
        if self.config.task_head is not None or not self.config.tie_embeddings:
            return {}
        return {"logits": self.bytes_of(self._logits(features, 4) for features in self.sub_batches)}

    def _logits(self, features: Mapping[str, ArraySpec], size: int) -> Held:
        stack = "encoder" if self.config.decoder is None else "decoder"
        rows, length = features[f"{stack}_input_tokens"].shape
        return Held("logits", ("batch", "length", "vocab"), (rows, length, self.config.vocab_size), size)

    def layers(self) -> dict[str, int]:
        """Of the layer at which most is needed. The decoder's activations are gone when the encoder's turn comes."""
        config, all_kept = self.config, sum(self.kept())
        needs = []
        for features in self.sub_batches:
            by_stack = self._kept_by_stack(features)
            for name, stack in [*config.stacks.items(), ("generator", config.generator)]:
                if stack is not None:
                    done = by_stack["decoder"] if name == "encoder" and config.decoder is not None else 0
                    needs.append({"kept activations": all_kept - done, **self._layer(name, stack, features)})
        return max(needs, key=lambda need: sum(need.values()))

    def _layer(self, name: str, stack: StackConfig, features: Mapping[str, ArraySpec]) -> dict[str, int]:
        cells = activations.cells_of(self.config, features)["encoder" if name == "generator" else name]
        again = 0
        if self.config.remat != "none":
            whole = activations.layer(self.config, stack, cells, "none")
            again = self.bytes_of(whole) - self.bytes_of(
                activations.layer(self.config, stack, cells, self.config.remat)
            )
        scores = self.bytes_of(activations.scores(self.config, stack, cells))
        cotangents = self.bytes_of(activations.cotangents(self.config, stack, cells))
        return {
            "activations computed again": again,
            "attention scores" if scores > cotangents else "cotangents of the MLP": max(scores, cotangents),
            "gathered parameters of a layer": self._gathered(name),
        }

    def _gathered(self, name: str) -> int:
        """A layer's parameters in the model's type, whole over the axes that split parameters and not activations."""
        path = f"{name}/encoder/layers/" if name == "generator" else f"{name}/layers/"
        params, axes = self.program.spec.params, self.program.spec.logical_axes
        table = self.program.rules.activations
        total = 0
        for leaf in leaves(axes, params):
            if leaf.path.startswith(path):
                names = tuple(axis if axis in table and axis != "embed" else None for axis in leaf.axes[1:])
                total += self.bytes_of([Held(leaf.path, names, tuple(leaf.array.shape[1:]), self.size)])
        return total

    def tables(self) -> dict[str, int]:
        """Gradients of the token table and of the head, before they are reduced. A tied table has both."""
        config = self.config
        width = config.table_width
        lookups = [width] * (len(config.stacks) + (config.generator is not None))
        if config.separate_encoder_embeddings and config.encoder is not None:
            # The decoder's table is done with when the encoder's turn comes.
            lookups = [config.encoder.d_model]
        own = "head" if not config.tie_embeddings else "token_embedder"
        has_head = config.task_head is None and self._trains(own)
        return {
            # The last of them is added to zeros that are an array of their own.
            "gradients of the token table": sum(map(self._whole_table, [*lookups, lookups[-1]]))
            if self._trains("token_embedder")
            else 0,
            "gradient of the head": self._whole_table(width) if has_head else 0,
        }

    def _whole_table(self, width: int) -> int:
        """A table or head in float32, whole over fsdp."""
        return self.bytes_of([Held("table", ("vocab", "embed"), (self.config.vocab_size, width), 4)])

    def _trains(self, name: str) -> bool:
        return name in trained_params(self.program)

    def batch_bytes(self) -> int:
        features = [array for features in self.program.batch_spec.values() for array in features.values()]
        return self.bytes_of(
            Held("batch", ("batch", "length")[: len(array.shape)], array.shape, 4) for array in features
        )


def _part(features: Mapping[str, ArraySpec], parts: int) -> dict[str, ArraySpec]:
    """A sub-batch of one accumulation step. Pairs of texts go through the model as so many rows more."""
    texts = 1 + sum(name in features for name in ("positive_input_tokens", "negative_input_tokens"))
    return {
        name: ArraySpec((array.shape[0] * texts // parts, *array.shape[1:]), array.dtype)
        for name, array in features.items()
    }
