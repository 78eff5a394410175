"""Objectives: what a window of raw tokens is turned into. `config.lengths` has the arithmetic of their lengths."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from t5x_like.config.base import configuration
from t5x_like.config.model import HeadKind

Mode = Literal["R", "S", "X"]
Layout = Literal["encoder_decoder", "prefix_lm", "causal_lm", "encoder"]
MODES: tuple[Mode, ...] = ("R", "S", "X")


@configuration
class SpanCorruption:
    """Spans of the window are replaced by sentinels in the inputs and spelled out in the targets (T5, UL2's R and X).

    With noise density r, mean span length m and a window of n tokens, round(n r) tokens are masked in
    max(1, round(n r / m)) spans; the masked and the clean tokens are split into spans uniformly over all compositions.
    """

    kind: Literal["span_corruption"] = "span_corruption"
    name: str
    rate: float = 1.0
    """Share of the examples, relative to the other objectives of the mixture."""
    mean_noise_span_length: float = 3.0
    noise_density: float = 0.15
    mode: Mode | None = None
    """Mode token in front of the inputs; None for none."""
    t5_exact: bool = False
    """T5's own placement: the window starts clean and ends in noise. The default rotates the mask by a uniform offset,
    so that each position is masked with the same probability; a span cut by the window's end then counts as two."""


@configuration
class PrefixLM:
    """The window is cut once: the first part is the inputs, the rest the targets (UL2's S).

    The law of the cut: the target fraction is uniform in [min_target_fraction, max_target_fraction]; at least one
    token stays on each side.
    """

    kind: Literal["prefix_lm"] = "prefix_lm"
    name: str
    rate: float = 1.0
    min_target_fraction: float = 0.0
    max_target_fraction: float = 0.5
    """UL2's table has a mean of 0.25, the listing in its appendix is uniform in [0, 1], T5Gemma 2 uses 0.75."""
    mode: Mode | None = None
    paired: bool = False
    """Two windows share a row and are cut at complementary places: where one has t target tokens, the other has
    fewest + most - t of the law's range. So a row's inputs and targets take the same cells whatever the cut, and each
    window's cut keeps its law (the packing of Wang et al. 2022)."""


@configuration
class CausalLM:
    """Every token of the window is predicted from those before it. No inputs."""

    kind: Literal["causal_lm"] = "causal_lm"
    name: str = "causal_lm"
    rate: float = 1.0
    mode: None = None


@configuration
class MaskedLM:
    """BERT's masking: a chosen token becomes the mask token, a random token, or stays, and is predicted.

    With mask rate r and a window of n tokens, max(1, round(n r)) tokens are chosen, uniformly over all sets of them.
    The masking is a function of the row, so that each epoch masks anew, and rows are full (RoBERTa). An encoder
    predicts each chosen token where it stands; a decoder with a bidirectional prefix predicts it one place before, as
    the next token (GPT-BERT), so that one head serves this and causal LM.
    """

    kind: Literal["masked_lm"] = "masked_lm"
    name: str = "masked_lm"
    rate: float = 1.0
    mask_rate: float = 0.15
    replace_with_mask: float = 0.8
    replace_with_random: float = 0.1
    unit: Literal["token", "word", "span"] = "token"
    """token: tokens by themselves. word: all tokens of a word or none; words are taken in random order, and one that
    would exceed the count is left out (BERT's whole-word masking): a few tokens less can be chosen, and short words,
    those cut by the window's ends among them, are chosen more often than long ones. span: the text is cut into runs of
    words of geometric lengths, which are taken in random order, the last only in part (SpanBERT); a run as a whole is
    masked, replaced or kept."""
    span_end_probability: float = 0.2
    """span: of the geometric law of a run's length in words."""
    max_span_words: int = 10
    """span: the geometric law is conditioned on no more than this. Both defaults: a mean of 3.8 words."""
    mode: None = None


@configuration
class FillInTheMiddle:
    """The window is cut into prefix, middle and suffix, and the middle moves to the end (Bavarian et al. 2022).

    With probability `fim_rate` a window is rearranged, otherwise it is left as it is. The two cuts are independent and
    uniform over the n + 1 places between and beside the tokens, so that any part can be empty. There are no inputs: all
    tokens are predicted, those of prefix and suffix and the three markers included.

      PSM: <PRE> prefix <SUF> suffix <MID> middle EOS
      SPM: <PRE> <SUF> suffix <MID> prefix middle EOS (the paper's second variant, a PSM whose prefix is empty)

    The markers <PRE>, <SUF>, <MID> are the last three sentinels of the vocabulary, so that they are other ids than the
    sentinels of spans in the same mixture, which must leave them free (`Vocabulary.infilling_ids`).
    """

    kind: Literal["fill_in_the_middle"] = "fill_in_the_middle"
    name: str = "fim"
    rate: float = 1.0
    fim_rate: float = 0.5
    spm_rate: float = 0.5
    """Of the rearranged windows, the share in SPM."""
    mode: None = None


@configuration
class CausalMasking:
    """Some spans of the window move to its end, each announced by its sentinel (CM3, InCoder).

      text <0> text <1> text <0> first span <1> second span EOS

    The number of spans is Poisson with mean `mean_spans`, conditioned on 1 to `max_spans` (and on no more than fit).
    For k spans, their 2k ends are a uniform subset of the n + 1 places between and beside the tokens: no span is empty,
    none touches another. There are no inputs. All tokens are predicted but the sentinels in the text, whose places are
    random; those at the end are predicted, since each ends what stands before it.
    """

    kind: Literal["causal_masking"] = "causal_masking"
    name: str = "cm3"
    rate: float = 1.0
    mean_spans: float = 1.0
    max_spans: int = 8
    """A window is sized for this number. CM3 clips at 16 and InCoder at 256; with a mean of 1, more than 8 would be
    drawn in one window of half a million."""
    mode: None = None


@configuration
class Bart:
    """BART's noise: the targets are the raw window, the inputs what the chosen noises leave of it (Lewis et al. 2020).

    In this order, for a window of n tokens:
      permute_sentences: the sentences (stretches that end in `TokenTraits.sentence_ends`) in uniformly random order.
      rotate_document: the window begins at a uniformly random token; what was before it follows the end.
      infill_rate: round(n r) tokens (at least 1, at most n - 1) in spans, each of which becomes one mask token. Lengths
        are Poisson(`mean_span_length`), drawn until the tokens are used up, the last one cut; a span of length 0
        inserts a mask token. Spans have clean tokens between them and are placed uniformly around a circle, so that
        each token is masked with the same probability; one that is cut by the window's end counts as two.
      delete_rate, mask_rate: of the tokens that no span covers, about n times the rate are deleted and as many masked
        one by one, uniformly.
    The default is what BART ended with: infilling of 30 % and all sentences permuted.
    """

    kind: Literal["bart"] = "bart"
    name: str = "bart"
    rate: float = 1.0
    infill_rate: float = 0.3
    mean_span_length: float = 3.0
    delete_rate: float = 0.0
    mask_rate: float = 0.0
    permute_sentences: bool = True
    rotate_document: bool = False
    mode: Mode | None = None


@configuration
class BlankInfilling:
    """GLM's blank infilling: spans are blanked out and written in random order (Du et al. 2022).

    The inputs are the text with a sentinel in place of each span (Part A); the targets are the spans (Part B), each
    begun by its sentinel and ended by EOS.

    With rate r and a window of n tokens, round(n r) tokens (at least 1, at most n / 2) are masked. Span lengths are
    Poisson(`mean_span_length`) conditioned on 1 or more, drawn until the tokens are used up, the last one cut. Spans
    have clean tokens between them and are placed uniformly around a circle, so that each token is masked with the same
    probability; one that is cut by the window's end counts as two. The order of Part B is a uniform permutation. The
    tokens of the spans and their EOS are predicted; the sentinels, whose order is random, are given.
    """

    kind: Literal["blank_infilling"] = "blank_infilling"
    name: str = "glm"
    rate: float = 1.0
    mask_rate: float = 0.15
    mean_span_length: float = 3.0
    """Of the Poisson law before the condition: 3 makes spans of 3.16 tokens in the mean."""
    mode: Mode | None = None


@configuration
class Supervised:
    """A supervised pair as it is: the inputs are given, the targets are predicted."""

    kind: Literal["supervised"] = "supervised"
    name: str = "supervised"
    rate: float = 1.0
    mode: Mode | None = None


@configuration
class Labelled:
    """A text and what a head is to say of it (`ModelConfig.task_head`, of the same kind).

    The examples are pairs, one to a row: the inputs are the text, cut where it is longer than a row and ended by EOS;
    the targets are a label, labels of the words, a number, or of `embedding` the text that belongs to it.
    """

    kind: HeadKind
    name: str = "head"
    rate: float = 1.0
    mode: Mode | None = None
    """Token in front of the text: what pooling `cls` reads, with a vocabulary that has no token for that."""


Objective = Annotated[
    SpanCorruption
    | PrefixLM
    | CausalLM
    | MaskedLM
    | FillInTheMiddle
    | CausalMasking
    | Bart
    | BlankInfilling
    | Supervised
    | Labelled,
    pydantic.Field(discriminator="kind"),
]

WITHOUT_INPUTS = (CausalLM, FillInTheMiddle, CausalMasking)
"""Objectives that predict a whole stream: there is nothing for an encoder."""
