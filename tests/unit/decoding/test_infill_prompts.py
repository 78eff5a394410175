"""Infilling: queries equal the training inputs, and the true answers restore the text."""

import numpy as np
import pytest

from t5x_like.config import (
    BartDenoising,
    BlankInfilling,
    CausalLM,
    CausalMasking,
    DataConfig,
    FillInTheMiddle,
    PrefixLM,
    SpanCorruption,
    ul2,
)
from t5x_like.data.objectives.prompts import SentinelSpans
from t5x_like.data.objectives.registry import denoise
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.decoding.infill_prompts import filled, queries, span_texts, spans, split_at_gaps
from t5x_like.decoding.prompt_format import infill_format
from t5x_like.errors import DataError

TOKENIZER = ByteTokenizer(16)
FIRST = TOKENIZER.vocabulary.first_sentinel_id
EOS = 1
"""FIRST - k is the sentinel of gap k."""


def data(layout, *objectives):
    return DataConfig(layout=layout, mixture=objectives, inputs_length=64, targets_length=64)


def text_with_gaps(ids):
    """Return the text with gaps that a user would write for inputs with sentinels."""
    return "".join(f"<extra_id_{FIRST - token}>" if token > 258 else chr(token - 3) for token in ids)


def examples(objective, rows=20):
    text = np.random.default_rng(0).integers(100, 125, (rows, 40)).astype(np.int32)
    return text, denoise(
        text, rng.fold_in(np.uint64(0), np.arange(rows)), objective, TOKENIZER.vocabulary, TOKENIZER.traits
    )


@pytest.mark.parametrize(
    ("layout", "objective"),
    [
        ("encoder_decoder", SpanCorruption(name="R", mode="R")),
        ("prefix_lm", SpanCorruption(name="t5", noise_density=0.3)),
        ("causal_lm", FillInTheMiddle(fim_rate=1.0, spm_rate=0.0)),
        ("causal_lm", CausalMasking(mean_spans=2.0)),
        ("encoder_decoder", BlankInfilling(mode="X")),
        ("prefix_lm", BlankInfilling()),
    ],
)
def test_queries_equal_the_training_inputs_and_targets_fill_the_gaps(layout, objective):
    """For examples of the denoiser: the query for their text with gaps equals their inputs, and their targets, put into
    the gaps, give the raw text."""
    form = infill_format(data(layout, objective), objective.mode)
    windows, made = examples(objective)
    many = 0
    for row, window in enumerate(windows):
        raw = "".join(chr(token - 3) for token in window)
        given = made.inputs_NxI[row, : made.input_lengths_N[row]].tolist()
        wanted = made.targets_NxT[row, : made.target_lengths_N[row]].tolist()
        if isinstance(objective, FillInTheMiddle):
            _, suffix, middle = TOKENIZER.vocabulary.infilling_ids
            prefix, after = wanted.index(suffix), wanted.index(middle)
            source = text_with_gaps(wanted[1:prefix]) + "<mask>" + text_with_gaps(wanted[prefix + 1 : after])
            stream, answers = wanted[: after + 1], [wanted[after + 1 : -1]]
        elif isinstance(objective, CausalMasking):
            again = next(
                position for position, token in enumerate(wanted) if token == FIRST and wanted[:position].count(FIRST)
            )
            source = text_with_gaps(wanted[:again])
            stream, answers = wanted[: again + 1], [wanted[again + 1 : -1]]
        else:
            source = text_with_gaps(token for token in given if token != EOS and token <= FIRST)
            stream, answers = given, [wanted[:-1]]
        text = split_at_gaps(source)
        asked = queries(text, form, TOKENIZER)
        if isinstance(objective, BlankInfilling):
            ends = [-1, *(position for position, token in enumerate(wanted) if token == EOS)]
            answers = [wanted[a + 1 : b] for a, b in zip(ends, ends[1:], strict=False)]
            answers.sort(key=lambda answer: -answer[0])
            assert [query.forced for query in asked] == [(answer[0],) for answer in answers]
        assert {query.ids for query in asked} == {tuple(stream)}
        texts = span_texts(spans(answers, text, form, TOKENIZER), TOKENIZER)
        assert filled(text, texts, TOKENIZER) == raw
        many += len(text.numbers) > 1
    assert many or isinstance(objective, FillInTheMiddle)


def test_masks_are_numbered_and_unanswered_gaps_stay_empty():
    form = infill_format(data("encoder_decoder", *ul2()), None)
    assert form.mode == "R"
    text = split_at_gaps("a<mask>b<mask>")
    (query,) = queries(text, form, TOKENIZER)
    assert query.ids == (TOKENIZER.mode_id("R"), 100, FIRST, 101, FIRST - 1, EOS)
    answer = [FIRST - 1, 110, FIRST - 5, 111, FIRST - 1, 112]
    assert spans([answer], text, form, TOKENIZER) == [[], [110]]
    assert filled(text, ["", "k"], TOKENIZER) == "abk"


def test_bart_has_the_same_mask_token_in_every_gap():
    form = infill_format(data("encoder_decoder", BartDenoising()), None)
    (query,) = queries(split_at_gaps("a<mask>b<mask>"), form, TOKENIZER)
    assert query.ids == (100, FIRST, 101, FIRST, EOS)


@pytest.mark.parametrize(
    ("objective", "text", "message"),
    [
        (SpanCorruption(name="t5"), "<mask><extra_id_0>", "gaps of one kind"),
        (SpanCorruption(name="t5"), "<extra_id_1><extra_id_1>", "two gaps with the same"),
        (SpanCorruption(name="t5"), "<extra_id_16>", "expected a sentinel below 16"),
        (FillInTheMiddle(), "a<mask>b<mask>", "found 2 gaps, expected one"),
    ],
)
def test_unsupported_gaps_are_refused(objective, text, message):
    form = infill_format(data("causal_lm", objective), None)
    with pytest.raises(DataError, match=message):
        queries(split_at_gaps(text), form, TOKENIZER)


def test_objectives_and_modes_that_fill_gaps():
    assert split_at_gaps("no gap, but <maskk> and <extra_id_x>") is None
    assert infill_format(data("causal_lm", CausalLM()), None) is None
    assert infill_format(data("encoder_decoder", *ul2()), "S") is None
    assert infill_format(data("encoder_decoder", *ul2()), "X").mode == "X"
    assert (
        infill_format(data("prefix_lm", PrefixLM(name="lm"), SpanCorruption(name="t5")), None).infill == SentinelSpans()
    )
