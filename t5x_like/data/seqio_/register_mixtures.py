"""Registration of our mixtures with seqio, so that any trainer that reads seqio can use them. Imports TensorFlow.

Each objective becomes a Task, and a Mixture holds the rates. The preprocessors call the same pure function `denoise`,
so an example equals that of a prepared store for the same window and key. Two properties of seqio's mixtures are
avoided. Tasks over one corpus would each read all of it; here a document belongs to one objective, by a hash of its
text. And seqio trims examples that are too long; here windows are sized so that nothing is trimmed, mode token and EOS
included.
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
from t5x_like.config.objectives import Layout, Objective
from t5x_like.data.objectives.registry import denoise
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import EOS_ID, PAD_ID, Vocabulary
from t5x_like.errors import ConfigError, ConfigProblem, DataError

_WINDOWS_AT_ONCE = 64


def register_mixture(
    name: str, data: DataConfig, *, task: str | seqio.Task, vocabulary: Vocabulary | None = None
) -> seqio.Mixture:
    """Register the Task `<name>_<objective>` for each objective of `data.mixture`, and the Mixture `name` of these
    Tasks.

    Read them with the task feature lengths `data.inputs_length` and `data.targets_length`. If no objective
    has inputs, use `{"targets": data.row_length}`; for masked LM, use `data.inputs_length` for both.

    Args:
      name: Name of the Mixture.
      data: Mixture, layout, lengths and seed. `data.seed` decides which documents belong to an objective; the seed
        given to seqio decides the noise.
      task: A Task, or the name of one, whose `targets` are the tokens of a document.
      vocabulary: Vocabulary of its ids; None for `vocabulary_of`. Mode tokens follow its last id, so the model's
        embedding table needs `vocabulary.vocab_size` rows.

    Raises:
      ConfigError: an objective does not fit the rows or the vocabulary, or cannot be expressed in seqio's features.
    """
    task = seqio.TaskRegistry.get(task) if isinstance(task, str) else task
    feature = task.output_features["targets"]
    vocabulary = vocabulary or vocabulary_of(feature.vocabulary)
    windows = _windows(data, vocabulary)
    names = ["targets"] if _is_plain(data) else ["inputs", "targets"]
    # Documents are divided in proportion to the raw tokens, so that all Tasks end at the same time.
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
                functools.partial(cut_windows, length=window * objective.windows_per_row),
                functools.partial(
                    corrupt,
                    objective=objective,
                    vocabulary=vocabulary,
                    min_lengths={"inputs": data.inputs_length, "targets": _targets_length(data)},
                ),
            ],
            output_features={key: seqio.Feature(feature.vocabulary, add_eos=False) for key in names},
        )
    rates = [(_task_name(name, objective), objective.rate) for objective in data.mixture]
    return seqio.MixtureRegistry.add(name, rates)


def vocabulary_of(vocabulary: Any) -> Vocabulary:
    """Return the `Vocabulary` of a seqio vocabulary. Its extra ids, at the upper end, are the sentinels, as in T5.

    Raises:
      ConfigError: its pad and EOS ids are not 0 and 1.
    """
    if (vocabulary.pad_id, vocabulary.eos_id) != (PAD_ID, EOS_ID):
        found = f"pad {vocabulary.pad_id} and EOS {vocabulary.eos_id}"
        raise ConfigError(
            [ConfigProblem("vocabulary", found, f"pad {PAD_ID} and EOS {EOS_ID}, as seqio's own have them")]
        )
    extra = int(vocabulary.extra_ids)
    return Vocabulary(base_size=int(vocabulary.vocab_size) - extra, num_sentinels=extra)


def own_documents(dataset: tf.data.Dataset, *, seed: int, start: float, stop: float) -> tf.data.Dataset:
    """Select the documents whose `draw` is in [start, stop), each as {"targets": tokens with EOS}."""

    def document(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        tokens = tf.cast(example["targets"], tf.int32)
        has_end = tf.logical_and(tf.size(tokens) > 0, tf.equal(tokens[-1:], EOS_ID))
        return {"targets": tf.cond(tf.reduce_any(has_end), lambda: tokens, lambda: tf.concat([tokens, [EOS_ID]], 0))}

    def is_own(example: Mapping[str, tf.Tensor]) -> tf.Tensor:
        drawn = tf.numpy_function(lambda tokens: draw(tokens, seed), [example["targets"]], tf.float64, stateful=False)
        return tf.logical_and(drawn >= start, drawn < stop)

    return dataset.map(document, num_parallel_calls=tf.data.AUTOTUNE).filter(is_own)


def draw(tokens: npt.NDArray[np.int32], seed: int) -> np.float64:
    """Return a number in [0, 1) that depends on the tokens and the seed only, not on epoch, order or process."""
    digest = hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return np.float64((int.from_bytes(digest, "little") >> 11) * 2.0**-53)


def cut_windows(dataset: tf.data.Dataset, *, length: int) -> tf.data.Dataset:
    """Concatenate the documents and cut them into windows {"window": [length]}. An incomplete last window is
    dropped."""

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
    min_lengths: Mapping[str, int],
    sequence_length: Mapping[str, int] | None = None,
    output_features: Mapping[str, Any] | None = None,
) -> tf.data.Dataset:
    """Turn windows into inputs and targets. `window_keys` are the keys with which `denoise` was called.

    Args:
      dataset: Data set of {"window": tokens}.
      objective: Denoising objective.
      vocabulary: Vocabulary with the sentinels and mode tokens.
      min_lengths: Lengths for which the windows were sized.
      sequence_length: seqio's task feature lengths, to which seqio trims.
      output_features: seqio's output features, which select inputs and targets.

    Raises:
      DataError: `sequence_length` would trim.
    """
    for name, length in (sequence_length or {}).items():
        if name in min_lengths and length < min_lengths[name]:
            raise DataError(
                f"task feature lengths: found {length} for {name}, expected at least {min_lengths[name]}, for which "
                "the mixture was registered; seqio would trim longer examples silently"
            )
    names_out = tuple(output_features or ("inputs", "targets"))

    @seqio.map_over_dataset(num_seeds=1)
    def denoised(batch: Mapping[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        types = [tf.int32, tf.int32, tf.int64, tf.int64, tf.int64]
        run = functools.partial(denoise_batch, objective=objective, vocabulary=vocabulary)
        names = ("inputs", "targets", "inputs_width", "targets_width", "window_keys")
        arrays = tf.numpy_function(run, [batch["window"], seed], types, stateful=False)
        ranks = (2, 2, 1, 1, 1)
        return {name: tf.ensure_shape(x, [None] * rank) for name, x, rank in zip(names, arrays, ranks, strict=True)}

    def single(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        cut = {name: example[name][: example[f"{name}_width"]] for name in names_out}
        return {**cut, "window_keys": example["window_keys"]}

    examples = denoised(dataset.batch(_WINDOWS_AT_ONCE))
    return examples.unbatch().map(single, num_parallel_calls=tf.data.AUTOTUNE)


def denoise_batch(
    windows_NxL: npt.NDArray[np.int32], seed: npt.NDArray[np.int32], *, objective: Objective, vocabulary: Vocabulary
) -> tuple[npt.NDArray[Any], ...]:
    """Call `denoise` with keys derived from seqio's seed.

    seqio gives all Tasks of a Mixture the same seeds, so the name of the objective is folded into the key.

    Returns:
      Inputs, targets, their lengths, and the key of each example's window.
    """
    name = int.from_bytes(hashlib.blake2b(objective.name.encode(), digest_size=8).digest(), "little")
    key = rng.fold_in(rng.fold_in(name, int(seed[0])), int(seed[1]))
    keys_N = rng.fold_in(key, np.arange(len(windows_NxL)))
    examples = denoise(windows_NxL, keys_N, objective, vocabulary)
    of_examples = np.repeat(keys_N.view(np.int64), objective.windows_per_row)
    return (
        np.pad(examples.inputs_NxI, ((0, 0), (0, 1))),  # tf.data crashes on rows of width 0.
        examples.targets_NxT,
        examples.input_lengths_N,
        examples.target_lengths_N,
        of_examples,
    )


def _task_name(name: str, objective: Objective) -> str:
    """Return the name of an objective's Task. Names in seqio must not contain dots."""
    return f"{name}_{objective.name}".replace(".", "_")


def _is_plain(data: DataConfig) -> bool:
    """Return True if no objective has inputs: the Tasks then have targets only."""
    return not any(objective.has_inputs for objective in data.mixture)


def _targets_length(data: DataConfig) -> int:
    return data.row_length if _is_plain(data) or data.target_stack == "encoder" else data.targets_length


def _windows(data: DataConfig, vocabulary: Vocabulary) -> list[int]:
    """Return the raw tokens per window of each objective.

    seqio limits inputs and targets separately, even if they share a stream.
    """
    problems, windows = [], []
    for index, objective in enumerate(data.mixture):
        where = f"data.mixture.{index} ({objective.name})"
        aligned = objective.predicts_in_place
        layout: Layout = "encoder" if aligned else "causal_lm" if _is_plain(data) else "encoder_decoder"
        window = objective.raw_window_length(layout, data.inputs_length, data.targets_length)
        windows.append(window)
        if objective.needs_token_traits:
            problems.append(
                ConfigProblem(where, "whole words", "pieces: seqio's vocabularies do not tell where words begin")
            )
        elif objective.fractional_loss_weights:
            problems.append(
                ConfigProblem(where, "weighted loss tokens", "tokens of equal weight, as seqio scores them")
            )
        elif window < 2:
            problems.append(
                ConfigProblem(where, "rows too short for two tokens", "longer inputs_length and targets_length")
            )
        elif objective.sentinels_needed(window) > vocabulary.num_sentinels:
            found = f"up to {objective.sentinels_needed(window)} sentinels in windows of {window}"
            problems.append(ConfigProblem(where, found, f"at most {vocabulary.num_sentinels}, as the vocabulary has"))
        elif not aligned and _scores_a_part(objective, window, vocabulary):
            problems.append(
                ConfigProblem(
                    where,
                    "targets of which a part is scored",
                    "targets that are all scored, since seqio scores all but padding",
                )
            )
    if problems:
        raise ConfigError(problems)
    return windows


def _scores_a_part(objective: Objective, window: int, vocabulary: Vocabulary) -> bool:
    tokens = np.full((1, window * objective.windows_per_row), EOS_ID + 2, np.int32)
    examples = denoise(tokens, rng.fold_in(0, 0), objective, vocabulary)
    if examples.scored_NxT is None:
        return False
    real = np.arange(examples.targets_NxT.shape[1]) < examples.target_lengths_N[:, None]
    return not examples.scored_NxT[real].all()
