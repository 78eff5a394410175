"""Registered seqio Tasks and Mixtures to read from, of numbers: example i of a Task has tokens of its own."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_like.config import DataConfig, SeqioConfig
from t5x_like.config.objectives import Layout

VOCABULARY = seqio.PassThroughVocabulary(500, eos_id=1)
MASK_ID = 499


def examples(first: int, count: int = 40, *, empty_inputs: bool = False) -> list[dict[str, np.ndarray]]:
    """Return examples with inputs of 2 to 7 tokens, targets of 1 to 5, and EOS."""
    pairs = []
    for index in range(first, first + count):
        lengths = 2 + index % 6, 1 + index % 5
        inputs, targets = ((index * 7 + np.arange(n)) % 400 + 3 for n in lengths)
        pair = {"inputs": np.append(inputs, 1), "targets": np.append(targets, 1)}
        if empty_inputs and index % 4 == 1:
            pair["inputs"] = inputs[:0]
        pairs.append(pair)
    return pairs


def source(first: int, count: int, names: tuple[str, ...], empty_inputs: bool = False) -> Any:
    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed
        start = first + (0 if split == "train" else 200)
        rows = [{n: e[n] for n in names} for e in examples(start, count, empty_inputs=empty_inputs)]
        columns = {name: tf.ragged.constant([row[name].tolist() for row in rows], dtype=tf.int32) for name in names}
        return tf.data.Dataset.from_tensor_slices(columns).map(
            lambda row: {name: tf.reshape(row[name], [-1]) for name in names}
        )

    return seqio.FunctionDataSource(dataset, splits=("train", "validation"))


def register(name: str, **options: Any) -> str:
    """Register a Task with features of these names, once."""
    first, count = options.pop("first", 0), options.pop("count", 40)
    names = options.pop("names", ("inputs", "targets"))
    empty_inputs = options.pop("empty_inputs", False)
    if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            name,
            source=source(first, count, names, empty_inputs),
            preprocessors=options.pop("preprocessors", []),
            output_features={feature: seqio.Feature(VOCABULARY, add_eos=True) for feature in names},
        )
    return name


def add_number(dataset: tf.data.Dataset, number: int) -> tf.data.Dataset:
    """Append a number, so that the text differs and has the same form."""
    return dataset.map(lambda row: {name: tf.where(row[name] > 1, row[name] + number, row[name]) for name in row})


def masked(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Return aligned inputs, every third of which is the mask token."""

    def mask(row: dict[str, Any]) -> dict[str, Any]:
        targets = row["targets"]
        return {"inputs": tf.where(tf.range(tf.size(targets)) % 3 == 0, MASK_ID, targets), "targets": targets}

    return dataset.map(mask)


def drawn_in_python(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Apply a preprocessor with a state that tf.data cannot save."""
    draw = functools.partial(tf.numpy_function, lambda x: x, Tout=tf.int32)
    return dataset.map(lambda row: {name: tf.ensure_shape(draw(inp=[row[name]]), [None]) for name in row})


def register_all() -> None:
    register("numbers")
    register("other_numbers", preprocessors=[functools.partial(add_number, number=11)])
    register("text_alone", names=("targets",))
    register("masked_numbers", preprocessors=[masked])
    register("few_numbers", count=4)
    register("drawn_in_python", preprocessors=[drawn_in_python])
    register("empty_inputs", empty_inputs=True)
    for name, rate in (("both", 2.0), ("both_otherwise", 5.0)):
        if name not in seqio.MixtureRegistry.names():
            seqio.MixtureRegistry.add(name, [("numbers", 1.0), ("other_numbers", rate)])


register_all()


def live_config(name: str, layout: Layout = "encoder_decoder", seed: int = 3, **options: Any) -> DataConfig:
    if layout == "encoder":
        options["mask_id"] = MASK_ID
    return DataConfig(
        seqio=SeqioConfig(mixture_or_task=name, **options),
        layout=layout,
        mixture=(),
        inputs_length=24,
        targets_length=0 if layout == "encoder" else 16,
        seed=seed,
    )
