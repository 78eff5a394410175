"""Prompts have the form of the training inputs."""

import dataclasses

import numpy as np
import pytest

from t5x_like.config import CausalLM, DataConfig, MaskedLM, PrefixLM, SeqioConfig, SpanCorruption, ul2
from t5x_like.data.objectives.prefix_lm import split_at
from t5x_like.data.stream.feature_converters import convert
from t5x_like.data.tokenizers.vocabulary import Vocabulary
from t5x_like.decoding.prompt_format import objective_format, prompt_format
from t5x_like.errors import ConfigError

VOCABULARY = Vocabulary(base_size=40, num_sentinels=5)
TEXT = [11, 12, 13, 14]


def data(layout, *mixture):
    return DataConfig(layout=layout, mixture=mixture, inputs_length=16, targets_length=16)


def trained_row(layout, objective):
    """Return the features of the row whose inputs are TEXT."""
    tokens = np.array([[*TEXT, 21, 22, 23]], np.int32)
    examples = split_at(tokens, np.array([len(TEXT)]), objective, VOCABULARY)
    return {name: values[0] for name, values in convert(examples, layout, 16, 16).items()}


@pytest.mark.parametrize("objective", [PrefixLM(name="S", mode="S"), PrefixLM(name="plain")])
def test_encoder_prompts_equal_the_training_inputs(objective):
    row = trained_row("encoder_decoder", objective)
    prompt = prompt_format(data("encoder_decoder", objective), None).ids(TEXT, VOCABULARY)
    assert row["encoder_input_tokens"][: len(prompt) + 1].tolist() == [*prompt, 0]


@pytest.mark.parametrize("layout", ["prefix_lm", "causal_lm"])
def test_decoder_prompts_equal_the_start_of_a_training_row(layout):
    """BOS and the prompt equal the decoder inputs up to the position that predicts the first target, with the same
    attention mask (bidirectional or causal)."""
    objective = PrefixLM(name="S", mode="S")
    row = trained_row(layout, objective)
    form = prompt_format(data(layout, objective), "S")
    stream = [0, *form.ids(TEXT, VOCABULARY)]
    first_scored = row["decoder_loss_weights"].argmax()
    assert row["decoder_input_tokens"][: first_scored + 1].tolist() == stream
    seen = row.get("decoder_causal_attention", np.zeros(32))
    assert np.flatnonzero(seen).tolist() == (list(range(len(stream))) if form.bidirectional else [])


def test_a_causal_prompt_is_plain_text():
    form = prompt_format(data("causal_lm", CausalLM()), None)
    assert form.ids(TEXT, VOCABULARY) == TEXT and not form.bidirectional


def test_the_default_mode_is_s():
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
        (data("encoder", MaskedLM()), None, "objectives that predict tokens in place fill masked positions"),
        (data("prefix_lm", MaskedLM()), None, "expected an objective that predicts the next token"),
        (
            dataclasses.replace(data("encoder_decoder"), seqio=SeqioConfig(mixture_or_task="mine")),
            None,
            "'mine', read live",
        ),
        (data("encoder_decoder", PrefixLM(name="lm")), "S", "mode: found S, expected none"),
        (data("encoder_decoder", *ul2()[:2]), "X", "mode: found X, expected one of R"),
    ],
)
def test_formats_that_were_not_trained_are_refused(config, mode, message):
    with pytest.raises(ConfigError, match=message):
        prompt_format(config, mode)


def test_only_tokens_of_the_targets_are_allowed():
    config = data("encoder_decoder", *ul2())
    table = 64  # rounded up for the hardware
    spans = np.flatnonzero(prompt_format(config, "R").allowed(VOCABULARY, table))
    assert spans.tolist() == list(range(1, 45))
    text = np.flatnonzero(prompt_format(config, "S").allowed(VOCABULARY, table))
    assert text.tolist() == list(range(1, 40))
