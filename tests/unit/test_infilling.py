"""Gaps: what the model is asked is what it was trained on, and the true answers restore the text."""

import numpy as np
import pytest

from t5x_like.config import (
    Bart,
    BlankInfilling,
    CausalLM,
    CausalMasking,
    DataConfig,
    DataError,
    FillInTheMiddle,
    PrefixLM,
    SpanCorruption,
    ul2,
)
from t5x_like.data import keys as rng
from t5x_like.data.denoise import denoise
from t5x_like.data.tokenizers import ByteTokenizer
from t5x_like.decoding.infilling import filled, gapped, queries, span_texts, spans
from t5x_like.decoding.prompts import gaps_format

TOKENIZER = ByteTokenizer(16)
FIRST = TOKENIZER.vocabulary.first_sentinel_id
EOS = 1
"""FIRST - k is the sentinel of gap k, as everywhere."""


def data(layout, *objectives):
    return DataConfig(layout=layout, mixture=objectives, inputs_length=64, targets_length=64)


def text_with_gaps(ids):
    """What a person would write for inputs with sentinels."""
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
def test_a_query_is_the_training_example_up_to_what_is_predicted(layout, objective):
    """For examples of the denoiser itself: their text with gaps asks for exactly their inputs, and their targets fill
    the gaps so that the raw text is there again."""
    form = gaps_format(data(layout, objective), objective.mode)
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
            again = next(place for place, token in enumerate(wanted) if token == FIRST and wanted[:place].count(FIRST))
            source = text_with_gaps(wanted[:again])
            stream, answers = wanted[: again + 1], [wanted[again + 1 : -1]]
        else:
            source = text_with_gaps(token for token in given if token != EOS and token <= FIRST)
            stream, answers = given, [wanted[:-1]]
        text = gapped(source)
        asked = queries(text, form, TOKENIZER)
        if isinstance(objective, BlankInfilling):
            ends = [-1, *(place for place, token in enumerate(wanted) if token == EOS)]
            answers = [wanted[a + 1 : b] for a, b in zip(ends, ends[1:], strict=False)]
            answers.sort(key=lambda answer: -answer[0])
            assert [query.forced for query in asked] == [(answer[0],) for answer in answers]
        assert {query.ids for query in asked} == {tuple(stream)}
        texts = span_texts(spans(answers, text, form, TOKENIZER), TOKENIZER)
        assert filled(text, texts, TOKENIZER) == raw
        many += len(text.numbers) > 1
    assert many or isinstance(objective, FillInTheMiddle)


def test_masks_are_numbered_and_what_the_model_leaves_out_stays_empty():
    form = gaps_format(data("encoder_decoder", *ul2()), None)
    assert form.mode == "R"
    text = gapped("a<mask>b<mask>")
    (query,) = queries(text, form, TOKENIZER)
    assert query.ids == (TOKENIZER.mode_id("R"), 100, FIRST, 101, FIRST - 1, EOS)
    answer = [FIRST - 1, 110, FIRST - 5, 111, FIRST - 1, 112]
    assert spans([answer], text, form, TOKENIZER) == [[], [110]]
    assert filled(text, ["", "k"], TOKENIZER) == "abk"


def test_bart_reads_one_kind_of_mask():
    form = gaps_format(data("encoder_decoder", Bart()), None)
    (query,) = queries(gapped("a<mask>b<mask>"), form, TOKENIZER)
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
def test_gaps_that_cannot_be_filled_are_refused(objective, text, message):
    form = gaps_format(data("causal_lm", objective), None)
    with pytest.raises(DataError, match=message):
        queries(gapped(text), form, TOKENIZER)


def test_who_fills_gaps():
    assert gapped("no gap, but <maskk> and <extra_id_x>") is None
    assert gaps_format(data("causal_lm", CausalLM()), None) is None
    assert gaps_format(data("encoder_decoder", *ul2()), "S") is None
    assert gaps_format(data("encoder_decoder", *ul2()), "X").mode == "X"
    assert gaps_format(data("prefix_lm", PrefixLM(name="lm"), SpanCorruption(name="t5")), None).gaps == "spans"
