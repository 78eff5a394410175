"""Rows unpacked to the examples that they were made from, for vocabularies with any ids of padding, EOS and text."""

from __future__ import annotations

import numpy as np
import pytest

from t5x_like.config import CausalLM, MaskedLM, Objective, PrefixLM, SpanCorruption
from t5x_like.config.objectives import Layout
from t5x_like.data.objectives.registry import denoise, restore
from t5x_like.data.stream import rng
from t5x_like.data.stream.feature_converters import RowIds, convert
from t5x_like.data.stream.unpack import examples, num_tokens
from t5x_like.data.tokenizers.vocabulary import Vocabulary

LAST = 99
PUBLISHED = {
    "no pad": Vocabulary(100, 64, pad_id=LAST, eos_id=LAST, unk_id=None, start_id=LAST, has_modes=False),
    "EOS is 0": Vocabulary(100, 64, pad_id=0, eos_id=0, unk_id=None, start_id=0, has_modes=False),
    "pad after EOS": Vocabulary(100, 64, pad_id=1, eos_id=0, unk_id=None, start_id=1, has_modes=False),
}
LENGTH = 24


@pytest.mark.parametrize("ids", PUBLISHED)
@pytest.mark.parametrize("ends_a_document", [False, True])
@pytest.mark.parametrize(
    ("layout", "objective"),
    [
        ("encoder", MaskedLM()),
        ("encoder_decoder", SpanCorruption(name="R")),
        ("encoder_decoder", PrefixLM(name="S")),
        ("prefix_lm", PrefixLM(name="S")),
        ("prefix_lm", MaskedLM()),
        ("causal_lm", CausalLM()),
        ("causal_lm", SpanCorruption(name="R")),
    ],
)
def test_examples_of_rows_restore_their_windows(
    layout: Layout, objective: Objective, ends_a_document: bool, ids: str
) -> None:
    vocabulary = PUBLISHED[ids]
    if ends_a_document and layout == "encoder_decoder" and vocabulary.pad_id == vocabulary.eos_id:
        pytest.skip("the inputs of an encoder do not say whether an end of text precedes their EOS")
    tokens = np.tile(np.arange(2, 2 + LENGTH), (8, 1))
    # Id 0 is text where neither padding nor EOS has it.
    tokens[:, -1] = vocabulary.eos_id if ends_a_document else 50 if vocabulary.eos_id == 0 else 0
    made = denoise(tokens, rng.fold_in(3, np.arange(8)), objective, vocabulary)
    lengths = (LENGTH, 0) if layout == "encoder" else (40, 40)
    rows = convert(made, layout, *lengths, RowIds.of(vocabulary))
    rows["denoiser_ids"] = np.zeros(8, np.int32)
    for index in range(8):
        row = {name: values[index] for name, values in rows.items()}
        (example,) = examples(row, [objective], vocabulary)
        assert np.array_equal(restore(example.inputs, example.targets, objective, vocabulary), tokens[index])
        if layout == "encoder_decoder":
            assert num_tokens(row, "encoder", vocabulary) == made.input_lengths_N[index]
