"""Block diffusion: the law of block and masked tokens, its rows, and the blocks of the held-out bound."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers.config_examples import changed, example
from helpers.data_examples import data_config, numbered_store, text_store
from helpers.objective_examples import VOCABULARY, agree, noisy, numbered

from t5x_like.config import BlockDiffusion, PrefixLM
from t5x_like.config.batch_spec import RowShape, sub_batch_spec
from t5x_like.config.continuation import continuation_positions, has_bound
from t5x_like.config.validation import validate
from t5x_like.data.inspection.row_statistics import row_statistics
from t5x_like.data.objectives.registry import restore
from t5x_like.data.stream import heldout
from t5x_like.data.stream.continuation import continuation_batches
from t5x_like.data.stream.feature_converters import convert
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.planning.estimate.tokens import prefix_lengths

BLOCK = 4
DIFFUSION = BlockDiffusion(block_length=BLOCK)


def test_the_encoder_reads_what_is_before_the_block_and_the_decoder_the_masked_block() -> None:
    rows, length = 300, 11
    tokens = numbered(rows, length)
    features = convert(noisy(tokens, DIFFUSION), "encoder_decoder", length, BLOCK + 1)
    assert features["decoder_loss_weights"].dtype == np.float32
    for row in range(rows):
        start = int((features["encoder_input_tokens"][row] != 0).sum()) - 1
        size = min(BLOCK, length - start)
        inputs = features["encoder_input_tokens"][row]
        assert inputs[: start + 1].tolist() == [*tokens[row, :start], VOCABULARY.eos_id]
        block = tokens[row, start : start + size]
        targets, read = (features[f"decoder_{name}_tokens"][row] for name in ("target", "input"))
        # Position 0 reads the start token, where nothing is predicted.
        assert targets.tolist() == [0, *block, *[0] * (BLOCK - size)]
        weights = features["decoder_loss_weights"][row]
        masked = weights > 0
        # The tokens are read at their own positions: what is not masked is what is predicted there.
        assert (read[masked] == VOCABULARY.mask_id).all() and np.array_equal(read[~masked], targets[~masked])
        assert features["decoder_causal_attention"][row].tolist() == [1] * (size + 1) + [0] * (BLOCK - size)
        assert (
            masked.any()
            and not masked[0]
            and not masked[size + 1 :].any()
            and weights.sum() == pytest.approx(size, rel=1e-5)
        )
        restored = restore(inputs[: start + 1], targets[: size + 1], DIFFUSION, VOCABULARY)
        assert restored.tolist() == tokens[row, : start + size].tolist()


def test_the_start_of_the_block_and_the_number_of_masked_tokens_are_uniform() -> None:
    rows, length = 12_000, 6
    examples = noisy(numbered(rows, length), DIFFUSION, seed=2)
    scored = examples.scored_NxT
    assert scored is not None
    start = examples.input_lengths_N - 1
    assert agree(np.bincount(start, minlength=length), [1 / length] * length)
    counts = scored.sum(axis=1)
    for size in range(1, BLOCK + 1):
        of_size = examples.target_lengths_N == size + 1
        assert agree(np.bincount(counts[of_size], minlength=size + 1)[1:], [1 / size] * size)
        # Each position of the block is masked as often.
        assert agree(scored[of_size].sum(axis=0)[1 : size + 1], [1 / size] * size)
    assert counts.mean() == pytest.approx(DIFFUSION.expected_loss_tokens(length), abs=0.05)
    sizes = dict(DIFFUSION.block_lengths(length))
    found = np.bincount(examples.target_lengths_N - 1, minlength=BLOCK + 1)[1:]
    assert agree(found, [sizes[size] for size in range(1, BLOCK + 1)])


def test_rows_of_the_stream_have_the_features_of_the_batch(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "store", 48 * 64)
    data = data_config("encoder_decoder", (DIFFUSION,))
    stream = TrainingStream([store], data, batch_size=16)
    batch = stream.batch(1)["main"]
    spec = sub_batch_spec(data, RowShape(48, 48, packed=False), 16)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        name: (array.shape, array.dtype) for name, array in spec.items()
    }
    (counted,) = row_statistics(stream, 256).objectives
    assert not counted.broken
    (fit,) = counted.fits
    assert fit.p_value is not None and fit.p_value > 1e-3 and fit.forbidden == 0


def test_packed_documents_keep_their_blocks_apart(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "store", 600, lengths=[10, 20, 5, 40, 25] * 6)
    data = dataclasses.replace(data_config("encoder_decoder", (DIFFUSION,)), example_mode="documents")
    batch = TrainingStream([store], data, batch_size=4).batch(0)["main"]
    checked = 0
    for row in range(4):
        segments = batch["decoder_segment_ids"][row]
        assert np.array_equal(batch["decoder_causal_attention"][row], segments > 0)
        for number in range(1, segments.max() + 1):
            own = segments == number
            assert 2 <= own.sum() <= BLOCK + 1
            assert batch["decoder_loss_weights"][row][own].sum() == pytest.approx(own.sum() - 1, rel=1e-5)
            checked += 1
    assert checked > 4


def test_each_block_of_the_bound_is_given_all_text_before_it(tmp_path: Path) -> None:
    """A continuation of 10 tokens has two blocks of 4 and one of 2, each scored with four numbers of masked tokens."""
    store = text_store(tmp_path / "store", ["the cat sat on the mat. " * 80], ["a dog ran to the cat. " * 40])
    data = data_config("encoder_decoder", (DIFFUSION,))
    assert has_bound(data) and not list(heldout.prefix_lm_batches(store, data, 4, 2))
    given, scored = 6, 10
    assert continuation_positions(data, given, scored) == {"encoder": given + 8 + 1, "decoder": BLOCK + 1}
    for window in continuation_batches(store, data, 4, given, scored, 7):
        rows = len(window.texts)
        assert len(window.batches) == 3 * heldout.BOUND_GRID
        for number, batch in enumerate(window.batches):
            features = {name: values[:rows] for name, values in batch["main"].items()}
            first = number // heldout.BOUND_GRID * BLOCK
            size = min(BLOCK, scored - first)
            before = features["encoder_input_tokens"]
            assert (before[:, given + first] == store.vocabulary.eos_id).all() and not before[
                :, given + first + 1 :
            ].any()
            assert np.array_equal(before[:, given : given + first], window.tokens_NxT[:, :first])
            block = features["decoder_target_tokens"][:, 1 : size + 1]
            assert np.array_equal(block, window.tokens_NxT[:, first : first + size])
            weights = features["decoder_loss_weights"]
            assert weights.sum(axis=1) == pytest.approx(size / heldout.BOUND_GRID, rel=1e-5)
            # One number of masked tokens in each part of 1..size.
            part = number % heldout.BOUND_GRID
            least, most = part * size // heldout.BOUND_GRID, -(-(part + 1) * size // heldout.BOUND_GRID)
            assert all(least < count <= most for count in (weights > 0).sum(axis=1))


def test_where_it_does_not_fit_it_is_refused() -> None:
    run = changed(example("encoder_decoder"), "data.mixture", (DIFFUSION,))
    run = changed(run, "model.decoder.positions", "rope")
    assert validate(run) == []
    others = changed(run, "data.mixture", (DIFFUSION, PrefixLM(name="prefix")))
    assert [problem.where for problem in validate(others)] == ["data.mixture"]
    long = changed(run, "data.mixture", (BlockDiffusion(block_length=64),))
    assert [problem.where for problem in validate(long)] == ["data.mixture.0"]
    relative = changed(run, "model.decoder.positions", "relative_bias")
    assert any("a token of the block attends to" in str(problem) for problem in validate(relative))
    for layout in ("causal_lm", "prefix_lm", "encoder"):
        problems = validate(changed(example(layout), "data.mixture", (DIFFUSION,)))
        assert "data.mixture.0.kind" in [problem.where for problem in problems]
        assert any("an encoder for the text before the block" in str(problem) for problem in problems)


def test_estimates_count_the_bidirectional_block() -> None:
    run = changed(example("encoder_decoder"), "data.mixture", (DIFFUSION,))
    window = DIFFUSION.raw_window_length("encoder_decoder", run.data.inputs_length, run.data.targets_length)
    assert dict(prefix_lengths(run)) == pytest.approx(
        {length + 1: likely for length, likely in DIFFUSION.block_lengths(window)}
    )
