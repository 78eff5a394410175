"""Masked diffusion: the law of the masked tokens, their weights, and stratification over the rows of the stream."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.data_examples import data_config, numbered_store, text_store
from helpers.objective_examples import VOCABULARY, agree, keys, noisy, numbered

from t5x_like.config import CausalLM, MaskedDiffusion, MaskedLM
from t5x_like.config.batch_spec import RowShape, sub_batch_spec
from t5x_like.config.continuation import has_bound
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.objectives.registry import denoise, implementation
from t5x_like.data.stream import heldout, rng
from t5x_like.data.stream.feature_converters import convert
from t5x_like.data.stream.host_shard import HostShard
from t5x_like.data.stream.row_stream import TrainingStream

DIFFUSION = MaskedDiffusion()


def test_masked_tokens_are_scored_and_their_weights_sum_to_the_window() -> None:
    tokens = numbered(300, 21)
    examples = noisy(tokens, DIFFUSION)
    masked = examples.inputs_NxI == VOCABULARY.mask_id
    assert examples.scored_NxT is not None and np.array_equal(masked, examples.scored_NxT)
    assert np.array_equal(examples.inputs_NxI[~masked], tokens[~masked])
    for layout, lengths in (("encoder", (21, 0)), ("prefix_lm", (21, 4))):
        features = convert(examples, layout, *lengths)
        weights = next(values for name, values in features.items() if name.endswith("loss_weights"))
        assert weights.dtype == np.float32 and np.array_equal(weights[:, :21] > 0, masked)
        assert weights.sum(axis=1) == pytest.approx(21.0, rel=1e-5)
        # The tokens of a row have one weight.
        assert weights.max(axis=1) * masked.sum(axis=1) == pytest.approx(21.0, rel=1e-5)


def test_the_number_of_masked_tokens_is_uniform_and_so_is_the_set() -> None:
    rows, length = 14_000, 4
    scored = noisy(numbered(rows, length), DIFFUSION, seed=3).scored_NxT
    assert scored is not None
    counts = np.bincount(scored.sum(axis=1), minlength=length + 1)
    assert counts[0] == 0 and agree(counts[1:], [1 / length] * length)
    subsets = [set(itertools.combinations(range(length), k)) for k in range(1, length + 1)]
    found = {subset: 0 for some in subsets for subset in some}
    for row in scored:
        found[tuple(np.flatnonzero(row).tolist())] += 1
    expected = [1 / length / math.comb(length, len(subset)) for subset in found]
    assert agree(list(found.values()), expected)
    assert scored.sum(axis=1).mean() == pytest.approx(DIFFUSION.expected_loss_tokens(length), abs=0.05)


def test_words_of_aligned_blocks_lie_one_in_each_part() -> None:
    for exponent, block in itertools.product((0, 1, 3, 6), (0, 1, 5)):
        size = 2**exponent
        words = rng.stratified(rng.fold_in(7, 9), np.arange(block * size, (block + 1) * size))
        # Python integers, since the word times the number of parts exceeds 64 bits.
        parts = [int(word) * size >> 64 for word in words]
        assert sorted(parts) == list(range(size))


def test_the_word_of_an_index_is_uniform_over_keys() -> None:
    for index in (0, 1, 12345):
        words = np.array([rng.stratified(rng.fold_in(key, 1), np.array([index]))[0] for key in range(1000)])
        assert agree(np.bincount((words >> np.uint64(60)).astype(np.int64), minlength=16), [1 / 16] * 16)


def test_batches_are_stratified_and_rows_do_not_depend_on_hosts_or_batch_size(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "store", 48 * 64)
    data = data_config("encoder", (DIFFUSION,))
    stream = TrainingStream([store], data, batch_size=16)
    for step in (0, 1, 7):
        batch = stream.batch(step)["main"]
        spec = sub_batch_spec(data, RowShape(48, 0, packed=False), 16)
        assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
            name: (array.shape, array.dtype) for name, array in spec.items()
        }
        masked = (batch["encoder_loss_weights"] > 0).sum(axis=1)
        # 48 values of k in 16 equal parts of three.
        assert sorted((masked - 1) // 3) == list(range(16))
        halves = [stream.batches_at(step * 16, 1, HostShard(host, 2))[0]["main"] for host in range(2)]
        for name, values in batch.items():
            assert np.array_equal(values, np.concatenate([half[name] for half in halves]))
    smaller = TrainingStream([store], data, batch_size=4)
    for name, values in stream.batch(1)["main"].items():
        assert np.array_equal(values, np.concatenate([smaller.batch(step)["main"][name] for step in range(4, 8)]))


def test_packed_documents_have_their_own_weights(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "store", 600, lengths=[10, 20, 5, 40, 25] * 6)
    data = dataclasses.replace(data_config("encoder", (DIFFUSION,)), example_mode="documents")
    batch = TrainingStream([store], data, batch_size=4).batch(0)["main"]
    checked = 0
    for row in range(4):
        segments = batch["encoder_segment_ids"][row]
        for number in range(1, segments.max() + 1):
            own = segments == number
            assert batch["encoder_loss_weights"][row][own].sum() == pytest.approx(own.sum(), rel=1e-5)
            checked += 1
    assert checked > 4


def test_a_mixture_with_another_objective_keeps_its_weights_of_one(tmp_path: Path) -> None:
    store = text_store(tmp_path / "store", ["the cat sat on the mat. " * 80], ["a dog ran. " * 40])
    data = data_config("encoder", (DIFFUSION, MaskedLM()))
    batch = TrainingStream([store], data, batch_size=8).batch(0)["main"]
    of_masked_lm = batch["denoiser_ids"] == 1
    assert set(np.unique(batch["encoder_loss_weights"][of_masked_lm])) == {0.0, 1.0}
    for objective in data.mixture:
        for held_out in heldout.objective_batches(store, data, data.sources[0], 8, objective, 2):
            assert held_out["main"]["encoder_loss_weights"].dtype == np.float32


def test_statistics_reject_another_law_of_the_number_of_masked_tokens() -> None:
    made = implementation(DIFFUSION)
    counts = noisy(numbered(2000, 30), DIFFUSION).scored_NxT
    assert counts is not None
    (fit,) = made.noise_fits([ObservedNoise(30, int(k)) for k in counts.sum(axis=1)], VOCABULARY)
    assert fit.p_value is not None and fit.p_value > 1e-3 and fit.forbidden == 0
    # A Bernoulli mask of uniform probability, which can be empty, and masks of 15 %.
    generator = np.random.default_rng(0)
    bernoulli = generator.binomial(30, generator.random(2000))
    (fit,) = made.noise_fits([ObservedNoise(30, int(k)) for k in bernoulli], VOCABULARY)
    assert fit.forbidden > 0 and fit.p_value == 0
    (fit,) = made.noise_fits([ObservedNoise(30, 4)] * 50 + [ObservedNoise(30, 5)] * 50, VOCABULARY)
    assert fit.p_value is not None and fit.p_value < 1e-6


def test_words_decide_the_number_and_the_key_the_set() -> None:
    tokens = numbered(2, 16)
    low, high = np.zeros(2, np.uint64), np.full(2, 2**64 - 1, np.uint64)
    one = denoise(tokens, keys(2), DIFFUSION, VOCABULARY, words_N=low).scored_NxT
    all_of_them = denoise(tokens, keys(2), DIFFUSION, VOCABULARY, words_N=high).scored_NxT
    assert one is not None and all_of_them is not None
    assert one.sum(axis=1).tolist() == [1, 1] and all_of_them.all()
    other = denoise(tokens, keys(2, seed=1), DIFFUSION, VOCABULARY, words_N=low).scored_NxT
    assert not np.array_equal(one, other)


def test_weights_of_an_objective_that_does_not_announce_them_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskedDiffusion, "fractional_loss_weights", False)
    with pytest.raises(ValueError, match="set fractional_loss_weights = True in MaskedDiffusion"):
        noisy(numbered(2, 8), DIFFUSION)


def test_a_single_stream_of_masked_diffusion_is_scored_by_the_bound(tmp_path: Path) -> None:
    store = text_store(tmp_path / "store", ["the cat sat on the mat. " * 80], ["a dog ran to the cat. " * 40])
    data = data_config("prefix_lm", (DIFFUSION,))
    assert has_bound(data) and not list(heldout.prefix_lm_batches(store, data, 4, 2))
    mixed = data_config("prefix_lm", (DIFFUSION, CausalLM()))
    assert not has_bound(mixed) and list(heldout.prefix_lm_batches(store, mixed, 4, 2))
    for window in heldout.bound_batches(store, data, 4, 2):
        rows = len(window.texts)
        total = np.zeros(rows)
        for batch in window.batches:
            features = {name: values[:rows] for name, values in batch["main"].items()}
            scored = features["decoder_loss_weights"] > 0
            # The stream reads the masked text one position later and attends to all of it; the first half is given.
            assert (features["decoder_input_tokens"][:, 1:][scored[:, :-1]] == store.vocabulary.mask_id).all()
            assert (features["decoder_causal_attention"] == 1).all() and not scored[:, :48].any()
            total += features["decoder_loss_weights"].sum(axis=1)
        assert total == pytest.approx(48.0, rel=1e-5)
