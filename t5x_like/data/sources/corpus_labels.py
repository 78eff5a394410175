"""Labels of a corpus that its configuration does not name: those that occur in its documents."""

from __future__ import annotations

import dataclasses

from t5x_like.config import CorpusConfig, RunConfig
from t5x_like.data.sources.corpus_reader import read_corpus
from t5x_like.data.sources.document import ReadStats
from t5x_like.errors import ConfigError, ConfigProblem

MOST = 1000
"""Largest number of labels that are collected; more of them are not labels."""


def with_labels(run: RunConfig) -> RunConfig:
    """Return the run with the labels of its head and of its corpora; unchanged if the head has no labels to fill in.

    A head or a corpus without labels takes the labels of the other. If neither has any, the labels come from the
    training documents, in alphabetical order.

    Raises:
      DataError: the documents cannot be read.
      ConfigError: there are more than `MOST` labels.
    """
    head, corpora = run.model.task_head, [share.corpus for share in run.data.sources]
    classes = head is not None and head.kind in ("classification", "token_classification")
    if head is None or not classes or not corpora:
        return run
    known = [labels for labels in (head.labels, *(corpus.labels for corpus in corpora)) if labels]
    if len(known) == 1 + len(corpora):
        return run
    labels = known[0] if known else tuple(sorted({label for corpus in corpora for label in _labels_of(corpus)}))
    filled_head = head if head.labels else dataclasses.replace(head, labels=labels)
    data = dataclasses.replace(
        run.data,
        corpus=_filled(run.data.corpus, labels) if not run.data.corpora else run.data.corpus,
        corpora=tuple(dataclasses.replace(share, corpus=_filled(share.corpus, labels)) for share in run.data.corpora),
    )
    return dataclasses.replace(run, model=dataclasses.replace(run.model, task_head=filled_head), data=data)


def _filled(corpus: CorpusConfig, labels: tuple[str, ...]) -> CorpusConfig:
    return corpus if corpus.labels else dataclasses.replace(corpus, labels=labels)


def _labels_of(corpus: CorpusConfig) -> set[str]:
    # As plain text: a label that is not listed is otherwise refused.
    plain = dataclasses.replace(corpus, target_kind="text", labels=())
    found: set[str] = set()
    for document in read_corpus(plain, ReadStats()):
        if document.split == "train":
            found.update(document.text.split() if corpus.target_kind == "token_labels" else [document.text])
        if len(found) > MOST:
            raise ConfigError(
                [
                    ConfigProblem(
                        "data.corpus.text_field",
                        f"more than {MOST:,} labels in {corpus.text_field!r}",
                        "a field of labels, or their names in data.corpus.labels",
                    )
                ]
            )
    return found
