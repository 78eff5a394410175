"""Silent errors of public pipelines of seqio and T5's preprocessors, which must not occur here.

If it costs little, a test also shows that seqio makes the error, so that a corrected seqio is noticed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers.data_examples import data_config, numbered_store, raw_tokens, restored

from t5x_like.config import CorpusConfig, MaskedLM, PrefixLM, SpanCorruption, TokenizerConfig, ul2
from t5x_like.config.objectives import Layout
from t5x_like.config.validation import validate
from t5x_like.data.objectives.registry import denoise
from t5x_like.data.stream import rng
from t5x_like.data.stream.feature_converters import convert
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.data.tokenizers.vocabulary import EOS_ID, NUM_SPECIAL, PAD_ID, Vocabulary
from t5x_like.errors import ConfigError

X = SpanCorruption(name="X", mean_noise_span_length=3.0, noise_density=0.5, mode="X")


def windows(rows: int, length: int, vocabulary: Vocabulary) -> np.ndarray:
    return np.random.default_rng(length).integers(NUM_SPECIAL, vocabulary.base_size, (rows, length))


def test_text_pieces_are_never_used_as_sentinels(tmp_path: Path) -> None:
    """T5 counts down from the last id without checking where the sentinels end: at length 2048 and density 0.5 the
    lowest is 31588 of 32100, an ordinary piece."""
    few = Vocabulary(base_size=500, num_sentinels=100)
    with pytest.raises(IndexError, match="sentinel 1.. of 100"):
        denoise(windows(2, 766, few), rng.fold_in(0, np.arange(2)), X, few)
    enough = Vocabulary(base_size=500, num_sentinels=130)
    made = denoise(windows(4, 766, enough), rng.fold_in(0, np.arange(4)), X, enough)
    ids = np.concatenate([made.inputs_NxI.ravel(), made.targets_NxT.ravel()])
    assert ids.max() < enough.vocab_size
    data = dataclasses.replace(data_config(mixture=(X,)), inputs_length=512, targets_length=512)
    with pytest.raises(ConfigError, match="at most 100, one per sentinel"):
        TrainingStream([numbered_store(tmp_path / "s", 3000, num_sentinels=100)], data, 4)


def test_too_few_sentinels_are_a_config_error() -> None:
    """The problem is reported before a token is read."""
    from helpers.config_examples import example

    run = example()
    data = dataclasses.replace(run.data, mixture=(X,), inputs_length=512, targets_length=512)
    data = dataclasses.replace(data, tokenizer=TokenizerConfig(kind="bytes", num_sentinels=100))
    found = [problem for problem in validate(dataclasses.replace(run, data=data)) if "sentinels" in problem.expected]
    assert found and "data.tokenizer.num_sentinels" in found[0].fix


@pytest.mark.parametrize("length", [40, 190, 511])
def test_rotated_mask_keeps_inputs_and_targets_consistent(length: int) -> None:
    """With T5's random_roll, targets begin with tokens before the first sentinel, and span k follows sentinel k - 1."""
    vocabulary = Vocabulary(base_size=900, num_sentinels=200)
    tokens = windows(32, length, vocabulary)
    made = denoise(tokens, rng.fold_in(1, np.arange(32)), X, vocabulary)
    assert (made.targets_NxT[:, 0] == vocabulary.first_sentinel_id).all()
    for row in range(32):
        assert np.array_equal(restored(made, row, X, vocabulary), tokens[row])
    starts_masked = (made.inputs_NxI[:, 1] == vocabulary.first_sentinel_id).mean()
    assert 0.2 < starts_masked < 0.8, "the case occurs"


def test_single_span_denoiser_does_not_always_mask_the_end() -> None:
    """T5's mask always ends in noise, so with one span it is a suffix."""
    one = SpanCorruption(name="one", mean_noise_span_length=64.0, noise_density=0.15)
    vocabulary = Vocabulary(base_size=900, num_sentinels=10)
    tokens = windows(200, 400, vocabulary)
    ends = {}
    for exact in (True, False):
        objective = dataclasses.replace(one, t5_exact=exact)
        made = denoise(tokens, rng.fold_in(2, np.arange(200)), objective, vocabulary)
        sentinels = made.inputs_NxI >= vocabulary.base_size
        last = np.take_along_axis(sentinels, made.input_lengths_N[:, None] - 2, axis=1)[:, 0]
        ends[exact] = last.mean()
    assert ends[True] == 1.0 and ends[False] < 0.35


def test_noise_lengths_are_rounded_consistently() -> None:
    """T5 sizes windows in float64 and masks in float32: at 190 tokens 28 are planned and 29 masked, and the excess is
    cut off the targets silently."""
    tf = pytest.importorskip("tensorflow")
    r15 = SpanCorruption(name="R", noise_density=0.15)
    planned = r15.noise_counts(190)[0]
    assert planned == 28 and int(tf.round(tf.constant(190.0) * 0.15)) == 29
    vocabulary = Vocabulary(base_size=900, num_sentinels=100)
    made = denoise(windows(8, 190, vocabulary), rng.fold_in(3, np.arange(8)), r15, vocabulary)
    masked = ((made.targets_NxT >= NUM_SPECIAL) & (made.targets_NxT < vocabulary.base_size)).sum(axis=1)
    assert (masked == planned).all()


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm"])
def test_mode_token_and_end_fit_the_row(tmp_path: Path, layout: Layout) -> None:
    """The published UL2 listing sizes windows without the mode token; the last token of each full row is then trimmed,
    which is its EOS."""
    data = data_config(layout)
    stream = TrainingStream([numbered_store(tmp_path / "s", 6000)], data, 14)
    rows = stream.batch(0)["main"]
    for row in range(14):
        one = {name: values[row : row + 1] for name, values in rows.items()}
        objective = data.mixture[int(one["denoiser_ids"][0])]
        window = raw_tokens(one, data, stream.vocabulary)
        assert len(window) == objective.raw_window_length(layout, data.inputs_length, data.targets_length)
        targets = one["decoder_target_tokens"][0]
        assert np.trim_zeros(targets, "b")[-1] == EOS_ID
        first = (one["encoder_input_tokens"] if layout == "encoder_decoder" else targets[None])[0]
        assert objective.mode and first[0] == stream.vocabulary.mode_id(objective.mode)


def test_text_is_not_repeated_within_an_epoch(tmp_path: Path) -> None:
    """Seven seqio Tasks over one corpus read it seven times, synchronously because of their common seed: 68 % of a
    row's 8-grams are in another row of the first batch."""
    stream = TrainingStream([numbered_store(tmp_path / "s", 8000)], data_config(mixture=ul2()), 28)
    seen: list[int] = []
    for step in range(sum(stream.rows_per_epoch.values()) // 28):
        rows = stream.batch(step)["main"]
        for row in range(28):
            one = {name: values[row : row + 1] for name, values in rows.items()}
            seen += raw_tokens(one, stream.data, stream.vocabulary).tolist()
    assert len(seen) > 4000 and len(set(seen)) == len(seen)


def test_no_token_has_the_pad_id(tmp_path: Path) -> None:
    """seqio treats id 0 inside an example as its end, and its XOR of masks scores a pad id inside the inputs. A store
    has no pad ids: they are for token positions without text."""
    tokenizer = ByteTokenizer(num_sentinels=10)
    assert PAD_ID not in tokenizer.encode("".join(map(chr, range(256))))
    store = numbered_store(tmp_path / "s", 3000)
    assert store.split("train").tokens(0, 3000).min() >= NUM_SPECIAL


def test_seqio_cuts_an_example_at_an_inner_zero_when_it_packs() -> None:
    seqio = pytest.importorskip("seqio")
    import tensorflow as tf

    rows = tf.data.Dataset.from_tensors({"inputs": [5, 0, 6, 7, 1], "targets": [8, 9, 1]})
    made = next(iter(seqio.EncDecFeatureConverter(pack=True)(rows, {"inputs": 8, "targets": 4}).as_numpy_iterator()))
    assert made["encoder_input_tokens"].tolist() == [5, 0, 6, 7, 0, 0, 0, 0], "its EOS is lost"


def test_seqio_pairs_the_wrong_examples_around_an_empty_one() -> None:
    """Our packing numbers segments by example, so those of inputs and targets always agree. Live batches in which they
    differ are refused (`test_seqio_live_dataset`)."""
    seqio = pytest.importorskip("seqio")
    import tensorflow as tf

    pairs = [([5, 1], [6, 1]), ([], [7, 1]), ([8, 1], [9, 1])]
    rows = tf.data.Dataset.from_generator(
        lambda: ({"inputs": inputs, "targets": targets} for inputs, targets in pairs),
        output_signature={name: tf.TensorSpec([None], tf.int32) for name in ("inputs", "targets")},
    )
    made = next(iter(seqio.EncDecFeatureConverter(pack=True)(rows, {"inputs": 8, "targets": 8}).as_numpy_iterator()))
    of_eight = made["encoder_segment_ids"][made["encoder_input_tokens"].tolist().index(8)]
    of_nine = made["decoder_segment_ids"][made["decoder_target_tokens"].tolist().index(9)]
    assert (of_eight, of_nine) == (2, 3)


def test_too_long_example_is_an_error_and_not_truncated() -> None:
    """seqio trims to the task feature lengths, which removes EOS first."""
    vocabulary = Vocabulary(base_size=900, num_sentinels=100)
    made = denoise(windows(3, 40, vocabulary), rng.fold_in(4, np.arange(3)), X, vocabulary)
    with pytest.raises(ValueError, match="does not fit"):
        convert(made, "encoder_decoder", made.inputs_NxI.shape[1] - 2, made.targets_NxT.shape[1])


def test_every_selected_position_is_scored() -> None:
    """seqio's encoder converter scores positions with the mask token, but neither the 10 % with a random token nor the
    10 % that are unchanged."""
    bert = MaskedLM()
    vocabulary = Vocabulary(base_size=900, num_sentinels=10)
    made = denoise(windows(60, 100, vocabulary), rng.fold_in(5, np.arange(60)), bert, vocabulary)
    features = convert(made, "encoder", 100, 0)
    by_seqio = features["encoder_input_tokens"] == vocabulary.mask_id
    assert (features["encoder_loss_weights"].sum(axis=1) == 15).all()
    assert 0.7 < by_seqio.sum() / features["encoder_loss_weights"].sum() < 0.9


def test_fingerprint_differs_for_other_data(tmp_path: Path) -> None:
    """tf.data silently restores the state of another seed, mixture or number of hosts."""
    store = numbered_store(tmp_path / "s", 6000)
    base = data_config()
    changes = [
        dataclasses.replace(base, seed=1),
        dataclasses.replace(base, inputs_length=40),
        dataclasses.replace(base, mixture=ul2(uniform=False)),
        dataclasses.replace(base, mixture=(PrefixLM(name="S", mode="S"),)),
        dataclasses.replace(base, layout="prefix_lm"),
    ]
    found = {TrainingStream([store], data, 14).fingerprint for data in (base, *changes)}
    assert len(found) == 1 + len(changes)
    assert TrainingStream([store], base, 28).fingerprint == TrainingStream([store], base, 14).fingerprint, (
        "rows do not depend on it"
    )


def test_two_tokenizers_in_one_mixture_are_refused(tmp_path: Path) -> None:
    """An id would have two meanings; seqio compares vocabularies by the names and sizes of their files."""
    from t5x_like.config import CorpusShareConfig
    from t5x_like.errors import DataError

    one, other = numbered_store(tmp_path / "a", 6000), numbered_store(tmp_path / "b", 5000)
    shares = tuple(CorpusShareConfig(name=name, corpus=CorpusConfig()) for name in "ab")
    with pytest.raises(DataError, match="prepare both with one"):
        TrainingStream([one, other], dataclasses.replace(data_config(), corpora=shares), 14)
