"""Sections of an account that do not depend on serving: parameters, FLOPs, objectives, and training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from t5x_like.config import (
    CausalLM,
    DataConfig,
    FillInTheMiddle,
    MaskedDiffusion,
    MaskedLM,
    ModelConfig,
    PrefixLM,
    SpanCorruption,
)
from t5x_like.config.batch_sizes import batch_sizes
from t5x_like.models.flops import forward_flops, forward_flops_by_part
from t5x_like.planning.account.figures import CommonFormula, Figure, Section, Subject
from t5x_like.planning.estimate import flops, serving_formulas
from t5x_like.planning.estimate.inference import read_features
from t5x_like.planning.estimate.kv_cache_bytes import ITEM_BYTES
from t5x_like.planning.estimate.scaling_laws import tokens_for
from t5x_like.planning.estimate.tokens import ObjectiveCost, objective_costs, tokens_per_step
from t5x_like.utils import formatting


def parameters(subject: Subject) -> Section:
    model = subject.model
    figures = [Figure(name, part.count, "parameters") for name, part in sorted(subject.parts.items())]
    figures.append(Figure("total", subject.parameters, "parameters"))
    if subject.active != subject.parameters:
        figures.append(Figure("active", subject.active, "parameters", "used by one token; all must be in memory"))
    weights = subject.parameters * ITEM_BYTES[subject.inference.dtype]
    memory = subject.inference.memory_bytes
    fit = "fit" if weights <= memory else "do not fit"
    note = f"in {subject.inference.dtype}; they {fit} into the {memory / 1e9:.4g} GB that programs can use"
    figures.append(Figure("weights", weights, "bytes", note))
    guess = sum(12 * stack.num_layers * stack.d_model**2 for stack in model.stacks.values())
    stack = next(reversed(model.stacks.values()))
    size = 12 * stack.num_layers * stack.d_model**2
    right = serving_formulas.layers_of_size(size, stack.d_model / stack.num_layers)
    common = (
        CommonFormula(
            "12 L d**2",
            guess,
            "parameters",
            f"This is {guess / subject.parameters:.2f} times the count. It has no tables, cross-attention, gates or "
            "experts, assumes d_ff = 4 d, and gives each head its own keys.",
        ),
        CommonFormula(
            "d = 2 (P / 12)**0.5 and L = int(P / (12 d**2)) for P parameters",
            serving_formulas.layers_by_the_short_formula(size),
            "",
            "It gives a quarter of a layer, rounded down, for every P: 12 L d**2 = P has two unknowns. With d = r L it "
            f"is L = (P / (12 r**2))**(1/3), here {right:.4g}.",
        ),
    )
    return Section("parameters", tuple(figures), common)


def forward_pass(subject: Subject) -> Section:
    prompt, target = subject.inference.prompt, subject.target_length
    parts = forward_flops_by_part(subject.model, read_features(subject.model, rows=1, source=prompt, target=target))
    training, six = 3 * sum(parts.values()), 6 * subject.active * subject.row_tokens
    figures = (
        *_per_token(subject.model, parts, prompt, target),
        Figure("training on a row", training, "FLOP", f"{subject.row_tokens:,} tokens, three times the forward pass"),
    )
    remark = f"This is {six / training:.2f} times the count. "
    if subject.is_pair:
        remark += "It charges every token for both stacks, but each token passes through one of them."
    elif six > training:
        remark += "Rows of embeddings are looked up and not multiplied."
    else:
        remark += "It leaves out the scores of attention."
    return Section("forward FLOPs per token", figures, (CommonFormula("6 N D on such a row", six, "FLOP", remark),))


def _per_token(model: ModelConfig, parts: dict[str, int], source: int, target: int) -> Iterator[Figure]:
    """Yield the FLOPs of each part per token of the stack that it belongs to, and the sum of each stack."""
    if model.decoder is None:
        groups = [("encoder", parts, source)]
    elif model.encoder is None:
        groups = [("decoder", parts, target)]
    else:
        of_source = {name: count for name, count in parts.items() if name.startswith("encoder ")}
        of_target = {name: count for name, count in parts.items() if name not in of_source}
        # Keys and values of cross-attention are computed from the source, queries and outputs from the target.
        alone = forward_flops_by_part(model, read_features(model, rows=1, source=source, target=0))
        of_source["cross keys and values"] = alone["cross projections"]
        of_target["cross projections"] -= alone["cross projections"]
        groups = [("encoder", of_source, source), ("decoder", of_target, target)]
    for stack, group, length in groups:
        for name, count in group.items():
            yield Figure(name, count / length, "FLOP", f"per {stack} token")
        name = f"{stack} total" if len(groups) > 1 else "total"
        yield Figure(name, sum(group.values()) / length, "FLOP", f"per {stack} token, {length:,} in a row")


def common_objectives(model: ModelConfig, prompt: int, answer: int) -> tuple[DataConfig, ...]:
    """Return data with the common objectives of an architecture, in rows of prompt and answer."""
    spans = SpanCorruption(name="span corruption (3, 15 %)", mean_noise_span_length=3.0)
    prefix = PrefixLM(name="prefix LM, uniform split", max_target_fraction=1.0)
    match model.architecture:
        case "encoder_decoder":
            half = PrefixLM(name="prefix LM")
            return (
                DataConfig(
                    layout="encoder_decoder", mixture=(spans, half), inputs_length=prompt, targets_length=answer
                ),
            )
        case "encoder":
            masked = tuple(MaskedLM(name=f"masked LM, {100 * rate:.0f} %", mask_rate=rate) for rate in (0.15, 0.3))
            both = (*masked, MaskedDiffusion(name="masked diffusion"))
            return (DataConfig(layout="encoder", mixture=both, inputs_length=prompt, targets_length=0),)
        case "decoder":
            causal = (CausalLM(name="causal LM"), FillInTheMiddle(name="fill in the middle"))
            return (
                DataConfig(layout="causal_lm", mixture=causal, inputs_length=prompt, targets_length=answer),
                DataConfig(layout="prefix_lm", mixture=(prefix, spans), inputs_length=prompt, targets_length=answer),
            )
        case architecture:
            assert_never(architecture)


def objectives(subject: Subject) -> Section | None:
    """Return the section of the run's objectives, or of common ones; None if there are none for this model."""
    prompt, answer = subject.inference.prompt, subject.inference.answer
    datas = common_objectives(subject.model, prompt, answer) if subject.run is None else (subject.run.data,)
    costs = [cost for data in datas for cost in objective_costs(subject.model, data)]
    if not costs:
        return None
    remark = "Only tokens with a loss teach: compare objectives both at equal FLOPs and at equal loss tokens."
    common = CommonFormula("tokens of text, or steps, as the measure of training", None, "", remark)
    return Section("loss tokens per GFLOP of training", tuple(_objective(cost) for cost in costs), (common,))


def _objective(cost: ObjectiveCost) -> Figure:
    share = cost.loss_tokens / cost.raw_tokens
    note = f"{cost.loss_tokens:,.0f} of {cost.raw_tokens:,.0f} raw tokens in a row, {share:.2f}"
    return Figure(cost.name, cost.loss_tokens / (cost.flops / 1e9), "tokens", note)


def break_even(subject: Subject) -> Section:
    """Return the section on the inference that costs as many FLOPs as the training."""
    run, inference = subject.run, subject.inference
    distillation = None if run is None else run.training.distillation
    has_teacher = distillation is not None and distillation.top_k is None
    teacher = ", and that of the teacher once" if has_teacher else ""
    if run is None:
        tokens, note = tokens_for(subject.active), "compute-optimal by Besiroglu et al. 2024"
        features = read_features(subject.model, rows=1, source=inference.prompt, target=subject.target_length)
        training = 3.0 * forward_flops(subject.model, features) * tokens / subject.row_tokens
    else:
        steps = run.training.num_train_steps
        full_steps = batch_sizes(run.training).in_full_batches(steps)
        tokens, note = tokens_per_step(run) * full_steps, f"positions of {steps:,} steps"
        training = flops.training_flops(run) * full_steps
    even = serving_formulas.break_even_tokens(tokens)
    figures = (
        Figure("training", tokens, "tokens", note),
        Figure("training", training, "FLOP", f"three times the forward pass{teacher}"),
        Figure("break-even", even, "tokens", "T = 3 D at equal utilization, else times the ratio of the two"),
        Figure(
            "break-even", training / inference.request_flops(), "", "requests of this prompt and answer, as counted"
        ),
    )
    few, many = (formatting.count(times * even) for times in (10, 100))
    remark = f"One trained model must then process {few} to {many} tokens, at equal utilization."
    common = CommonFormula("inference costs 10 to 100 times the training", None, "", remark)
    return Section("training and inference", figures, (common,))
