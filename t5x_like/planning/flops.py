"""What a training step costs in operations: those of the model, which utilisation is measured by, and those that the
devices run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from t5x_like.config import RunConfig, batch_spec
from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.models.parameters import forward_flops_by_part
from t5x_like.planning.tokens import tokens_per_step

BACKWARD = 2
"""Products of the backward pass for each of the forward pass: one for the inputs and one for the parameters."""


def training_flops(run: RunConfig) -> float:
    """Model FLOPs of a training step: three times those of the forward pass; what remat repeats is not counted."""
    return float((1 + BACKWARD) * sum(forward_flops(run).values()))


def forward_flops(run: RunConfig) -> dict[str, int]:
    """Model FLOPs of the forward pass of a step over all sub-batches, by part: `models.parameters`."""
    total: Counter[str] = Counter()
    for features in batch_spec(run).values():
        total.update(forward_flops_by_part(run.model, features))
    return dict(total)


def executed_flops(run: RunConfig) -> float:
    """FLOPs of matrix products that the devices run in a training step.

    More than the model's: the backends here compute all pairs of a query and a key, seen or not; a mixture without a
    capacity computes all experts for all tokens, one with a capacity all its slots; and the backward pass repeats what
    it did not keep. Of attention by "reference" those are the scores. With `remat` of "dots" it is attention's own two
    products, too, and with "full" the whole forward pass of the layers but for a last product whose result nobody
    reads. Elementwise work is not counted. The optimizer has no products.
    """
    config = dataclasses.replace(
        run.model,
        encoder=_all_experts(run.model.encoder),
        decoder=_all_experts(run.model.decoder),
    )
    forward: Counter[str] = Counter()
    for features in batch_spec(run).values():
        forward.update(forward_flops_by_part(config, features, all_pairs=True))
    return float((1 + BACKWARD) * sum(forward.values()) + _repeated(config, forward))


def _all_experts(stack: StackConfig | None) -> StackConfig | None:
    """A stack whose tokens take as many experts as are computed for them."""
    if stack is None or stack.experts is None:
        return stack
    experts = stack.experts
    taken: float = experts.num_experts
    if experts.capacity_factor is not None:
        taken = experts.experts_per_token * experts.capacity_factor
    # A mean, which need not be whole.
    return dataclasses.replace(stack, experts=dataclasses.replace(experts, experts_per_token=taken))  # type: ignore[arg-type]


def _repeated(config: ModelConfig, forward: Mapping[str, int]) -> float:
    """What of the layers' forward pass the backward pass computes again."""
    scores = sum(count for part, count in forward.items() if part.endswith(" scores"))
    own = 0.5 * scores if config.attention == "reference" else 0.0
    if config.remat == "none":
        return own
    if config.remat == "dots":
        return own + scores
    last = 0.0
    for name, stack in [*config.stacks.items(), ("generator", config.generator)]:
        if stack is not None and stack.norm_placement == "pre":
            last += forward[f"{name} mlp"] * _last_product(stack)
    layers = sum(count for part, count in forward.items() if part.split()[-1] in ("projections", "scores", "mlp"))
    return own + layers - last


def _last_product(stack: StackConfig) -> float:
    """Share of an MLP's operations that the product with its last kernel has."""
    kernels = 3 if stack.mlp_gated else 2
    if stack.experts is None:
        return 1 / kernels
    router = stack.experts.num_experts / (stack.experts.experts_per_token * stack.d_ff)
    return 1 / (kernels + router)


def cross_attention_premium(run: RunConfig) -> float:
    """FLOPs of cross-attention as a share of all other FLOPs of the step: what an encoder-decoder pays for its two
    stacks over a single one that reads the same tokens; 0 for other architectures."""
    parts = forward_flops(run)
    cross = sum(count for part, count in parts.items() if part.startswith("cross "))
    return cross / (sum(parts.values()) - cross)


def six_n_d(run: RunConfig, parameters: int) -> float:
    """6 N D, the usual rule: a multiply and an add in each parameter for each cell, three times."""
    return 6.0 * parameters * tokens_per_step(run)
