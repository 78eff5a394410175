"""Sections of an account on serving: cache, time, throughput, dialogues and speculative decoding."""

from __future__ import annotations

import dataclasses

from t5x_like.config import ModelConfig
from t5x_like.planning.account.figures import CommonFormula, Figure, Section, Subject
from t5x_like.planning.estimate import serving_formulas
from t5x_like.planning.estimate.inference import Inference, Work, expected_experts
from t5x_like.planning.estimate.kv_cache_bytes import ITEM_BYTES, cache_per_token


@dataclasses.dataclass(frozen=True)
class Draft:
    """Draft model of speculative decoding, and the probability that one of its tokens is accepted."""

    name: str
    model: ModelConfig
    acceptance: float


@dataclasses.dataclass(frozen=True)
class Claim:
    """Row of a benchmark: tokens per second, and the seconds after which a request has its whole answer."""

    tokens_per_second: float
    seconds: float


def cache(subject: Subject) -> Section:
    model, inference = subject.model, subject.inference
    decoder, dtype = model.decoder, inference.cache_dtype
    assert decoder is not None
    per, item = cache_per_token(model, dtype), ITEM_BYTES[dtype]
    figures = [Figure("per token", per.per_token, "bytes", f"layers with global attention, in {dtype}")]
    if per.window:
        figures.append(Figure("windows of local layers", per.window, "bytes", "per row, however long"))
    if per.per_source_token:
        figures.append(Figure("per encoder token", per.per_source_token, "bytes", "computed once"))
    figures.append(Figure("per token in int8", cache_per_token(model, "int8").per_token, "bytes", "with scales"))
    lengths = f"{inference.prompt:,} + {inference.answer:,} tokens, as it is allocated"
    figures.append(Figure("a row", inference.row_cache_bytes, "bytes", lengths))
    everywhere = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * item
    doubled, full = 4 * decoder.num_layers * decoder.d_model * item, 2 * decoder.num_layers * decoder.d_model * item
    width = decoder.num_kv_heads * decoder.head_dim
    wide = "" if width == decoder.d_model else f", of width {width:,} and not d"
    heads = f"{decoder.num_heads} heads share {decoder.num_kv_heads} of keys and values{wide}"
    common = [
        CommonFormula(
            "2 L 2 d bytes per token",
            doubled,
            "bytes",
            f"This is {doubled / everywhere:.3g} times what all layers keep. It counts keys and values twice; {heads}.",
        )
    ]
    if full != everywhere:
        remark = f"This is {full / everywhere:.3g} times what all layers keep: {heads}."
        common.append(CommonFormula("2 L d bytes per token", full, "bytes", remark))
    if subject.is_pair:
        remark = "A decoder alone of this depth and these key heads caches prompt and answer: as many tokens."
        common.append(CommonFormula("cross-attention doubles the cache", None, "", remark))
    return Section("KV cache", tuple(figures), tuple(common))


def least_time(subject: Subject) -> Section:
    inference = subject.inference
    read = inference.read()
    figures = [
        Figure("reading", read.flops, "FLOP", f"batch of {inference.rows:,}, {inference.prompt:,} tokens each"),
        Figure("reading", inference.seconds(read), "seconds", f"at least; bound by {inference.bound(read)}"),
    ]
    if not subject.generates:
        remark = "To label a text a decoder reads it once, too: the ratio is that of the FLOPs of reading."
        common = CommonFormula("an encoder is 50 to 1000 times as fast as a decoder", None, "", remark)
        return Section("least time", tuple(figures), (common,))
    step = inference.step(inference.decoding_lengths[-1])
    seconds, weights = inference.seconds(step), inference.decoding_weight_bytes
    figures += [
        Figure("weights that a step reads", weights, "bytes", "without tables in which embeddings are looked up"),
        Figure("the last step", seconds, "seconds", f"a token of each row, at least; bound by {inference.bound(step)}"),
        Figure("the answer", inference.decoding_seconds(), "seconds", "all decoding steps, at least"),
        Figure("a request", inference.request_seconds(), "seconds", "reading and answer, at least"),
    ]
    without = (step.bytes - weights) / inference.bytes_per_second
    remark = f"The bound is {seconds / without:.3g} times as long: a step reads all weights, once for all rows."
    common = CommonFormula("time per token = cache bytes / bandwidth", without, "seconds", remark)
    return Section("least time", tuple(figures), (common,))


def throughput(subject: Subject, claim: Claim | None) -> Section:
    inference = subject.inference
    if not subject.generates:
        return _texts_per_second(inference)
    largest = inference.largest_batch(subject.parameters)
    fits = subject.parameters * ITEM_BYTES[inference.dtype] <= inference.memory_bytes
    note = "caches beside the weights; activations are not counted"
    if largest == 0:
        note = "the cache of a row does not fit" if fits else "the weights do not fit"
    busy = min(inference.rows / inference.critical_rows, 1)
    more = ", were there memory for it" if inference.rows > largest else ""
    figures = [
        Figure("largest batch", largest, "rows", note),
        Figure("critical batch", inference.critical_rows, "rows", "products of a step take as long as its weights"),
        Figure(
            f"batch of {inference.rows:,}",
            inference.tokens_per_second(),
            "tokens per second",
            f"at most, while answering{more}; products with the weights use {100 * busy:.2g} % of the peak",
        ),
    ]
    if largest:
        fullest = dataclasses.replace(inference, rows=largest).tokens_per_second()
        figures.append(Figure(f"batch of {largest:,}", fullest, "tokens per second", "at most, while answering"))
    common = [_batch_of_caches(inference, largest), _rate_of_weights(inference)]
    if claim is not None:
        common.append(examined(claim, inference))
    return Section("throughput", tuple(figures), tuple(common))


def _batch_of_caches(inference: Inference, largest: int) -> CommonFormula:
    """Return the batch that fits by the common formula of the cache."""
    decoder = inference.model.decoder
    assert decoder is not None
    per_token = 2 * decoder.num_layers * decoder.d_model * ITEM_BYTES[inference.cache_dtype]
    rows = inference.memory_bytes / (per_token * (inference.prompt + inference.answer))
    found = f"{rows / largest:.3g} times the largest batch" if largest else "a batch that does not fit"
    remark = f"This is {found}: the formula leaves out the weights and takes as many heads of keys as of queries."
    return CommonFormula("memory / (2 L d bytes per token)", rows, "rows", remark)


def _rate_of_weights(inference: Inference) -> CommonFormula:
    """Return the tokens per second of steps that read the weights and nothing else."""
    rate = inference.rows * inference.bytes_per_second / inference.decoding_weight_bytes
    factor = rate / inference.tokens_per_second()
    remark = f"This is {factor:.3g} times the bound: a step reads the cache of each row as well, and computes."
    return CommonFormula("batch x bandwidth / weights", rate, "tokens per second", remark)


def _texts_per_second(inference: Inference) -> Section:
    one = dataclasses.replace(inference, rows=1).read()
    compute, peak = one.flops / inference.machine.flops_per_second, inference.machine.flops_per_second
    rows = max(inference.seconds(one) / compute, 1)
    figures = (
        Figure("texts per second", peak / one.flops, "", "at most, bound by compute"),
        Figure("critical batch", rows, "rows", "from here on the bound is compute"),
    )
    remark = "Only below the critical batch: above it, more rows take proportionally longer."
    common = CommonFormula("throughput grows with the batch until memory is full", None, "", remark)
    return Section("throughput", figures, (common,))


def examined(claim: Claim, inference: Inference) -> CommonFormula:
    """Return what Little's law and the bounds say about a row of a benchmark with `inference.rows` in flight."""
    implied = serving_formulas.implied_tokens_per_second(inference.rows, inference.answer, claim.seconds)
    factor = max(implied / claim.tokens_per_second, claim.tokens_per_second / implied)
    agree = "which agrees" if factor < 1.1 else f"so the two contradict each other {factor:.1f} times (Little's law)"
    most, least = inference.tokens_per_second(), inference.request_seconds()
    tokens, seconds = f"{claim.tokens_per_second:,.0f} tokens/s", f"{claim.seconds:.3g} s"
    remark = (
        f"{inference.rows:,} rows of {inference.answer:,} tokens after {seconds} are {implied:,.0f} tokens/s, {agree}. "
        f"{tokens} are {'possible' if claim.tokens_per_second <= most else f'impossible: at most {most:,.0f}'}, and "
        f"{seconds} are {'possible' if claim.seconds >= least else f'impossible: at least {least:.3g} s'}."
    )
    return CommonFormula(f"{tokens} and {seconds} per request", None, "", remark)


def dialogue(subject: Subject, turns: int) -> Section:
    inference = subject.inference
    tokens = serving_formulas.dialogue_tokens(turns, inference.prompt, inference.answer)
    histories = [turn * (inference.prompt + inference.answer) for turn in range(turns)]
    again = [inference.read(history + inference.prompt) for history in histories]
    figures = [
        Figure("read again at each turn", tokens.read_again, "tokens", "by an encoder or a bidirectional prefix"),
        Figure("", sum(work.flops for work in again), "FLOP"),
        Figure("", sum(map(inference.seconds, again)), "seconds", "at least"),
        Figure("read once", tokens.cached, "tokens", "by a causal decoder with its cache"),
    ]
    if subject.model.encoder is None:
        once = [
            Work(work.flops - inference.read(history).flops, work.bytes)
            for work, history in zip(again, histories, strict=True)
        ]
        figures += [
            Figure("", sum(work.flops for work in once), "FLOP"),
            Figure("", sum(map(inference.seconds, once)), "seconds", "at least"),
        ]
    answering = sum(inference.decoding_seconds(history) for history in histories)
    figures.append(Figure("answering", answering, "seconds", f"{turns:,} answers, at least, in either case"))
    remark = (
        f"The tokens are {tokens.read_again / tokens.cached:.3g} times as many, because the answers are read as well; "
        "but only reading takes longer, and answering is most of the time of small batches."
    )
    common = CommonFormula("(n + 1) / 2 times the cost", (turns + 1) / 2, "times", remark)
    return Section(f"dialogue of {turns:,} turns", tuple(figures), (common,))


def speculation(subject: Subject, draft: Draft) -> Section:
    inference = subject.inference
    drafting = dataclasses.replace(inference, model=draft.model)
    # Steps like checks read the experts that their rows are expected to use: their ratio is compared.
    step = inference.seconds(inference.check(0))
    cost = drafting.seconds(drafting.check(0)) / step

    def check(length: int) -> float:
        return inference.seconds(inference.check(length)) / step

    best = serving_formulas.best_draft(draft.acceptance, cost, check)
    tokens = serving_formulas.expected_tokens(draft.acceptance, best.length)
    figures = [
        Figure("cost c of a draft step", cost, "times", f"{draft.name} beside the model, by least times"),
        Figure("best draft length g", best.length, "tokens", "0: drafting does not pay"),
        Figure("tokens per check", tokens, "tokens", f"expected at an acceptance a of {draft.acceptance:g}"),
        Figure("speed", best.speedup, "times", "plain decoding, expected; checks cost their own least time"),
    ]
    decoder = inference.model.decoder
    if decoder is not None and decoder.experts is not None and best.length:
        used = expected_experts(decoder, (best.length + 1) * inference.rows)
        note = f"of each layer, expected; one token uses {decoder.experts.experts_per_token}"
        figures.append(Figure("experts that a check reads", used, "", note))
    free = serving_formulas.best_draft(draft.acceptance, cost)
    remark = f"This is the largest value over g, at g = {free.length}: with this a and c, more is impossible."
    formula = "(1 - a**(g + 1)) / ((1 - a) (g c + 1)), where a check costs as much as a step"
    return Section("speculative decoding", tuple(figures), (CommonFormula(formula, free.speedup, "times", remark),))
