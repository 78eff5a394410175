"""Continuous batching: requests of unequal length are decoded in fixed slots of one compiled step.

A request takes a slot when one is free. Its prompt is read into the slot, and each step decodes one token for every
slot in use. The settings of requests are arrays with one value per slot, so neither new requests nor their settings
compile a new program. The result of a request depends on its prompt, its settings and its seed only, not on the other
requests.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from t5x_like.decoding.bucketing import bucket, check_positions, num_row_shards
from t5x_like.decoding.inference_params import inference_params
from t5x_like.decoding.log_likelihood import score_stream
from t5x_like.decoding.request_scheduler import RequestScheduler, SlotLimits
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.slot_requests import FinishReason, Request, request_arrays
from t5x_like.decoding.slots import NewTokens, SlotSettings, decode_slots, empty_slots, free_slots, prefill_slots
from t5x_like.decoding.token_logprobs import on_host
from t5x_like.decoding.token_selection import NOT_FINITE
from t5x_like.program import Program
from t5x_like.utils.stall_limit import progress
from t5x_like.utils.type_aliases import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class BatcherConfig(SlotLimits):
    """Sizes that are fixed when the programs are compiled.

    Attributes:
      steps_per_sync: Number of tokens that every slot decodes before the host looks for new requests.
      prefill_batch_size: Number of prompts that are read at once.
    """

    steps_per_sync: int = 4
    prefill_batch_size: int = 4


class Batcher(RequestScheduler):
    """Continuous batcher of models that decode from left to right."""

    config: BatcherConfig

    def __init__(
        self,
        program: Program,
        params: PyTree,
        *,
        allowed_V: npt.NDArray[np.bool_],
        bidirectional: bool = False,
        config: BatcherConfig | None = None,
        cache_dtype: str | None = None,
    ):
        """Allocate the slots.

        Args:
          program: A program whose model has a decoder. Its mesh splits the slots, whose number is rounded up to a
            multiple of the split.
          allowed_V, bidirectional, cache_dtype: See `generate_tokens`.

        Raises:
          ConfigError: the longest prompt and its continuation do not fit a table of learned positions.
        """
        config = config or BatcherConfig()
        model_config = program.run.model
        prompt_positions = config.max_prompt_length + (model_config.encoder is None)
        check_positions(model_config, prompt_positions, config.max_new_tokens)
        shards = num_row_shards(program)
        super().__init__(
            dataclasses.replace(
                config,
                slots=-(-config.slots // shards) * shards,
                # Both numbers are dimensions that the mesh splits, so they are rounded up to multiples of its shards.
                prefill_batch_size=-(-min(config.prefill_batch_size, config.slots) // shards) * shards,
            )
        )
        self.program, self.params = program, inference_params(program, params)
        self.scores_prompts = model_config.encoder is None and not bidirectional
        self._settings = SlotSettings(
            program,
            max_prompt_length=config.max_prompt_length,
            max_new_tokens=config.max_new_tokens,
            steps_per_sync=config.steps_per_sync,
            bidirectional=bidirectional,
            cache_dtype=cache_dtype,
        )
        self._allowed = jnp.asarray(allowed_V)
        placeholder = Request([1], 1, Sampling(), lambda tokens, finish: None)
        arrays = request_arrays(program, [placeholder], self.config.slots, self.config.max_prompt_length)
        self._slots = empty_slots(self._settings, arrays)

    def warm_up(self) -> None:
        config = self.config

        def ignore(*_: Any) -> None:
            pass

        width = bucket(1)
        while True:
            prompt = [self.program.run.model.vocab_size - 1] * min(width - 1, config.max_prompt_length)
            max_new_tokens = min(2, config.max_new_tokens)
            # As after a cancelled request, or one whose text has a stop string.
            self._slots = free_slots(self._slots, np.zeros(config.slots, bool))
            # A single prompt twice: the initial free slots have another placement on the devices than later ones, which
            # compiles another program.
            for count in (1, 1, min(2, config.prefill_batch_size)):
                for _ in range(count):
                    self.submit(Request(prompt, max_new_tokens, Sampling(), ignore))
                while self.num_waiting or self.num_active:
                    self.run_once()
            if width > config.max_prompt_length:
                break
            width *= 2
        if self.scores_prompts:
            for exponent in range(bucket(1).bit_length() - 1, bucket(config.max_prompt_length).bit_length()):
                score_stream(self.program, self.params, [0] * min(2**exponent, config.max_prompt_length))

    def run_once(self) -> None:
        progress()
        # Cancelled requests go first, so that their slots can be taken by waiting prompts in the same call.
        self._drop_cancelled()
        # Several prefills may follow each other before the next step, so that all free slots are taken. A prompt that
        # is only scored frees its slot at once: the limit keeps the active requests from waiting for the whole queue.
        left = self.config.slots
        while left and (admitted := self._admit(left)):
            left -= admitted
        if self.num_active:
            self._slots, new_KxS = decode_slots(self._settings, self.params, self._slots, self._allowed)
            # One transfer per call and the only synchronization with the device.
            self._deliver(jax.device_get(new_KxS))

    def _free(self, freed: npt.NDArray[np.bool_]) -> None:
        self._slots = free_slots(self._slots, freed)

    def _admit(self, limit: int) -> int:
        """Read the prompts of up to `limit` requests into free slots, in one batch. Return the number of requests."""
        config = self.config
        free = [slot for slot, request in enumerate(self._active) if request is None]
        free = free[: min(limit, config.prefill_batch_size)]
        admitted = self._next_waiting(len(free))
        if not admitted:
            return 0
        # Requests are recorded before anything can fail, so that `run` cancels them after an error.
        for slot, request in zip(free, admitted, strict=False):
            self._active[slot] = request
        taken = [(slot, request) for slot, request in zip(free, admitted, strict=False) if not self._ends_scored(slot)]
        count = len(admitted)
        if not taken:
            return count
        admitted = [request for _, request in taken]
        # Two programs only: a single prompt, or a full prefill batch.
        is_batch = len(admitted) > 1 or num_row_shards(self.program) > 1
        rows = config.prefill_batch_size if is_batch else 1
        arrays = request_arrays(self.program, admitted, rows, config.max_prompt_length)
        # Rows that only fill the batch get a slot number after the last slot, and are dropped by the scatter.
        slots = np.full(rows, config.slots, np.int32)
        slots[: len(admitted)] = [slot for slot, _ in taken]
        self._slots, first = prefill_slots(
            self._settings, self.params, self._slots, self._allowed, {**arrays, "slots": slots}
        )

        def by_slot(first_R: npt.NDArray[Any]) -> npt.NDArray[Any]:
            # In the layout of a step's result: [steps = 1, slots].
            array = np.zeros((1, config.slots, *first_R.shape[1:]), first_R.dtype)
            array[0, slots[: len(admitted)]] = first_R[: len(admitted)]
            return array

        # The first tokens are delivered at once; waiting for the next step would delay them by `steps_per_sync` tokens.
        self._deliver(jax.tree.map(by_slot, jax.device_get(first)))
        return count

    def _ends_scored(self, slot: int) -> bool:
        """Score the prompt of the request in a slot, if it asks for that. Return True if the request ends with it."""
        request = self._active[slot]
        assert request is not None
        if request.on_prompt_logprobs is None:
            return False
        progress()
        scored = score_stream(self.program, self.params, request.prompt)
        finish: FinishReason | None = None if request.max_new_tokens else "length"
        if any(math.isnan(entry.logprob) for entry in scored if entry.logprob is not None):
            finish = "error"
        else:
            request.on_prompt_logprobs(scored)
        if finish is None:
            return False
        self._active[slot] = None
        request.on_tokens([], finish)
        return True

    def _deliver(self, new_KxS: NewTokens) -> None:
        """Pass new tokens (arrays on the host) to their requests, and free the slots of requests that are done."""
        eos_ids = self.program.run.model.eos_ids
        for slot, request in enumerate(self._active):
            if request is None or not new_KxS.is_new[:, slot].any():
                continue
            steps = np.flatnonzero(new_KxS.is_new[:, slot])
            tokens = new_KxS.tokens[steps, slot].tolist()
            finish: FinishReason | None = None
            if new_KxS.ended[:, slot].any():
                finish = "error" if tokens[-1] == NOT_FINITE else "stop" if tokens[-1] in eos_ids else "length"
                self._active[slot] = None
            if finish not in (None, "length"):
                tokens, steps = tokens[:-1], steps[:-1]
            if request.on_logprobs is not None:
                logprobs = jax.tree.map(lambda array, steps=steps, slot=slot: array[steps, slot], new_KxS.logprobs)
                request.on_logprobs(on_host(np.asarray(new_KxS.tokens[steps, slot]), logprobs))
            request.on_tokens(tokens, finish)
