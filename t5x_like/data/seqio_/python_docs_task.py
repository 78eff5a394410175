"""The embedded corpus as a seqio Task, to be mixed with a user's Tasks or read by other trainers.

Importing this module registers `python_docs` with the byte vocabulary. Imports TensorFlow.
"""

from __future__ import annotations

import functools

import seqio
import tensorflow as tf

from t5x_like.config.corpus import CorpusConfig
from t5x_like.data.sources import corpus_reader
from t5x_like.data.sources.document import ReadStats


def _dataset(split: str, shuffle_files: bool, seed: int | None = None, *, corpus: CorpusConfig) -> tf.data.Dataset:
    del shuffle_files, seed  # The order is that of the corpus. Shuffling comes after reading.
    documents = [
        document.text for document in corpus_reader.read_corpus(corpus, ReadStats()) if document.split == split
    ]
    return tf.data.Dataset.from_tensor_slices({"targets": documents})


def register_python_docs(
    name: str = "python_docs",
    vocabulary: seqio.Vocabulary | None = None,
    packages: bool = True,
) -> seqio.Task:
    """Register the embedded corpus. `targets` is a document with EOS; `targets_pretokenized` keeps its text.

    Args:
      name: Name of the Task.
      vocabulary: Vocabulary that tokenises the text; None for bytes with 100 sentinels.
      packages: Also read the docstrings of the dependencies.
    """
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            dataset_fn=functools.partial(_dataset, corpus=CorpusConfig(packages=packages)),
            splits=("train", "validation"),
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(vocabulary or seqio.ByteVocabulary(extra_ids=100), add_eos=True)},
    )


if "python_docs" not in seqio.TaskRegistry.names():
    register_python_docs()
