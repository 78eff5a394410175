"""The examples of the objectives outside UL2 on a window of numbers, which must not change unnoticed.

A change here changes the data of every run that is to be resumed: raise `stream.VERSION` with it.
"""

from __future__ import annotations

import numpy as np
import pytest

from t5x_like.config import (
    BartDenoising,
    BlankInfilling,
    CausalMasking,
    FillInTheMiddle,
    MaskedLM,
    Objective,
    PrefixLM,
)
from t5x_like.data.objectives.registry import denoise
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import NUM_SPECIAL, TokenTraits, Vocabulary

VOCABULARY = Vocabulary(base_size=100, num_sentinels=20)
TRAITS = TokenTraits(word_starts=np.arange(100) % 3 == 0, sentence_ends=np.arange(100) % 8 == 7)
LENGTH = 24


def spell(ids: np.ndarray, scored: np.ndarray | None = None) -> str:
    """Return tokens as numbers from 0, sentinels as s0, s1, ..., EOS as $, and unscored tokens in brackets."""
    size = int(np.flatnonzero(ids)[-1]) + 1 if ids.any() else 0
    parts: list[str] = []
    for position, token in enumerate(ids[:size].tolist()):
        name = VOCABULARY.special_name(token)
        text = str(token - NUM_SPECIAL) if name is None else {"</s>": "$"}.get(name, name.strip("<>[]"))
        text = text.replace("extra_id_", "s")
        parts.append(text if scored is None or scored[position] else f"({text})")
    return " ".join(parts)


OBJECTIVES: dict[str, Objective] = {
    "fim": FillInTheMiddle(),
    "cm3": CausalMasking(mean_spans=2.0),
    "bart": BartDenoising(mode="X"),
    "bart_all": BartDenoising(infill_rate=0.2, delete_rate=0.1, mask_rate=0.1, rotate_document=True),
    "glm": BlankInfilling(mask_rate=0.3),
    "words": MaskedLM(mask_rate=0.3, masking_unit="word"),
    "spans": MaskedLM(mask_rate=0.3, masking_unit="span"),
    "tokens": MaskedLM(mask_rate=0.3),
    "pair": PrefixLM(name="pair", complementary_pairs=True),
}
GOLDEN: dict[str, list[tuple[str, str]]] = {
    "fim": [
        (
            "",
            "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 $",
        ),
        (
            "",
            "s17 0 1 2 s18 22 23 s19 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 $",
        ),
    ],
    "cm3": [
        (
            "",
            "0 1 2 (s0) 7 8 9 10 11 12 13 14 15 (s1) 19 20 21 22 23 s0 3 4 5 6 s1 16 17 18 $",
        ),
        (
            "",
            "0 1 (s0) 9 10 11 12 13 14 15 (s1) 17 18 19 20 21 22 23 s0 2 3 4 5 6 7 8 s1 16 $",
        ),
    ],
    "bart": [
        (
            "X 5 6 7 8 9 10 11 12 13 14 s0 18 s0 23 0 1 2 3 4 $",
            "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 $",
        ),
        (
            "X 5 6 7 8 s0 12 21 22 23 13 s0 15 16 17 18 19 20 s0 3 4 $",
            "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 $",
        ),
    ],
    "bart_all": [
        (
            "10 s0 12 13 14 15 16 17 18 s0 s0 23 s0 2 5 6 7 8 9 $",
            "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 $",
        ),
        (
            "0 s0 s0 5 6 7 8 9 s0 11 12 21 22 23 13 s0 s0 16 17 18 $",
            "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 $",
        ),
    ],
    "glm": [
        (
            "0 1 2 3 4 5 6 7 8 9 s0 13 s1 18 19 20 21 22 23 $",
            "(s1) 14 15 16 17 $ (s0) 10 11 12 $",
        ),
        (
            "0 1 2 3 s0 7 8 9 10 11 s1 14 15 16 17 18 19 s2 22 23 $",
            "(s1) 12 13 $ (s2) 20 21 $ (s0) 4 5 6 $",
        ),
    ],
    "words": [
        (
            "0 1 2 87 4 s0 6 7 8 s0 13 85 12 13 14 15 16 17 18 19 20 21 22 23",
            "(0) (1) (2) 3 4 5 (6) (7) (8) 9 10 11 (12) (13) (14) (15) (16) (17) (18) (19) (20) (21) (22) (23)",
        ),
        (
            "0 1 2 s0 54 5 6 7 8 9 10 11 12 13 14 15 16 17 68 s0 s0 21 22 23",
            "(0) (1) (2) 3 4 5 (6) (7) (8) (9) (10) (11) (12) (13) (14) (15) (16) (17) 18 19 20 (21) (22) (23)",
        ),
    ],
    "spans": [
        (
            "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23",
            "(0) (1) (2) (3) (4) (5) (6) (7) (8) (9) (10) (11) 12 13 14 15 16 17 18 (19) (20) (21) (22) (23)",
        ),
        (
            "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 s0 s0 s0 s0",
            "(0) (1) (2) (3) (4) (5) (6) (7) (8) (9) (10) (11) 12 13 14 (15) (16) (17) (18) (19) 20 21 22 23",
        ),
    ],
    "tokens": [
        (
            "0 1 2 87 4 5 6 7 8 9 10 11 s0 13 s0 15 s0 17 s0 s0 s0 21 22 23",
            "(0) (1) (2) 3 (4) (5) (6) (7) (8) (9) (10) (11) 12 (13) 14 (15) 16 (17) 18 19 20 (21) (22) (23)",
        ),
        (
            "0 1 s0 3 4 5 6 7 s0 9 10 s0 12 13 14 15 16 17 18 s0 20 s0 22 23",
            "(0) 1 2 (3) (4) (5) 6 (7) 8 (9) (10) 11 (12) (13) (14) (15) (16) (17) (18) 19 (20) 21 (22) (23)",
        ),
    ],
    "pair": [
        (
            "0 1 2 3 4 5 6 $",
            "7 8 9 10 11 $",
        ),
        (
            "12 13 14 15 16 17 18 19 20 21 $",
            "22 23 $",
        ),
    ],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_examples(name: str) -> None:
    assert examples(name) == GOLDEN[name]


def examples(name: str) -> list[tuple[str, str]]:
    """Return inputs and targets of the first examples with fixed keys."""
    objective = OBJECTIVES[name]
    tokens = np.tile(np.arange(NUM_SPECIAL, NUM_SPECIAL + LENGTH), (2, 1))
    made = denoise(tokens, rng.fold_in(2022, np.arange(2)), objective, VOCABULARY, TRAITS)
    scored = [None, None] if made.scored_NxT is None else made.scored_NxT
    return [(spell(i), spell(t, s)) for i, t, s in zip(made.inputs_NxI, made.targets_NxT, scored, strict=False)]
