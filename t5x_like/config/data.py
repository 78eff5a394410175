"""The data of a run: corpora, a tokenizer, objectives, and the shape of the rows."""

from __future__ import annotations

from typing import Literal

from t5x_like.config.base import configuration
from t5x_like.config.corpora import CorpusConfig, TokenizerConfig
from t5x_like.config.objectives import Labelled, Layout, Objective
from t5x_like.config.seqio import SeqioConfig


@configuration
class CorpusShare:
    """A corpus of a mixture."""

    name: str
    corpus: CorpusConfig
    rate: float = 1.0
    """Share of the rows, relative to the other corpora; a factor where `SamplingConfig` goes by size."""
    mixture: tuple[Objective, ...] = ()
    """Objectives of this corpus; none: those of the run."""
    examples: Literal["windows", "documents"] | None = None
    """How it is cut into examples; None: as the run's `data.examples`."""


@configuration
class SamplingConfig:
    """The law by which corpora share the rows."""

    law: Literal["rates", "proportional", "unimax"] = "rates"
    """rates: as `CorpusShare.rate` says. proportional: by tokens, T5's law with `maximum_tokens` and `temperature`.
    unimax: as evenly as `max_epochs` allows (Chung et al. 2023)."""
    temperature: float = 1.0
    """proportional: shares are raised to 1 / temperature. mT5's alpha of 0.3 is a temperature of 1 / 0.3."""
    maximum_tokens: int | None = None
    """proportional: a corpus counts for no more tokens than this."""
    max_epochs: float = 1.0
    """unimax: passes over a corpus at most."""
    budget_tokens: int | None = None
    """unimax: raw tokens of the whole run."""


@configuration
class RatePhase:
    """From a step on, other rates: (name, rate) pairs. What is not named keeps its rate."""

    start_step: int
    objectives: tuple[tuple[str, float], ...] = ()
    corpora: tuple[tuple[str, float], ...] = ()


@configuration
class DataConfig:
    """The data of a run: rows are a function of this configuration and a row's index, and of nothing else."""

    corpus: CorpusConfig = CorpusConfig()
    corpora: tuple[CorpusShare, ...] = ()
    """A mixture of corpora, in place of `corpus`."""
    sampling: SamplingConfig = SamplingConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    seqio: SeqioConfig | None = None
    """A registered seqio Task or Mixture read live, in place of corpora, tokenizer and mixture (which is then ())."""
    layout: Layout
    """How inputs and targets become model features: seqio's EncDec, PrefixLM, LM and Encoder feature converters."""
    mixture: tuple[Objective, ...]
    """The objectives and their rates. A window of text is seen once per epoch, under one of them."""
    rates_by: Literal["example", "token", "loss_token"] = "example"
    """What the objectives' rates are shares of: examples, raw tokens, or tokens of the loss."""
    schedule: tuple[RatePhase, ...] = ()
    """Changes of the rates, by step."""
    examples: Literal["windows", "documents"] = "windows"
    """windows: documents are one text, which is cut into windows that fill their rows. documents: each document (or
    supervised pair) is an example, cut only where it is longer than a row; several are packed into one."""
    inputs_length: int
    """Cells for inputs: the encoder's row, or the prefix's share of a single stream."""
    targets_length: int
    """Cells for targets; 0 for encoders. Single-stream rows have inputs_length + targets_length cells."""
    short_targets_lengths: tuple[int, ...] = ()
    """Encoder-decoders: further sub-batches of the same step, with fewer cells for targets. An objective's rows are in
    the smallest that its longest targets fit."""
    seed: int = 0
    store: str = "runs/stores"
    """Folder of the prepared token stores; each store is named by the digest of its corpus and tokenizer."""
    prefetch: int = 2
    """Batches made ahead of the step by one thread."""

    @property
    def row_length(self) -> int:
        """Cells of a single-stream row."""
        return self.inputs_length + self.targets_length

    @property
    def sources(self) -> tuple[CorpusShare, ...]:
        """The corpora: those of the mixture, or the one; none where seqio is read live."""
        if self.seqio is not None:
            return ()
        return self.corpora or (CorpusShare(name=self.corpus.name, corpus=self.corpus),)

    def examples_of(self, share: CorpusShare) -> Literal["windows", "documents", "labelled"]:
        """How a corpus is cut into examples; labelled: a pair is a row."""
        if any(isinstance(objective, Labelled) for objective in self.objectives_of(share)):
            return "labelled"
        return share.examples or self.examples

    @property
    def labelled(self) -> Labelled | None:
        """The objective of a run that trains a head, which is then its only one."""
        return next((objective for objective in self.objectives if isinstance(objective, Labelled)), None)

    def objectives_of(self, share: CorpusShare) -> tuple[Objective, ...]:
        """The objectives of a corpus."""
        return share.mixture or self.mixture

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """All objectives of the run, each name once: what `denoiser_ids` are indices into."""
        found = {objective.name: objective for objective in self.mixture}
        for share in self.corpora:
            for objective in share.mixture:
                found.setdefault(objective.name, objective)
        return tuple(found.values())
