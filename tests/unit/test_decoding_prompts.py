"""Prompts are laid out as the model saw them in training."""

import dataclasses

import numpy as np
import pytest

from t5x_like.config import (
    CausalLM,
    ConfigError,
    DataConfig,
    MaskedLM,
    PrefixLM,
    SeqioConfig,
    SpanCorruption,
    ul2,
)
from t5x_like.data.denoise import split_at
from t5x_like.data.features import convert
from t5x_like.data.vocabulary import Vocabulary
from t5x_like.decoding.prompts import objective_format, prompt_format

VOCABULARY = Vocabulary(base_size=40, num_sentinels=5)
TEXT = [11, 12, 13, 14]


def data(layout, *mixture):
    return DataConfig(layout=layout, mixture=mixture, inputs_length=16, targets_length=16)


def trained_row(layout, objective):
    """Features of the row whose inputs are TEXT."""
    tokens = np.array([[*TEXT, 21, 22, 23]], np.int32)
    examples = split_at(tokens, np.array([len(TEXT)]), objective, VOCABULARY)
    return {name: values[0] for name, values in convert(examples, layout, 16, 16).items()}


@pytest.mark.parametrize("objective", [PrefixLM(name="S", mode="S"), PrefixLM(name="plain")])
def test_the_encoder_reads_what_it_read_in_training(objective):
    row = trained_row("encoder_decoder", objective)
    prompt = prompt_format(data("encoder_decoder", objective), None).ids(TEXT, VOCABULARY)
    assert row["encoder_input_tokens"][: len(prompt) + 1].tolist() == [*prompt, 0]


@pytest.mark.parametrize("layout", ["prefix_lm", "causal_lm"])
def test_a_single_stream_begins_as_in_training(layout):
    """BOS and the prompt are what the decoder read up to the position that predicts the first target, and these
    positions saw each other, or did not, as they do now."""
    objective = PrefixLM(name="S", mode="S")
    row = trained_row(layout, objective)
    form = prompt_format(data(layout, objective), "S")
    stream = [0, *form.ids(TEXT, VOCABULARY)]
    first_scored = row["decoder_loss_weights"].argmax()
    assert row["decoder_input_tokens"][: first_scored + 1].tolist() == stream
    seen = row.get("decoder_causal_attention", np.zeros(32))
    assert np.flatnonzero(seen).tolist() == (list(range(len(stream))) if form.bidirectional else [])


def test_a_causal_prompt_is_text_to_go_on_with():
    form = prompt_format(data("causal_lm", CausalLM()), None)
    assert form.ids(TEXT, VOCABULARY) == TEXT and not form.bidirectional


def test_the_mode_is_s_unless_another_is_asked_for():
    config = data("encoder_decoder", *ul2())
    assert prompt_format(config, None).mode == "S"
    assert prompt_format(config, "X") == objective_format(ul2()[2], config)
    assert prompt_format(data("encoder_decoder", *ul2()[2:6]), None).mode == "X"
    span = SpanCorruption(name="t5")
    assert prompt_format(data("encoder_decoder", span), None).sentinels
    assert not prompt_format(data("encoder_decoder", span, PrefixLM(name="lm")), None).sentinels


@pytest.mark.parametrize(
    ("config", "mode", "message"),
    [
        (data("encoder", MaskedLM()), None, "an encoder fills masks but generates no text"),
        (
            dataclasses.replace(data("encoder_decoder"), seqio=SeqioConfig(mixture_or_task="mine")),
            None,
            "'mine', read live",
        ),
        (data("encoder_decoder", PrefixLM(name="lm")), "S", "mode: found S, expected none"),
        (data("encoder_decoder", *ul2()[:2]), "X", "mode: found X, expected one of R"),
    ],
)
def test_what_was_not_trained_is_refused(config, mode, message):
    with pytest.raises(ConfigError, match=message):
        prompt_format(config, mode)


def test_only_tokens_of_the_targets_may_come_out():
    config = data("encoder_decoder", *ul2())
    table = 64  # rounded up for the hardware
    spans = np.flatnonzero(prompt_format(config, "R").allowed(VOCABULARY, table))
    assert spans.tolist() == list(range(1, 45))
    text = np.flatnonzero(prompt_format(config, "S").allowed(VOCABULARY, table))
    assert text.tolist() == list(range(1, 40))
