"""Where text comes from, and how it becomes tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from t5x_like.config.base import configuration

TargetKind = Literal["text", "label", "token_labels", "number"]


@configuration
class CorpusConfig:
    """A source of documents: one of `files`, `tfds` and `task`, or with none of them the embedded corpus."""

    files: tuple[str, ...] = ()
    """The user's own text, by path or glob: .txt (a document per file), .jsonl, .jsonl.gz or .parquet (one per row)."""
    text_field: str = "text"
    """The field of a JSON line, Parquet row or TFDS example that holds the text; of pairs, the targets."""
    inputs_field: str | None = None
    """Supervised pairs: the field that holds the inputs, of a Task its `inputs` feature. None: plain text."""
    target_kind: TargetKind = "text"
    """What the targets of pairs are. label: one of `labels`. token_labels: as many of them, with spaces between, as the
    inputs have words with spaces between. number: what Python reads as one. All are kept as text, so that a model can
    also be trained to write them."""
    labels: tuple[str, ...] = ()
    """The labels that there are; another one is refused with its place."""
    tfds: str | None = None
    """A TensorFlow Datasets name with its config and version, as in `wikipedia/20230601.en:1.0.0`."""
    task: str | None = None
    """A registered seqio Task, or a Mixture, each Task of which is read once whatever its rate: the `targets` feature,
    by its ids where they are those of the run's tokenizer, or else by the text that they were made from."""
    module: str | None = None
    """Module to import so that `task` is registered."""
    packages: bool = True
    """The embedded corpus: also read the docstrings of the installed dependencies, not only the standard library."""
    validation_fraction: float = 0.02
    """Share of the documents, chosen by a hash of their text, held out where the source has no validation split."""
    max_documents: int | None = None
    """Read only the first documents of the source."""
    invalid_utf8: Literal["refuse", "skip"] = "refuse"
    """What to do with a document that is not UTF-8: stop with its place, or leave it out and count it."""

    @property
    def name(self) -> str:
        if self.files:
            return "files"
        return self.tfds or self.task or "python_docs"

    def described(self) -> dict[str, Any]:
        """The fields that decide what is read, for digests: those that came later only where they are set."""
        fields = dataclasses.asdict(self)
        later = {"target_kind": "text", "labels": ()}
        return {name: value for name, value in fields.items() if name not in later or value != later[name]}


@configuration
class TokenizerConfig:
    """A vocabulary. Ids: pad 0, eos 1, unk 2, pieces; then sentinels (the first has the highest id); then R, S, X."""

    kind: Literal["sentencepiece", "bytes", "task"] = "sentencepiece"
    """task: the vocabulary of the corpus's seqio Task, whose ids are then the store's."""
    path: str | None = None
    """An existing SentencePiece model; None lets `prepare` train one on the corpus."""
    vocab_size: int = 4096
    """Pieces of a SentencePiece model that `prepare` trains."""
    num_sentinels: int = 100
    """Reserved ids for masked spans. A model file that brings its own <extra_id_*> pieces must have at least as many,
    or none."""
