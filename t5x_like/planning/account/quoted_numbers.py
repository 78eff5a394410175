"""The page of quoted numbers: claims on the cost of models as they are often repeated, beside what arithmetic gives.

Every value is computed here. `t5x-like account --quoted` prints the page, which is kept as docs/quoted-numbers.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from t5x_like.config import ModelConfig
from t5x_like.config.recipes import load_recipe
from t5x_like.hardware.topologies import parse_topology
from t5x_like.models.flops import forward_flops, forward_flops_by_part
from t5x_like.models.presets.by_name import preset
from t5x_like.planning.account.model_sections import common_objectives
from t5x_like.planning.account.serving_sections import Claim, examined
from t5x_like.planning.estimate import serving_formulas
from t5x_like.planning.estimate.inference import (
    Inference,
    expected_experts,
    expert_kernels,
    read_features,
    reading_flops,
    reading_kernels,
)
from t5x_like.planning.estimate.kv_cache_bytes import cache_per_token
from t5x_like.planning.estimate.parameters import ParameterCount, model_parts, total
from t5x_like.planning.estimate.scaling_laws import BESIROGLU, HOFFMANN, compute_optimal
from t5x_like.planning.estimate.tokens import denoiser_tokens, objective_costs
from t5x_like.utils import formatting

INTRODUCTION = """# Numbers people quote

Posts, talks and papers repeat figures on what encoders, decoders and encoder-decoders cost. Here is what the
arithmetic of this package gives for each. Times are lower bounds at the data sheet's peak and bandwidth, for weights
and caches in bfloat16, on one A100 with 80 GB where nothing else is said: a real program takes longer.
[Account for a model](account.md) has the formulas, and computes the same for your model and machine.

This page is printed by the command below, and a test compares the two.

```bash
t5x-like account --quoted > docs/quoted-numbers.md
```
"""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A claim, the value that replaces or confirms it, and the reason, as Markdown of one line each."""

    claim: str
    value: str
    reason: str


def page() -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION]
    for title, entries in SECTIONS.items():
        rows = [f"| {entry.claim} | {entry.value} | {entry.reason} |" for entry in entries()]
        parts.append("\n".join([f"## {title}", "", "| quoted | value | why |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _inference(name: str, machine: str = "a100:1", prompt: int = 512, answer: int = 128, rows: int = 1) -> Inference:
    return Inference(preset(name), parse_topology(machine), prompt, answer, rows)


@functools.cache
def _count(model: ModelConfig | str) -> ParameterCount:
    """Return the parameters of a model or preset."""
    return total(model_parts(preset(model) if isinstance(model, str) else model))


def _decoder(model: ModelConfig) -> ModelConfig:
    """Return the decoder of an encoder-decoder as a model of its own."""
    return dataclasses.replace(model, encoder=None, separate_encoder_embeddings=False)


def _caches() -> list[Entry]:
    llama = preset("llama_3:70b")
    decoder, per_token = llama.decoder, cache_per_token(llama).per_token
    assert decoder is not None
    quoted = 4 * decoder.num_layers * decoder.d_model * 2
    own_keys = per_token * decoder.num_heads // decoder.num_kv_heads
    xxl = cache_per_token(preset("t5_1_1:xxl"), "bfloat16")
    gemma = preset("t5gemma:2b-2b").decoder
    assert gemma is not None
    modern = preset("modernbert:base")
    assert modern.encoder is not None
    everywhere = dataclasses.replace(modern, encoder=dataclasses.replace(modern.encoder, layer_pattern=("global",)))
    windows, full = (
        forward_flops_by_part(config, read_features(config, rows=1, source=8192, target=0))["encoder scores"]
        for config in (modern, everywhere)
    )
    return [
        Entry(
            f"A cached token takes 2 L 2 d bytes: {quoted:,} B for Llama 3 70B",
            f"{per_token:,} B, {quoted / per_token:.0f} times less",
            f"2 L g h bytes of the type, for g key heads of width h: the formula counts keys and values twice, and "
            f"{decoder.num_heads} heads share {decoder.num_kv_heads} key heads",
        ),
        Entry(
            "Its cache of 8,192 tokens is 42 GB, more than half of an A100",
            formatting.decimal_size(8192 * per_token),
            f"the same formula; with keys for each head it would be {formatting.decimal_size(8192 * own_keys)}",
        ),
        Entry(
            "An encoder-decoder caches twice as much, since it has cross-attention",
            f"T5 1.1 XXL: {xxl.per_token:,} B per decoder token and {xxl.per_source_token:,} B per encoder token",
            "the keys and values of the source are computed once; S + T tokens take what they take in an equally deep "
            "decoder",
        ),
        Entry(
            "Grouped queries and windows are for decoders",
            f"T5Gemma 2B-2B: {gemma.num_heads} heads share {gemma.num_kv_heads}; ModernBERT at 8,192 tokens: "
            f"{100 * windows / full:.0f} % of the pairs",
            "cross-attention caches shrink by the same factor, and two of three layers of ModernBERT have windows",
        ),
    ]


def _sizes() -> list[Entry]:
    size = 7e9
    layers = serving_formulas.layers_of_size(size, 128)
    deberta, ul2, pair, alone = map(_count, ("deberta_v3:large", "ul2_20b", "t5gemma_2:270m-270m", "gemma_3:270m"))
    table = preset("deberta_v3:large").vocab_size * 1024
    return [
        Entry(
            "P parameters: `d = int((P/12)**.5)*2`, `L = int(P/(12*d**2))`",
            f"{serving_formulas.layers_by_the_short_formula(size)} layers, for every P",
            "12 L d² = P has two unknowns; with d = r L it is L = (P / 12 r²)^(1/3): for 7B and r = 128 "
            f"{layers:.1f} layers of width {128 * layers:,.0f}",
        ),
        Entry(
            "DeBERTa-v3 large has 304M parameters",
            f"{deberta.count / 1e6:.1f}M",
            f"its table of embeddings has another {table / 1e6:.0f}M",
        ),
        Entry(
            "The largest encoder-decoder has 11B",
            f"UL2 20B: {ul2.count / 1e9:.1f}B",
            "published with its weights",
        ),
        Entry(
            "T5Gemma 2 270M-270M has 540M parameters",
            f"{pair.count / 1e6:.0f}M, {pair.count / alone.count:.2f} times Gemma 3 270M",
            "encoder and decoder share the table of embeddings, and cross-attention has no matrices of its own",
        ),
    ]


def _times() -> list[Entry]:
    a100 = _inference("llama_3:8b")
    weights, bandwidth, peak = 7e9 * 2, a100.bytes_per_second, a100.machine.flops_per_second
    read, llama, bert = 2 * 7e9 * 512 / peak, a100.seconds(a100.read()), _inference("bert:base")
    encode = bert.seconds(bert.read())
    base = reading_kernels(bert.model) * 2 / bandwidth
    costs = {name: reading_flops(preset(name), rows=1, length=512) for name in ("deberta_v3:large", "bert:large")}
    ratios = {name: a100.read().flops / cost for name, cost in costs.items()}
    heavy = _count("llama_3:70b").count * 2
    chips = [parse_topology(name) for name in ("v5e:1x1", "v4:2x2x1", "v6e:1x1", "v5p:2x2x1")]
    bandwidths = ", ".join(f"{c.accelerator.name} {c.accelerator.hbm_bytes_per_second / 1e9:,.0f}" for c in chips[1:])
    critical = ", ".join(
        f"{c.accelerator.name} {c.accelerator.flops_per_second / c.accelerator.hbm_bytes_per_second:.0f}" for c in chips
    )
    shares = ", ".join(f"{100 * rows / a100.critical_rows:.2g} % for a batch of {rows}" for rows in (1, 8, 23))
    return [
        Entry(
            "A 7B decoder takes 0.30 ms per token: cache bytes / bandwidth",
            f"at least {formatting.short_time(weights / bandwidth)}",
            f"a step reads all weights, once for all rows: {formatting.decimal_size(weights)}",
        ),
        Entry("A 7B decoder reads 512 tokens in 3.3 ms", f"at least {formatting.short_time(read)}", "2 N FLOP a token"),
        Entry(
            "Llama 3 70B in 16 bits runs on one A100 with 80 GB",
            "it does not fit",
            f"{formatting.decimal_size(heavy)} of weights",
        ),
        Entry(
            "Encoders are 50 to 1,000 times as fast as decoders",
            f"{llama / encode:.0f} times for labelling 512 tokens by BERT base and Llama 3 8B",
            f"{formatting.short_time(encode)} and {formatting.short_time(llama)}: to label, a decoder only reads, so "
            "the ratio is that of the FLOPs",
        ),
        Entry(
            "To classify, a 7B decoder is 50 times as expensive as an encoder of 300M",
            f"Llama 3 8B: {ratios['deberta_v3:large']:.1f} times DeBERTa-v3 large, {ratios['bert:large']:.1f} times "
            "BERT large",
            "FLOPs on 512 tokens; DeBERTa's scores of relative positions cost extra",
        ),
        _texts_per_second("DeBERTa-v3 large encodes 48,000 texts/s", "deberta_v3:large", 48_000),
        _texts_per_second("BGE large (a BERT large) encodes 62,000 texts/s", "bert:large", 62_000),
        _texts_per_second("Llama 3 8B labels 890 texts/s", "llama_3:8b", 890),
        _benchmark_row(64, 128, Claim(12_400, 0.165)),
        _benchmark_row(32, 512, Claim(8_200, 0.58)),
        Entry(
            "Throughput of an encoder grows with the batch until memory is full",
            "BERT base at 512 tokens: a single text is bound by compute",
            f"its FLOPs take {formatting.short_time(encode)}, its weights {formatting.short_time(base)}",
        ),
        Entry(
            "Decoding uses 5 to 15 % of the compute",
            f"at most {shares}",
            f"B rows do B FLOP per byte of bfloat16 weights, an A100 {a100.critical_rows:.0f}",
        ),
        Entry(
            "TPU v5e has a high memory bandwidth per chip",
            f"{chips[0].accelerator.hbm_bytes_per_second / 1e9:.0f} GB/s; {bandwidths}",
            f"the batch from which decoding is bound by compute: {critical}",
        ),
        Entry(
            "Attention is the quadratic cost of long texts",
            f"as much as all else from {6 * 4096:,} tokens on, at d = 4,096",
            "matrices cost 24 d² FLOP per layer and token (d_ff = 4 d), attention to n tokens 4 n d: equal at n = 6 d",
        ),
    ]


def _texts_per_second(claim: str, name: str, quoted: float) -> Entry:
    model, peak = preset(name), parse_topology("a100:1").flops_per_second
    most = {length: peak / reading_flops(model, rows=1, length=length) for length in (512, 128)}
    # In large batches, so that products that are computed once per batch do not count.
    rows, length = 256, 1
    while peak * rows / reading_flops(model, rows=rows, length=length + 1) >= quoted:
        length += 1
    rates = " and ".join(f"{rate:,.0f}/s at {tokens} tokens" for tokens, rate in most.items())
    return Entry(claim, f"at most {rates}", f"the quoted rate leaves {length:,} tokens to a text at the peak")


def _benchmark_row(rows: int, answer: int, claim: Claim) -> Entry:
    verdict = examined(claim, _inference("llama_3:8b", prompt=1, answer=answer, rows=rows)).remark
    contradiction, _, bounds = verdict.partition(". ")
    quoted = f"{claim.tokens_per_second:,.0f} tokens/s, {1000 * claim.seconds:.0f} ms"
    return Entry(f"Llama 3 8B, batch {rows}, {answer} tokens: {quoted}", bounds.rstrip("."), contradiction)


def _training() -> list[Entry]:
    tokens, size = 1.4e12, 70e9
    even = formatting.count(serving_formulas.break_even_tokens(tokens))
    ten, hundred = (formatting.count(serving_formulas.break_even_tokens(k * tokens)) for k in (10, 100))
    published, refit = (compute_optimal(6 * size * tokens, fit) for fit in (HOFFMANN, BESIROGLU))
    t5 = load_recipe("t5")
    (r,) = denoiser_tokens(t5)
    ul2 = denoiser_tokens(load_recipe("ul2"))
    ul2_share = sum(each.loss_tokens for each in ul2) / sum(each.raw_tokens for each in ul2)
    positions = r.rows * (t5.data.inputs_length + t5.data.targets_length)
    llama = preset("llama_3:1b")
    datas = common_objectives(llama, 512, 512)
    causal, *others = [cost for data in datas for cost in objective_costs(llama, data)]
    exposure = ", ".join(f"{cost.name} 1/{causal.loss_tokens / cost.loss_tokens:.2g}" for cost in others)
    return [
        Entry(
            "Inference costs 10 to 100 times the training",
            f"equal at {even} tokens, for 70B parameters and 1.4T tokens",
            f"6 N D = 2 N T gives T = 3 D at equal utilization; 10 to 100 times need {ten} to {hundred}",
        ),
        Entry(
            "70B parameters and 1.4T tokens are compute-optimal",
            f"{formatting.flops(6 * size * tokens)}: {published.tokens_per_parameter:.0f} tokens per parameter by the "
            f"published fit, {refit.tokens_per_parameter:.0f} by the refit",
            "the constants published for approach 3 contradict the paper's own model; Besiroglu et al. 2024 fit its "
            "data again",
        ),
        Entry(
            "T5 learns from half of its tokens",
            f"{r.loss_tokens / r.raw_tokens:.2f} of the raw tokens, {r.loss_tokens / positions:.2f} of the positions",
            f"spans of 3 tokens, 15 %: a row has {r.loss_tokens / r.rows:.0f} loss tokens for "
            f"{r.raw_tokens / r.rows:.0f} raw ones",
        ),
        Entry(
            "15T tokens give masked LM 2.25T predictions",
            f"at 15 %; 4.5T at 30 %, {15 * ul2_share:.2g}T with UL2's seven denoisers",
            f"UL2 has a loss on {ul2_share:.2f} of the raw tokens",
        ),
        Entry(
            "Denoising is hugely disadvantaged",
            f"loss tokens per FLOP beside causal LM: {exposure}",
            "rows of 1,024 in one stack: it depends on the objective",
        ),
    ]


def _pairs() -> list[Entry]:
    eleven = preset("t5_1_0:xxl")
    features = read_features(eleven, rows=1, source=512, target=114)
    six = 6 * _count("t5_1_0:xxl").count * (512 + 114) / (3 * forward_flops(eleven, features))
    names = {"T5 1.1 XXL": "t5_1_1:xxl", "UL2": "ul2_20b", "T5Gemma 2B-2B": "t5gemma:2b-2b"}
    names["T5Gemma 2 1B-1B"] = "t5gemma_2:1b-1b"
    models = {title: preset(name) for title, name in names.items()}
    bodies = ", ".join(f"{title} {_body_ratio(model):.2f}" for title, model in models.items())
    sizes = ", ".join(f"{_count(model).count / _count(_decoder(model)).count:.2f}" for model in models.values())
    talk = _inference("t5gemma:2b-2b", "h100:1", prompt=100, answer=100)
    tokens = serving_formulas.dialogue_tokens(10, 100, 100)
    histories = [200 * turn for turn in range(10)]
    reading = sum(talk.seconds(talk.read(history + 100)) for history in histories)
    answering = sum(talk.decoding_seconds(history) for history in histories)
    return [
        Entry(
            "An encoder-decoder of 2 N parameters costs as much as a decoder of N",
            f"FLOPs of the layers: {bodies} times",
            f"512 + 512 tokens beside its decoder on all of them; parameters {sizes} times",
        ),
        Entry(
            "Training costs 6 N D",
            f"{six:.2f} times the count for T5 11B (1.0)",
            "512 + 114 tokens; each token passes through one of the two stacks",
        ),
        Entry(
            "In a dialogue an encoder reads everything again: (n + 1) / 2 times the cost",
            f"{tokens.read_again / tokens.cached:.0f} times the tokens, but {formatting.short_time(reading)} beside "
            f"{formatting.short_time(answering)} of answering",
            "T5Gemma 2B-2B on an H100, 10 turns of 100 + 100 tokens, batch 1: answers are bound by memory; a prefix LM "
            "reads again as well",
        ),
    ]


def _body_ratio(model: ModelConfig) -> float:
    """Return the FLOPs of both stacks on 512 + 512 tokens over those of the decoder alone on 1,024."""
    pair = forward_flops_by_part(model, read_features(model, rows=1, source=512, target=512))
    alone = _decoder(model)
    one = forward_flops_by_part(alone, read_features(alone, rows=1, source=0, target=1024))
    return (sum(pair.values()) - pair["head"]) / (sum(one.values()) - one["head"])


def _speculation() -> list[Entry]:
    large, small, tiny = (_count(name).count for name in ("llama_3:70b", "llama_3:8b", "llama_3:1b"))
    mixtral = preset("mixtral_8x7b")
    decoder = mixtral.decoder
    assert decoder is not None
    stack = dataclasses.replace(decoder, num_layers=56, d_model=6144, num_heads=48, d_ff=16_384)
    larger = dataclasses.replace(mixtral, decoder=stack)
    active = _count("mixtral_8x7b").active
    used = expected_experts(decoder, 6)
    chosen = decoder.experts.experts_per_token if decoder.experts is not None else 0
    read = active + (used - chosen) * expert_kernels(decoder)
    return [
        _speedup("Llama 3 70B with 8B as draft, 75 % accepted: 2.3 times", 0.75, small / large, 2.3),
        _speedup("Llama 3 70B with 1B as draft, 55 % accepted: 1.8 times", 0.55, tiny / large, 1.8),
        _speedup(
            "Mixtral 8x22B with 8x7B as draft, 65 % accepted: 2.0 times", 0.65, active / _count(larger).active, 2.0
        ),
        Entry(
            "A check of a draft costs as much as a step",
            f"Mixtral 8x7B, 6 tokens: {used:.1f} of 8 experts, {read / 1e9:.1f}B parameters, {read / active:.1f} times",
            f"6 tokens choose 8 (1 - 0.75^6) experts on average; one token reads {active / 1e9:.1f}B parameters",
        ),
    ]


def _speedup(claim: str, acceptance: float, cost: float, quoted: float) -> Entry:
    best = serving_formulas.best_draft(acceptance, cost)
    formula = f"(1 - a^(g+1)) / ((1 - a)(g c + 1)) with c = {cost:.3f}, the ratio of the parameters"
    value = f"at most {best.speedup:.2f} times, with drafts of {best.length}"
    if quoted <= best.speedup:
        return Entry(claim, f"possible: {value}", formula)
    # The speed falls as drafting costs more: bisect for the cost at which it is the quoted one.
    low, high = 0.0, cost
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if serving_formulas.best_draft(acceptance, middle).speedup >= quoted else (low, middle)
        )
    needed = f"; it needs c < {low:.3f}" if low > 0 else ""
    return Entry(claim, f"impossible: {value}", f"{formula}{needed}")


SECTIONS: dict[str, Callable[[], list[Entry]]] = {
    "Caches": _caches,
    "Sizes": _sizes,
    "Time and throughput": _times,
    "Training": _training,
    "Encoder-decoders": _pairs,
    "Speculative decoding": _speculation,
}
