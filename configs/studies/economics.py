"""Bytes and time of decoding in six models, predicted and measured, beside what each of them predicts of a text."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_like.config import CausalLM, RunConfig
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.studies.byte_model import HALF_GIVEN, byte_run, with_merged_attention
from t5x_like.studies.inference_measures import measure_decoding, measure_speculation
from t5x_like.studies.study import Arm, Budget, Prediction, Study, Summary, Tier

ROWS = (1, 16)


def study(tier: Tier, folder: Path) -> Study:
    """Return the study: three decoders with fewer and fewer key heads, two encoder-decoders, and a draft."""
    decoder = byte_run(tier, "causal_lm", (CausalLM(),))
    both = byte_run(tier, "encoder_decoder", (HALF_GIVEN,))
    arms = {
        "mha": decoder,
        "gqa": _with_decoder(decoder, num_kv_heads=2),
        "mqa": _with_decoder(decoder, num_kv_heads=1),
        "encdec": both,
        "merged": dataclasses.replace(both, model=with_merged_attention(both.model)),
    }
    draft = Arm("draft", _draft(decoder))
    summaries = [
        Summary(f"{name}-{rows}", (name,), functools.partial(_decoding, name, rows)) for name in arms for rows in ROWS
    ]
    arithmetic = "a calculation"
    return Study(
        question="What do key heads, a second stack and a draft cost and save when a model answers?",
        description="Three decoders (4, 2 and 1 key heads), encoder-decoders with separate and with merged attention, "
        "and a draft of half the width and half the layers train for the same FLOPs. Each then reads prompts of 128 "
        "tokens, 1 or 16 at a time (-1, -16), and decodes: the bytes of the cache, the time of a step and its least "
        "time by the rates of the machine. The draft proposes tokens to mha.",
        arms=(*(Arm(name, run) for name, run in arms.items()), draft),
        seeds=(0, 1, 2),
        budget=Budget("executed_flops", 4e12 if tier == "cpu" else 1e17),
        summaries=(*summaries, Summary("speculation", ("mha", "draft"), _speculation)),
        predictions=(
            *(
                Prediction(
                    f"the cache of {one.name} has the bytes that arithmetic gives",
                    arithmetic,
                    one.name,
                    low=1.0,
                    high=1.0,
                    score="cache_over_predicted",
                )
                for one in summaries
            ),
            *(
                Prediction(
                    f"no step of {one.name} is faster than the machine allows",
                    arithmetic,
                    one.name,
                    low=1.0,
                    score="step_over_bound",
                )
                for one in summaries
            ),
            *(
                Prediction(
                    f"the cache of {name} is {share:g} of that of 4 key heads",
                    arithmetic,
                    f"{name}-1",
                    "mha-1",
                    share - 0.001,
                    share + 0.001,
                    score="cache_bytes",
                    is_ratio=True,
                )
                for name, share in (("gqa", 0.5), ("mqa", 0.25))
            ),
            *(
                Prediction(
                    f"a step of {name} takes less than 1.3 times that of the decoder",
                    "both read a stack and as many keys",
                    f"{name}-1",
                    "mha-1",
                    high=1.3,
                    score="step_milliseconds",
                    is_ratio=True,
                )
                for name in ("encdec", "merged")
            ),
            Prediction(
                "speculation yields the tokens of the formula",
                "Leviathan et al. 2023",
                "speculation",
                low=0.9,
                high=1.1,
                score="tokens_over_formula",
            ),
            Prediction("one key head costs little", "Shazeer 2019", "mqa", "mha", -0.02, 0.03),
        ),
        cannot_show=(
            "Times of models that do not fit the caches of a processor: here overheads outweigh both bounds.",
            "The gain of a draft in time, for the same reason: its tokens per pass are measured.",
            "Dialogues of several turns, whose tokens `t5x-like account --turns` counts.",
        ),
    )


def _with_decoder(run: RunConfig, **changes: Any) -> RunConfig:
    decoder = run.model.decoder
    assert decoder is not None
    changed = dataclasses.replace(decoder, **changes)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=changed))


def _draft(run: RunConfig) -> RunConfig:
    stack = run.model.decoder
    assert stack is not None
    return _with_decoder(
        run,
        num_layers=stack.num_layers // 2,
        d_model=stack.d_model // 2,
        head_dim=stack.head_dim // 2,
        d_ff=stack.d_ff // 2,
    )


def _decoding(arm: str, rows: int, results: Mapping[str, EvaluatedCheckpoint]) -> dict[str, float]:
    return measure_decoding(results[arm], rows)


def _speculation(results: Mapping[str, EvaluatedCheckpoint]) -> dict[str, float]:
    return measure_speculation(results["mha"], results["draft"])
