"""Sources of documents."""

from __future__ import annotations

import dataclasses
import string
from typing import Annotated, Any, Literal

import pydantic

from t5x_like.config.bounds import NonEmptyStr, NonNegativeInt, OpenUnitFloat, PositiveInt
from t5x_like.config.dataclass import config_dataclass

TargetKind = Literal["text", "label", "token_labels", "number"]
RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".conll", ".conllu")
"""Suffixes of text files whose documents have fields."""
TEXT_SUFFIXES = (".txt", *RECORD_SUFFIXES)
"""Suffixes of files that may be compressed."""
COMPRESSION_SUFFIXES = (".gz", ".zst")
TABLE_SUFFIXES = (".parquet", ".arrow", ".array_record", ".arrayrecord")
MaxDocuments = Annotated[int, pydantic.Field(ge=2, description="2 or more: one for training and one held out")]


@config_dataclass
class CorpusConfig:
    """Source of documents: one of `files`, `tfds`, `task` and `generator`; if none is set, the embedded corpus of
    Python docs."""

    files: tuple[str, ...] = ()
    """The user's files, as paths, globs or URLs (gs://, s3://, hf://): .txt (one document per file); .jsonl, .json,
    .csv, .tsv, .parquet, .arrow, .array_record (one per row); .conll, .conllu (one per sentence). Text formats may end
    in .gz or .zst. A folder that `datasets.save_to_disk` wrote is also accepted."""
    validation_files: tuple[str, ...] = ()
    """Files of the validation split, in place of a fraction of `files`."""
    test_files: tuple[str, ...] = ()
    """Files of the test split, which `eval --split test` scores and training never reads."""
    text_field: NonEmptyStr = "text"
    """Field of a row that holds the text; for pairs, the targets. `a.b` is field b of the object in field a. A value
    with braces is a template of fields, as in "{title}: {body}"."""
    inputs_field: str | None = None
    """Supervised pairs: field or template of the inputs (of a seqio Task, its `inputs` feature). None: plain text."""
    rejected_field: NonEmptyStr | None = None
    """Preference pairs (objective `Preference`): field or template of the answer that is worse than that of
    `text_field`, to the same inputs. Pairs with the same inputs are in the same split when a fraction is held out,
    unless `key_field` is set. With `messages_field` the inputs are the messages of that field, and the answers are
    texts, or lists of messages of which the last is the answer."""
    negative_fields: tuple[NonEmptyStr, ...] = ()
    """Trained embeddings: fields or templates of texts that do not match the inputs although they resemble them (hard
    negatives). A field holds a text or a list of texts, and may be empty. Rows with the same inputs and the same
    `text_field` are in the same split when a fraction is held out, unless `key_field` is set."""
    num_negatives: PositiveInt | None = None
    """Largest number of hard negatives of a row: a row with more is refused, and one with fewer is completed by texts
    that do not count in the loss. None: the number of `negative_fields`."""
    messages_field: NonEmptyStr | None = None
    """Dialogues: field with the list of messages, each with a `role` and a `content`, in place of a text. The field
    `tools`, if the rows have it, holds the descriptions of the tools."""
    messages_as: Literal["dialogue", "turns"] = "dialogue"
    """dialogue: each dialogue is an example in a single stream, with a loss on the assistant's turns (objective
    `Dialogues`). turns: each answer of the assistant is a pair of the dialogue before it and the answer (objective
    `Supervised`), as an encoder-decoder reads it."""
    chat_template: NonEmptyStr | None = None
    """File with the chat template, a Jinja program. None: the template of the tokenizer or, if it has none, each
    message after its role."""
    key_field: str | None = None
    """Field or template of a key. All documents with the same key are in the same split when a fraction is held
    out."""
    target_kind: TargetKind = "text"
    """Type of the targets of pairs. label: one of `labels`. token_labels: one label for each whitespace-separated word
    of the inputs, separated by spaces. number: text that Python's float() accepts. All are stored as text, so that a
    model can also be trained to generate them."""
    labels: tuple[str, ...] = ()
    """Valid labels; any other label is refused, with its position in the source."""
    tfds: str | None = None
    """A TensorFlow Datasets name with its config and version, as in `wikipedia/20230601.en:1.0.0`."""
    task: str | None = None
    """A registered seqio Task, or a Mixture, each Task of which is read once regardless of its rate. Reads the
    `targets` feature: its ids if the run's tokenizer made them, or else the text that they were made from."""
    module: str | None = None
    """Module to import so that `task` is registered."""
    generator: str | None = None
    """Name of a corpus that a plug-in registers by `register_corpus`."""
    train_split: NonEmptyStr = "train"
    """Name of the training split in a source that has splits: TFDS, a seqio Task, a `datasets` folder."""
    validation_split: NonEmptyStr | None = None
    """Name of the validation split in such a source. None: "validation" if the source has one."""
    test_split: NonEmptyStr | None = None
    """Name of the test split in such a source. None: no test split is read."""
    packages: bool = True
    """Embedded corpus: also read the docstrings of the installed dependencies, not only of the standard library."""
    validation_fraction: OpenUnitFloat = 0.02
    """Fraction of the documents that is held out if the source has no validation split; chosen by a hash of the
    text, or of the key if `key_field` is set."""
    max_documents: MaxDocuments | None = None
    """Read only this many documents from the beginning of each split of the source."""
    invalid_utf8: Literal["refuse", "skip"] = "refuse"
    """Treatment of documents that are not valid UTF-8: refuse stops with an error that states the position, skip omits
    and counts them."""
    max_bad_records: NonNegativeInt = 0
    """Number of rows of `files` that may be left out because they are invalid: JSON that cannot be parsed, a field that
    is missing or of another type, a label that is not listed, a preference pair of equal answers, text that is not
    UTF-8. They are listed in quarantine.jsonl of the store; one more is an error."""

    @property
    def name(self) -> str:
        if self.files:
            return "files"
        return self.tfds or self.task or self.generator or "python_docs"

    @property
    def max_negatives(self) -> int:
        """Number of hard negatives that each document has in its store, of which some can be empty."""
        return (self.num_negatives or len(self.negative_fields)) if self.negative_fields else 0

    @property
    def sequences_per_document(self) -> int:
        """Number of sequences of a document in its store. 1: a text. 2: inputs and targets, or the tokens of a dialogue
        and their mask. 3: a prompt, the chosen and the rejected answer. 2 + n: a text, the one that matches it, and n
        hard negatives."""
        if self.rejected_field is not None:
            return 3
        if self.negative_fields:
            return 2 + self.max_negatives
        return 2 if self.inputs_field is not None or self.messages_field is not None else 1

    @property
    def has_test(self) -> bool:
        """Return whether the corpus has a test split."""
        return bool(self.test_files or self.test_split)

    def described(self) -> dict[str, Any]:
        """Return the fields that decide what is read, for digests.

        Fields that were added after the first release are included only if they are set, so that existing digests
        stay valid.
        """
        fields = dataclasses.asdict(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if name not in _LATER or value != defaults[name]}


_LATER = frozenset(
    {"target_kind", "labels", "validation_files", "test_files", "key_field", "generator"}
    | {"train_split", "validation_split", "test_split", "max_bad_records"}
    | {"messages_field", "messages_as", "chat_template", "rejected_field", "negative_fields", "num_negatives"}
)
"""Fields that were added after the first release."""


def parse_field(expression: str) -> tuple[tuple[str, str | None], ...]:
    """Return the (literal text, field or None) of a field expression: the name of a field, or a template with braces.

    Raises:
      ValueError: the braces do not match, are empty, or hold more than a field.
    """
    if "{" not in expression and "}" not in expression:
        return (("", expression),)
    parts = []
    for literal, field, specification, conversion in string.Formatter().parse(expression):
        if field == "" or specification or conversion:
            raise ValueError("braces hold more or less than the name of a field")
        parts.append((literal, field))
    if not any(field for _, field in parts):
        raise ValueError("a template without a field")
    return tuple(parts)


def file_format(name: str) -> tuple[str, str] | None:
    """Return (suffix, suffix of the compression or "") of a file name; None if the format is not supported."""
    name = name.lower()
    compression = next((suffix for suffix in COMPRESSION_SUFFIXES if name.endswith(suffix)), "")
    stem = name.removesuffix(compression)
    suffixes = TEXT_SUFFIXES if compression else (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
    suffix = next((suffix for suffix in suffixes if stem.endswith(suffix)), None)
    return None if suffix is None else (suffix, compression)


def expected_formats() -> str:
    """Return the supported suffixes in words, for messages."""
    text = ", ".join(TEXT_SUFFIXES)
    return f"{text} (each also with {' or '.join(COMPRESSION_SUFFIXES)}), {', '.join(TABLE_SUFFIXES)}"
