"""Requests of unequal length whose masked positions are filled together, block by block, in fixed slots.

A request takes a slot when one is free, whatever block the others are at. The settings of requests are arrays with one
value per slot, so that one program is compiled for each width. The result of a request depends on its text, its
settings and its seed only, as in `unmask_tokens`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import jax
import numpy as np
import numpy.typing as npt

from t5x_like.config.continuation import block_objective
from t5x_like.decoding.bucketing import bucket, num_row_shards, require_positions
from t5x_like.decoding.diffusion_sampling import BlockShape, MaskedText, PendingText, text_width, unmask_blocks
from t5x_like.decoding.inference_params import inference_params
from t5x_like.decoding.log_likelihood import require_masked_model
from t5x_like.decoding.request_scheduler import RequestScheduler, SlotLimits
from t5x_like.decoding.sampling import RowSampling
from t5x_like.decoding.slot_requests import NUM_SEEDS, FinishReason, Request
from t5x_like.decoding.token_selection import NOT_FINITE
from t5x_like.decoding.unmasking_schedule import DiffusionSampling
from t5x_like.program import Program
from t5x_like.utils.stall_limit import progress
from t5x_like.utils.type_aliases import PyTree


class UnmaskingScheduler(RequestScheduler):
    """Scheduler of a model that predicts masked tokens; see `diffusion_sampling`. New tokens are delivered by block."""

    unmasks = True

    def __init__(
        self,
        program: Program,
        params: PyTree,
        *,
        allowed_V: npt.NDArray[np.bool_],
        mask_id: int,
        diffusion: DiffusionSampling | None = None,
        special_tokens: tuple[Sequence[int], Sequence[int]] = ((), ()),
        config: SlotLimits | None = None,
    ):
        """Prepare the sizes.

        Args:
          program: A program whose model is an encoder or a decoder alone, or an encoder-decoder of block diffusion,
            which reads no text after the new tokens. Its mesh splits the slots, whose number is rounded up to a
            multiple of the split.
          params: The program's parameters.
          allowed_V: [vocabulary] of the tokens that may be selected.
          mask_id: Id of the mask token.
          diffusion: Order and number of passes; None: the defaults.
          special_tokens: Tokens before and after each text.
          config: Sizes.

        Raises:
          ConfigError: the model predicts no masked tokens, or the longest text does not fit its learned positions.
        """
        config = config or SlotLimits()
        model = program.run.model
        self._blocks = block_objective(program.run.data)
        self.fills_gaps = self._blocks is None
        if self._blocks is None:
            require_masked_model(model)
        most = self._num_masked(config.max_new_tokens)
        self._longest = config.max_prompt_length + most + sum(map(len, special_tokens))
        self._diffusion = diffusion or DiffusionSampling()
        block = min(self._diffusion.block_length or most, most)
        # The first stack reads the text.
        needed = {"decoder": block + 1, next(iter(model.stacks)): self._longest}
        require_positions(model, "prompt and new tokens", needed)
        shards = num_row_shards(program)
        super().__init__(dataclasses.replace(config, slots=-(-config.slots // shards) * shards))
        self.program, self.params = program, inference_params(program, params)
        self._mask_id, self._special_tokens = mask_id, special_tokens
        self._allowed_V = allowed_V
        # Before a suffix, no token can end the text.
        self._inside_V = allowed_V.copy()
        self._inside_V[[token for token in model.eos_ids if token < len(allowed_V)]] = False
        # A block of b of n positions has at least b / n of the passes, if it has not one for each position.
        per_pass = 1 if self._diffusion.steps is None else min(-(-most // self._diffusion.steps), block)
        sizes = (bucket(size, minimum=1) for size in (block, block, per_pass))
        self._shape = BlockShape(self.config.slots, text_width(model, 1), *sizes).within_positions(model)
        self._texts: list[PendingText | None] = [None] * self.config.slots

    def warm_up(self) -> None:
        width = 1
        while True:
            width = text_width(self.program.run.model, width)
            tokens = [self._mask_id] * min(width, self._longest)
            text = PendingText(MaskedText(tokens, [0]), self._diffusion, seed=0, row=0)
            self._unmask([text], [None] * self.config.slots, width)
            if width >= self._longest:
                break
            width += 1

    def run_once(self) -> None:
        progress()
        self._drop_cancelled()
        free = [slot for slot, request in enumerate(self._active) if request is None]
        for slot, admitted in zip(free, self._next_waiting(len(free)), strict=False):
            self._active[slot], self._texts[slot] = admitted, self._pending(admitted)
        if not self.num_active:
            return
        longest = max(len(text.tokens) for text in self._texts if text is not None)
        delivered = [0 if text is None else len(text.new) for text in self._texts]
        self._unmask(self._texts, self._active, text_width(self.program.run.model, longest))
        for slot, (request, text) in enumerate(zip(self._active, self._texts, strict=True)):
            if request is None or text is None:
                continue
            finish: FinishReason | None = None
            most = request.max_new_tokens
            if text.is_done or len(text.new) >= most:
                has_ended = text.end is not None and text.end < most
                finish = "error" if NOT_FINITE in text.new else "stop" if has_ended else "length"
                self._active[slot] = self._texts[slot] = None
            new = text.result[delivered[slot] : most]
            request.on_tokens([] if finish == "error" else new, finish)

    def _free(self, freed: npt.NDArray[np.bool_]) -> None:
        for slot in np.flatnonzero(freed).tolist():
            self._texts[slot] = None

    def _num_masked(self, wanted: int) -> int:
        return wanted if self._blocks is None else self._blocks.in_whole_blocks(wanted)

    def _pending(self, request: Request) -> PendingText:
        before, after = self._special_tokens
        start, count = len(before) + len(request.prompt), self._num_masked(request.max_new_tokens)
        tokens = [*before, *request.prompt, *[self._mask_id] * count, *request.suffix, *after]
        return PendingText(
            MaskedText(tokens, range(start, start + count)),
            self._diffusion,
            seed=request.seed % NUM_SEEDS,
            row=request.row,
            # The text goes on after the new tokens, none of which can end it.
            eos_ids=() if request.suffix else self.program.run.model.eos_ids,
        )

    def _unmask(self, texts: Sequence[PendingText | None], requests: Sequence[Request | None], width: int) -> None:
        vocab_size = self.program.run.model.vocab_size
        settings = [None if request is None else request.sampling for request in requests]

        def column(values: Sequence[float], dtype: type[np.generic] = np.float32) -> jax.Array:
            # On the host: the compiled function that receives it places it on its mesh.
            return cast(jax.Array, np.array(values, dtype))

        sampling = RowSampling(
            # Settings that a request does not use get the value without effect: all requests share one program.
            temperature_R=column([0 if one is None else one.temperature for one in settings]),
            top_k_R=column([(one and one.top_k) or vocab_size for one in settings], np.int32),
            top_p_R=column([1 if one is None or one.top_p is None else one.top_p for one in settings]),
            min_p_R=column([(one and one.min_p) or 0 for one in settings]),
        )
        allowed_RxV = np.stack(
            [self._inside_V if request is not None and request.suffix else self._allowed_V for request in requests]
        )
        unmask_blocks(
            self.program,
            self.params,
            texts,
            self._shape._replace(width=width),
            allowed_RxV,
            sampling,
            self._diffusion.order,
        )
