"""Data of a run: corpora, tokenizer, objectives, and the shape of the rows."""

from __future__ import annotations

from typing import Literal

from t5x_like.config.bounds import NonEmptyStr, NonNegativeFloat, PositiveFloat, PositiveInt, Seed
from t5x_like.config.corpus import CorpusConfig
from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.layouts import Layout, StackName, has_bidirectional_prefix, row_positions
from t5x_like.config.objectives import LabeledExamples, Objective, Preference
from t5x_like.config.seqio_task import SeqioConfig
from t5x_like.config.tokenizer import TokenizerConfig


@config_dataclass
class CorpusShareConfig:
    """One corpus of a mixture of corpora."""

    name: str
    """Name of the corpus in metrics, reports and `data.rate_schedule`."""
    corpus: CorpusConfig
    """Source of the texts."""
    rate: NonNegativeFloat = 1.0
    """Share of the rows, relative to the other corpora; a factor on the share that `CorpusMixingConfig` computes from
    the size of the corpus."""
    mixture: tuple[Objective, ...] = ()
    """Objectives of this corpus; empty: the objectives of the run."""
    example_mode: Literal["windows", "documents"] | None = None
    """Unit of the examples of this corpus; None: `data.example_mode`."""


@config_dataclass
class CorpusMixingConfig:
    """Rule that decides the share of each corpus in the rows."""

    strategy: Literal["rates", "proportional", "unimax"] = "rates"
    """rates: the shares are `CorpusShareConfig.rate`. proportional: shares in proportion to the tokens of the corpora,
    by T5's formula with `maximum_tokens` and `temperature`. unimax: as uniform as `max_epochs` allows (Chung et al.
    2023)."""
    temperature: PositiveFloat = 1.0
    """proportional: shares are raised to the power 1 / temperature. mT5's alpha of 0.3 is a temperature of 1 / 0.3."""
    maximum_tokens: PositiveInt | None = None
    """proportional: upper bound on the number of tokens that a corpus counts for."""
    max_epochs: PositiveFloat = 1.0
    """unimax: maximum number of passes over a corpus."""
    budget_tokens: PositiveInt | None = None
    """unimax: raw tokens of the whole run."""


@config_dataclass
class RatePhaseConfig:
    """Change of rates at a step, as (name, rate) pairs. Objectives and corpora that are not named keep their rate."""

    start_step: int
    """Step from which on the rates apply."""
    objectives: tuple[tuple[str, NonNegativeFloat], ...] = ()
    """Rates of objectives, by their names in the mixture."""
    corpora: tuple[tuple[str, NonNegativeFloat], ...] = ()
    """Rates of corpora, by `CorpusShareConfig.name`."""
    temperature: PositiveFloat | None = None
    """Temperature of `data.corpus_mixing` from this step on, for the strategy proportional. None: it stays."""


@config_dataclass
class DataConfig:
    """Data of a run. The content of a row is a function of this configuration and of the row's index only."""

    corpus: CorpusConfig = CorpusConfig()
    """Source of the texts, where there is only one."""
    corpora: tuple[CorpusShareConfig, ...] = ()
    """A mixture of corpora, in place of `corpus`."""
    corpus_mixing: CorpusMixingConfig = CorpusMixingConfig()
    """Rule for the shares of the corpora in `corpora`."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Vocabulary of all corpora: a file, a published tokenizer, or one that `prepare` trains."""
    seqio: SeqioConfig | None = None
    """A registered seqio Task or Mixture that is read live, in place of corpora, tokenizer and mixture (which must be
    empty)."""
    layout: Layout
    """Conversion of inputs and targets to model features, as in seqio's EncDec, PrefixLM, LM and Encoder converters."""
    mixture: tuple[Objective, ...]
    """Objectives with their rates. A window of text is used once per epoch, by one of them."""
    rate_unit: Literal["example", "token", "loss_token"] = "example"
    """Unit of the objectives' rates: shares of the examples, of the raw tokens, or of the tokens of the loss."""
    rate_schedule: tuple[RatePhaseConfig, ...] = ()
    """Changes of the rates, by step."""
    example_mode: Literal["windows", "documents"] = "windows"
    """windows: documents are concatenated and cut into windows that fill their rows. documents: each document (or
    supervised pair) is an example, cut only if it is longer than a row; several are packed into one row."""
    mask_document_borders: bool = False
    """windows: tokens attend to tokens of their own document only, and positions restart in each document, as if each
    part of a document were an example of a packed row. For causal LM and masked LM in an encoder."""
    inputs_length: int
    """Token positions for inputs: the length of encoder rows, or the prefix's part of decoder-only rows."""
    targets_length: int
    """Token positions for targets; 0 for encoders. Decoder-only rows have inputs_length + targets_length positions."""
    targets_length_buckets: tuple[int, ...] = ()
    """Encoder-decoders: target lengths of further sub-batches of the same step. Rows of an objective are in the
    sub-batch with the smallest length that its longest targets fit."""
    seed: Seed = 0
    """Seed of the order of the windows and of the noise of the objectives. Held-out data do not depend on it."""
    store_dir: NonEmptyStr = "runs/stores"
    """Folder of the prepared token stores; each store is named by the digest of its corpus and tokenizer."""
    prefetch_batches: PositiveInt = 2
    """Number of batches that background threads prepare ahead of the training step, besides those in progress."""
    prefetch_threads: PositiveInt | None = None
    """Number of these threads; None: 4 if rows are read from an object store, otherwise 1. The rows do not depend on
    it."""
    store_request_concurrency: PositiveInt = 256
    """Maximum number of simultaneous requests of a process to the object store of a token store, for each corpus."""
    store_cache_bytes: PositiveInt = 2**29
    """Maximum memory for parts of a split, of each corpus, that is too large to be held in memory as a whole. For
    random windows of an object store it should hold the indices of the split's files: 1 MB for 10^9 tokens, and as much
    again for chunks."""

    @property
    def row_length(self) -> int:
        """Token positions of a decoder-only row."""
        return self.inputs_length + self.targets_length

    @property
    def has_bidirectional_decoder(self) -> bool:
        """True if a decoder attends to a part of a row in both directions: `decoder_causal_attention` is a feature."""
        return has_bidirectional_prefix(self.layout) or any(one.reads_masked_targets for one in self.objectives)

    @property
    def row_positions(self) -> dict[StackName, int]:
        """Token positions of a row by stack; see `layouts.row_positions`."""
        return row_positions(self.layout, self.inputs_length, self.targets_length)

    @property
    def target_stack(self) -> StackName:
        """The stack whose outputs the loss or the task head reads."""
        return next(reversed(self.row_positions))

    @property
    def sources(self) -> tuple[CorpusShareConfig, ...]:
        """All corpora: the mixture of corpora, or the single corpus; empty if seqio is read live."""
        if self.seqio is not None:
            return ()
        return self.corpora or (CorpusShareConfig(name=self.corpus.name, corpus=self.corpus),)

    def examples_of(self, share: CorpusShareConfig) -> Literal["windows", "documents", "labelled", "preferences"]:
        """Return how a corpus is cut into examples; labelled: each pair is a row; preferences: each pair is a row or,
        with `pairs_per_row` of the objective, a segment of one."""
        for objective in self.objectives_of(share):
            if objective.example_source in ("labelled", "preferences"):
                return objective.example_source
        return share.example_mode or self.example_mode

    @property
    def labelled(self) -> LabeledExamples | None:
        """Objective of a run that trains a task head, which has no other objective; otherwise None.

        `register_objective` accepts the example source "labelled" for subclasses of `LabeledExamples` only.
        """
        return next((objective for objective in self.objectives if isinstance(objective, LabeledExamples)), None)

    @property
    def preference(self) -> Preference | None:
        """Objective of a run that is trained on preference pairs, which has no other objective; otherwise None."""
        return next((objective for objective in self.objectives if isinstance(objective, Preference)), None)

    def objectives_of(self, share: CorpusShareConfig) -> tuple[Objective, ...]:
        """Return the objectives of a corpus."""
        return share.mixture or self.mixture

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """All objectives of the run, each name once. `denoiser_ids` in a batch are indices into this tuple."""
        found = {objective.name: objective for objective in self.mixture}
        for share in self.corpora:
            for objective in share.mixture:
                found.setdefault(objective.name, objective)
        return tuple(found.values())
