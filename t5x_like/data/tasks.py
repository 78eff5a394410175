"""The embedded corpus as a seqio Task, so that it mixes with a user's own and serves other trainers.

Importing this registers `python_docs` with the byte vocabulary. Imports TensorFlow.
"""

from __future__ import annotations

import functools

import seqio
import tensorflow as tf

from t5x_like.config.corpora import CorpusConfig
from t5x_like.data import corpora
from t5x_like.data.documents import Reading


def _dataset(split: str, shuffle_files: bool, seed: int | None = None, *, corpus: CorpusConfig) -> tf.data.Dataset:
    del shuffle_files, seed  # the order is the corpus's own; shuffling comes after reading
    documents = [document.text for document in corpora.read(corpus, Reading()) if document.split == split]
    return tf.data.Dataset.from_tensor_slices({"targets": documents})


def register_python_docs(
    name: str = "python_docs",
    vocabulary: seqio.Vocabulary | None = None,
    packages: bool = True,
) -> seqio.Task:
    """Registers the embedded corpus: `targets` holds a document and EOS, its text is kept as `targets_pretokenized`.

    Args:
      name: Of the Task.
      vocabulary: Tokenises the text; None for bytes with 100 sentinels.
      packages: Read the docstrings of the dependencies too.
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
