"""Least time and memory of inference by arithmetic: bounds that no program on the machine can beat.

A pass over tokens takes at least its FLOPs over the machine's peak, and at least the bytes that it must read over the
bandwidth of its memory: the matrices that it multiplies by, once, and the cached keys and values that it attends to.
The longer of the two is the bound. Rows of embeddings, norms, biases, activations, latencies and transfers between
chips are not counted; they make real programs slower. In a mixture of experts at least the experts of one token are
read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from t5x_like.config.batch_spec import ArraySpec
from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.hardware.topologies import Topology
from t5x_like.models.flops import forward_flops_by_part
from t5x_like.planning.estimate.flops import decode_flops
from t5x_like.planning.estimate.kv_cache_bytes import ITEM_BYTES, CacheType, attended_bytes, cache_bytes


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of a pass, and the bytes that it must read from memory."""

    flops: float
    bytes: float


def read_features(model: ModelConfig, *, rows: int, source: int, target: int) -> Mapping[str, ArraySpec]:
    """Return the input features of a forward pass: `source` tokens of an encoder and `target` tokens of a decoder."""
    lengths = {"encoder": source, "decoder": target}
    return {f"{stack}_input_tokens": ArraySpec((rows, lengths[stack]), "int32") for stack in model.stacks}


def reading_flops(model: ModelConfig, *, rows: int, length: int) -> float:
    """Return the FLOPs of reading a text of `length` tokens, before anything is answered.

    The encoder of an encoder-decoder reads it, and the keys and values of cross-attention are computed; a decoder reads
    it causally, with the head at its last token; an encoder alone reads it without its language-model head.
    """
    has_encoder = model.encoder is not None
    features = read_features(model, rows=rows, source=length, target=0 if has_encoder else length)
    parts = forward_flops_by_part(_alone(model), features)
    read = sum(count for part, count in parts.items() if part.startswith(("encoder ", "decoder ", "cross ")))
    without_head = has_encoder or model.task_head is not None or length == 0
    return float(read + (0 if without_head else parts["head"] / length))


def _alone(model: ModelConfig) -> ModelConfig:
    """Return the model without the generator that trains it and without a task head, whose cost is small."""
    return dataclasses.replace(model, generator=None, task_head=None)


def reading_kernels(model: ModelConfig) -> float:
    """Return the elements of the matrices that reading a text multiplies by; in a mixture, those of one token."""

    def products(length: int) -> float:
        features = read_features(model, rows=1, source=length, target=0 if model.encoder is not None else length)
        parts = forward_flops_by_part(_alone(model), features)
        return sum(
            count
            for part, count in parts.items()
            if part.startswith(("encoder ", "decoder ", "cross ")) and not part.endswith(" scores")
        )

    # The difference leaves out what is computed once per batch: the products of disentangled positions.
    return (products(2) - products(1)) / 2


def decoding_kernels(model: ModelConfig) -> float:
    """Return the elements of the matrices that a decoding step multiplies by, the head among them; in a mixture of
    experts, those of one token. A tied table counts as the head; rows that embeddings are looked up in do not."""
    return decode_flops(model, rows=1, length=0) / 2


def expert_kernels(decoder: StackConfig) -> float:
    """Return the elements of the matrices of one expert, summed over the layers; 0 without experts."""
    per_layer = (3 if decoder.mlp_gated else 2) * decoder.d_model * decoder.d_ff
    return float(len(decoder.expert_layers) * per_layer)


def expected_experts(decoder: StackConfig, tokens: int) -> float:
    """Return the mean number of experts of a layer that `tokens` tokens use together, if each token chooses its experts
    uniformly and independently: E (1 - (1 - k / E)**tokens). Shared experts are not counted."""
    if decoder.experts is None:
        return 0.0
    number, chosen = decoder.experts.num_experts, decoder.experts.experts_per_token
    return number * (1 - (1 - chosen / number) ** tokens)


@dataclasses.dataclass(frozen=True)
class Inference:
    """A model that answers rows of equal lengths on a machine.

    Attributes:
      model: The model.
      machine: Chips with known speed and memory; the work is split over all of them without loss.
      prompt: Tokens of the text that is read.
      answer: Tokens that a decoder generates.
      rows: Number of rows that are processed together.
      dtype: Type of the weights.
      cache_dtype: Type of cached keys and values.
    """

    model: ModelConfig
    machine: Topology
    prompt: int
    answer: int
    rows: int = 1
    dtype: CacheType = "bfloat16"
    cache_dtype: CacheType = "bfloat16"

    @property
    def bytes_per_second(self) -> float:
        return self.machine.accelerator.hbm_bytes_per_second * self.machine.num_chips

    @property
    def memory_bytes(self) -> int:
        """Memory that a program can use, over all chips."""
        return self.machine.usable_bytes * self.machine.num_devices

    @functools.cached_property
    def decoding_weight_bytes(self) -> float:
        return decoding_kernels(self.model) * ITEM_BYTES[self.dtype]

    def seconds(self, work: Work) -> float:
        """Return the least time of a pass."""
        return max(work.flops / self.machine.flops_per_second, work.bytes / self.bytes_per_second)

    def bound(self, work: Work) -> str:
        """Return what limits a pass: compute or memory."""
        compute = work.flops / self.machine.flops_per_second
        return "compute" if compute >= work.bytes / self.bytes_per_second else "memory"

    def read(self, length: int | None = None) -> Work:
        """Return the work of reading a text for all rows: the prompt, or `length` tokens."""
        length = self.prompt if length is None else length
        flops = reading_flops(self.model, rows=self.rows, length=length)
        return Work(flops, reading_kernels(self.model) * ITEM_BYTES[self.dtype])

    def step(self, length: int, source: int | None = None) -> Work:
        """Return the work of a decoding step of one token per row.

        Args:
          length: Tokens of each row in the decoder, the new one included.
          source: Tokens of the encoder's input; None: the prompt. Ignored without an encoder.
        """
        source = self._source if source is None else source
        shape = {"rows": self.rows, "length": length, "encoder_length": source}
        cached = attended_bytes(self.model, **shape, dtype=self.cache_dtype)
        return Work(decode_flops(self.model, **shape), self.decoding_weight_bytes + cached)

    def check(self, draft_length: int) -> Work:
        """Return the work of checking a draft: one pass over `draft_length` + 1 tokens of each row after the prompt.

        The experts that these tokens use are taken to be `expected_experts`, so that this is an expectation.
        """
        tokens = draft_length + 1
        last = self.step(self.first_length)
        more = 0.0
        decoder = self.model.decoder
        if decoder is not None and decoder.experts is not None:
            used = expected_experts(decoder, tokens * self.rows) - decoder.experts.experts_per_token
            more = used * expert_kernels(decoder) * ITEM_BYTES[self.dtype]
        return Work(tokens * last.flops, last.bytes + more)

    @property
    def _source(self) -> int:
        return 0 if self.model.encoder is None else self.prompt

    @property
    def first_length(self) -> int:
        """Tokens of a decoder's row at the first decoding step, its new token included."""
        return 1 if self.model.encoder is not None else self.prompt + 1

    @property
    def decoding_lengths(self) -> range:
        """Tokens of the decoder's row at each decoding step of an answer.

        A decoder gets the first token of the answer from reading the prompt; a decoder beside an encoder needs a step.
        """
        steps = self.answer if self.model.encoder is not None else self.answer - 1
        return range(self.first_length, self.first_length + steps)

    def decoding_seconds(self, history: int = 0) -> float:
        """Return the least time of all decoding steps of an answer; `history`: tokens before the prompt."""
        has_encoder = self.model.encoder is not None
        return sum(
            self.seconds(self.step(length, self._source + history) if has_encoder else self.step(length + history))
            for length in self.decoding_lengths
        )

    def request_flops(self) -> float:
        """Return the FLOPs of reading a prompt and decoding its answer, for one row."""
        one = dataclasses.replace(self, rows=1)
        answers = self.model.decoder is not None and self.model.task_head is None
        decoding = sum(one.step(length).flops for length in self.decoding_lengths) if answers else 0.0
        return one.read().flops + decoding

    def request_seconds(self) -> float:
        """Return the least time from a prompt to its whole answer."""
        return self.seconds(self.read()) + self.decoding_seconds()

    def tokens_per_second(self) -> float:
        """Return the largest number of generated tokens per second over all rows, prompts not counted."""
        return self.rows * len(self.decoding_lengths) / self.decoding_seconds()

    @property
    def row_cache_bytes(self) -> int:
        """Bytes of a row's cache for the prompt and the whole answer, as `Model.init_cache` allocates it."""
        length = self.answer if self.model.encoder is not None else self.prompt + self.answer
        shape = {"rows": 1, "length": length, "encoder_length": self._source}
        return cache_bytes(self.model, **shape, dtype=self.cache_dtype)

    def largest_batch(self, parameters: int) -> int:
        """Return the largest number of rows whose caches fit beside all `parameters`; 0 if the weights do not fit.

        Activations are not counted.
        """
        left = self.memory_bytes - parameters * ITEM_BYTES[self.dtype]
        return max(int(left // self.row_cache_bytes), 0)

    @property
    def critical_rows(self) -> float:
        """Rows from which on the products with a step's weights take longer than reading the weights."""
        return self.machine.flops_per_second / self.bytes_per_second * ITEM_BYTES[self.dtype] / 2


def require_speeds(machine: Topology) -> Topology:
    """Return the machine if the table of accelerators has its speed and memory.

    Raises:
      ConfigError: it does not, as for a CPU.
    """
    if not machine.flops_per_second:
        expected = "an accelerator whose speed and memory are known, such as a100:1, h100:8 or v5e:2x2"
        raise ConfigError([ConfigProblem("--machine", str(machine), expected)])
    return machine
