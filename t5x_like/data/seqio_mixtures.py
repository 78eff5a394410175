"""Our objectives as seqio Tasks, so that any trainer that reads seqio can train on our mixtures. Imports TensorFlow.

A Task per objective and a Mixture with the rates. Their preprocessors call the same pure `denoise`, so an example is
what a prepared store would give for the same window and key. Two habits of seqio's mixtures are avoided: a document
belongs to one of the objectives, by a hash of its text, where Tasks over one corpus would each repeat all of it; and
windows are sized so that nothing is trimmed, mode token and EOS included.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import seqio
import tensorflow as tf

from t5x_like.config.data import DataConfig
from t5x_like.config.errors import ConfigError, DataError, Problem
from t5x_like.config.lengths import max_spans, raw_window_length, windows_per_row
from t5x_like.config.objectives import CausalLM, Layout, MaskedLM, Objective, SpanCorruption
from t5x_like.data import keys as rng
from t5x_like.data.denoise import denoise, needs_traits
from t5x_like.data.vocabulary import EOS_ID, PAD_ID, Vocabulary

_WINDOWS_AT_ONCE = 64


def register_mixture(
    name: str, data: DataConfig, *, task: str | seqio.Task, vocabulary: Vocabulary | None = None
) -> seqio.Mixture:
    """Registers the Task `<name>_<objective>` for each objective of `data.mixture`, and the Mixture `name` of them.

    Read them with the task feature lengths `data.inputs_length` and `data.targets_length`; or, where all objectives are
    causal LM, `{"targets": data.row_length}`; or, of masked LM, twice `data.inputs_length`.

    Args:
      name: Of the Mixture.
      data: Its mixture, layout, lengths and seed count. A seed given to seqio draws other spans; the documents of an
        objective are chosen by `data.seed`.
      task: A Task, or the name of one, whose `targets` are the tokens of a document.
      vocabulary: What its ids mean; None: as `vocabulary_of` has it. Mode tokens follow behind its last id, so the
        model's token table must have `vocabulary.vocab_size` rows.

    Raises:
      ConfigError: an objective does not fit the rows or the vocabulary, or cannot be said in seqio's features.
    """
    task = seqio.TaskRegistry.get(task) if isinstance(task, str) else task
    feature = task.output_features["targets"]
    vocabulary = vocabulary or vocabulary_of(feature.vocabulary)
    windows = _windows(data, vocabulary)
    names = ["targets"] if _is_plain(data) else ["inputs", "targets"]
    # By raw tokens, so that each Task comes to its end when the others do.
    shares = np.array([o.rate * window for o, window in zip(data.mixture, windows, strict=True)])
    edges = np.concatenate([[0.0], np.cumsum(shares / shares.sum())])
    for index, (objective, window) in enumerate(zip(data.mixture, windows, strict=True)):
        seqio.TaskRegistry.add(
            _task_name(name, objective),
            source=task.source,
            preprocessors=[
                *task.preprocessors,
                functools.partial(
                    own_documents, seed=data.seed, start=float(edges[index]), stop=float(edges[index + 1])
                ),
                functools.partial(cut_windows, length=window * windows_per_row(objective)),
                functools.partial(
                    corrupt,
                    objective=objective,
                    vocabulary=vocabulary,
                    least={"inputs": data.inputs_length, "targets": _targets_length(data)},
                ),
            ],
            output_features={key: seqio.Feature(feature.vocabulary, add_eos=False) for key in names},
        )
    rates = [(_task_name(name, objective), objective.rate) for objective in data.mixture]
    return seqio.MixtureRegistry.add(name, rates)


def vocabulary_of(vocabulary: Any) -> Vocabulary:
    """A seqio vocabulary's ids as ours: its extra ids, at its upper end, are the sentinels, as in T5.

    Raises:
      ConfigError: its pad and EOS ids are not 0 and 1.
    """
    if (vocabulary.pad_id, vocabulary.eos_id) != (PAD_ID, EOS_ID):
        found = f"pad {vocabulary.pad_id} and EOS {vocabulary.eos_id}"
        raise ConfigError([Problem("vocabulary", found, f"pad {PAD_ID} and EOS {EOS_ID}, as seqio's own have them")])
    extra = int(vocabulary.extra_ids)
    return Vocabulary(base_size=int(vocabulary.vocab_size) - extra, num_sentinels=extra)


def own_documents(dataset: tf.data.Dataset, *, seed: int, start: float, stop: float) -> tf.data.Dataset:
    """The documents whose `draw` is in [start, stop), each as {"targets": tokens with EOS}."""

    def document(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        tokens = tf.cast(example["targets"], tf.int32)
        has_end = tf.logical_and(tf.size(tokens) > 0, tf.equal(tokens[-1:], EOS_ID))
        return {"targets": tf.cond(tf.reduce_any(has_end), lambda: tokens, lambda: tf.concat([tokens, [EOS_ID]], 0))}

    def is_own(example: Mapping[str, tf.Tensor]) -> tf.Tensor:
        drawn = tf.numpy_function(lambda tokens: draw(tokens, seed), [example["targets"]], tf.float64, stateful=False)
        return tf.logical_and(drawn >= start, drawn < stop)

    return dataset.map(document, num_parallel_calls=tf.data.AUTOTUNE).filter(is_own)


def draw(tokens: npt.NDArray[np.int32], seed: int) -> np.float64:
    """A number in [0, 1) that depends on the tokens and the seed: the same in every epoch, order and process."""
    digest = hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return np.float64((int.from_bytes(digest, "little") >> 11) * 2.0**-53)


def cut_windows(dataset: tf.data.Dataset, *, length: int) -> tf.data.Dataset:
    """The documents as one text, cut into windows: {"window": [length]}. What is left at the end is left out."""

    def cut(rest: tf.Tensor, example: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        tokens = tf.concat([rest, example["targets"]], 0)
        count = tf.size(tokens) // length
        return tokens[count * length :], tf.reshape(tokens[: count * length], [count, length])

    windows = dataset.scan(tf.zeros([0], tf.int32), cut)
    return windows.flat_map(tf.data.Dataset.from_tensor_slices).map(lambda window: {"window": window})


def corrupt(
    dataset: tf.data.Dataset,
    *,
    objective: Objective,
    vocabulary: Vocabulary,
    least: Mapping[str, int],
    sequence_length: Mapping[str, int] | None = None,
    output_features: Mapping[str, Any] | None = None,
) -> tf.data.Dataset:
    """Windows become inputs and targets; `window_keys`, kept beside them, are what `denoise` was called with.

    Args:
      dataset: Of {"window": tokens}.
      objective: The denoiser.
      vocabulary: Ids of its sentinels and mode tokens.
      least: The lengths that the windows were sized for.
      sequence_length: seqio's task feature lengths, which would trim what is longer.
      output_features: seqio's; of inputs and targets, those that are asked for.

    Raises:
      DataError: `sequence_length` would trim.
    """
    for name, length in (sequence_length or {}).items():
        if name in least and length < least[name]:
            raise DataError(
                f"task feature lengths: found {length} for {name}, expected at least {least[name]}, for which the "
                "mixture was registered: seqio would cut what is longer without a word"
            )
    wanted = tuple(output_features or ("inputs", "targets"))

    @seqio.map_over_dataset(num_seeds=1)
    def denoised(batch: Mapping[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        types = [tf.int32, tf.int32, tf.int64, tf.int64, tf.int64]
        run = functools.partial(denoise_batch, objective=objective, vocabulary=vocabulary)
        names = ("inputs", "targets", "inputs_width", "targets_width", "window_keys")
        found = tf.numpy_function(run, [batch["window"], seed], types, stateful=False)
        ranks = (2, 2, 1, 1, 1)
        return {name: tf.ensure_shape(x, [None] * rank) for name, x, rank in zip(names, found, ranks, strict=True)}

    def single(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        cut = {name: example[name][: example[f"{name}_width"]] for name in wanted}
        return {**cut, "window_keys": example["window_keys"]}

    examples = denoised(dataset.batch(_WINDOWS_AT_ONCE))
    return examples.unbatch().map(single, num_parallel_calls=tf.data.AUTOTUNE)


def denoise_batch(
    windows_NxL: npt.NDArray[np.int32], seed: npt.NDArray[np.int32], *, objective: Objective, vocabulary: Vocabulary
) -> tuple[npt.NDArray[Any], ...]:
    """`denoise` under the keys of seqio's seed: inputs, targets, their lengths, and the key of each example's window.

    seqio gives all Tasks of a Mixture the same seeds; the objective's name keeps them apart.
    """
    name = int.from_bytes(hashlib.blake2b(objective.name.encode(), digest_size=8).digest(), "little")
    key = rng.fold_in(rng.fold_in(name, int(seed[0])), int(seed[1]))
    keys_N = rng.fold_in(key, np.arange(len(windows_NxL)))
    examples = denoise(windows_NxL, keys_N, objective, vocabulary)
    of_examples = np.repeat(keys_N.view(np.int64), windows_per_row(objective))
    return (
        np.pad(examples.inputs_NxI, ((0, 0), (0, 1))),  # tf.data crashes on rows without any cell.
        examples.targets_NxT,
        examples.input_lengths_N,
        examples.target_lengths_N,
        of_examples,
    )


def _task_name(name: str, objective: Objective) -> str:
    """seqio's names have no dots."""
    return f"{name}_{objective.name}".replace(".", "_")


def _is_plain(data: DataConfig) -> bool:
    return all(isinstance(objective, CausalLM) for objective in data.mixture)


def _targets_length(data: DataConfig) -> int:
    if data.layout == "encoder":
        return data.inputs_length
    return data.row_length if _is_plain(data) else data.targets_length


def _windows(data: DataConfig, vocabulary: Vocabulary) -> list[int]:
    """Raw tokens per window of each objective. seqio bounds inputs and targets apart, in single streams too."""
    problems, windows = [], []
    for index, objective in enumerate(data.mixture):
        where = f"data.mixture.{index} ({objective.name})"
        aligned = isinstance(objective, MaskedLM)
        layout: Layout = "encoder" if aligned else "causal_lm" if _is_plain(data) else "encoder_decoder"
        window = raw_window_length(objective, layout, data.inputs_length, data.targets_length)
        windows.append(window)
        if needs_traits(objective):
            problems.append(Problem(where, "whole words", "pieces: seqio's vocabularies do not tell where words begin"))
        elif window < 2:
            problems.append(Problem(where, "rows too short for two tokens", "longer inputs_length and targets_length"))
        elif isinstance(objective, SpanCorruption) and max_spans(objective, window) > vocabulary.num_sentinels:
            found = f"up to {max_spans(objective, window)} spans in windows of {window}"
            problems.append(Problem(where, found, f"at most {vocabulary.num_sentinels}, one per sentinel"))
        elif not aligned and _scores_a_part(objective, window, vocabulary):
            problems.append(Problem(where, "targets of which a part is scored", "all: seqio scores what is no padding"))
    if problems:
        raise ConfigError(problems)
    return windows


def _scores_a_part(objective: Objective, window: int, vocabulary: Vocabulary) -> bool:
    tokens = np.full((1, window * windows_per_row(objective)), EOS_ID + 2, np.int32)
    examples = denoise(tokens, rng.fold_in(0, 0), objective, vocabulary)
    if examples.scored_NxT is None:
        return False
    real = np.arange(examples.targets_NxT.shape[1]) < examples.target_lengths_N[:, None]
    return not examples.scored_NxT[real].all()
