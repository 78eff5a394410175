"""Statistics equal slow direct counts. Fits accept our denoisers and reject other samplers."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.data_examples import data_config, numbered_store, pair_store, text_store
from scipy.stats import chisquare

from t5x_like.config import CausalLM, DataConfig, MaskedLM, Objective, PrefixLM, SpanCorruption, Supervised
from t5x_like.config.data import CorpusShareConfig
from t5x_like.config.objectives import BartDenoising, BlankInfilling, CausalMasking, FillInTheMiddle, Layout
from t5x_like.data.inspection.goodness_of_fit import Fit, combined, multinomial
from t5x_like.data.inspection.noise_distributions import (
    ObservedNoise,
    composition_distribution,
    composition_pair_distribution,
    expected_span_counts,
)
from t5x_like.data.inspection.row_statistics import NGRAM, RowStatistics, repeated_ngrams, row_statistics
from t5x_like.data.inspection.store_statistics import (
    document_lengths,
    repeated_documents,
    summarize_lengths,
    token_usage,
)
from t5x_like.data.objectives.registry import denoise, implementation
from t5x_like.data.stream import rng
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.stream.unpack import UnpackedExample
from t5x_like.data.tokenizers.vocabulary import EOS_ID, Vocabulary

VOCABULARY = Vocabulary(base_size=500, num_sentinels=64)


def sampled(objective: Objective, count: int = 400, length: int = 120, seed: int = 0) -> list[ObservedNoise]:
    """Return the observed noise of examples of `objective`."""
    tokens = 3 + rng.below(rng.bits(rng.fold_in(seed, np.arange(count)), 5, length), 490)
    made = denoise(tokens, rng.fold_in(seed + 1, np.arange(count)), objective, VOCABULARY)
    observed = []
    for row, (given, wanted) in enumerate(zip(made.input_lengths_N, made.target_lengths_N, strict=True)):
        scored = np.ones(wanted, np.bool_) if made.scored_NxT is None else made.scored_NxT[row, :wanted]
        example = UnpackedExample(0, made.inputs_NxI[row, :given], made.targets_NxT[row, :wanted], scored, made.aligned)
        observed.append(implementation(objective).observe(example, length, VOCABULARY, first=True))
    return observed


def least(fits: list[Fit]) -> float:
    assert fits
    return min(fit.p_value for fit in fits if fit.p_value is not None)


SPANS = SpanCorruption(name="R")
LONG = SpanCorruption(name="X", mean_noise_span_length=8.0, noise_density=0.5, mode="X")
PREFIX = PrefixLM(name="S")


@pytest.mark.parametrize(
    "objective",
    [
        SPANS,
        LONG,
        SpanCorruption(name="exact", t5_exact=True),
        SpanCorruption(name="one", mean_noise_span_length=64.0),
        PREFIX,
        PrefixLM(name="narrow", min_target_fraction=0.7, max_target_fraction=0.8),
        MaskedLM(),
        CausalMasking(),
        FillInTheMiddle(),
        BlankInfilling(),
    ],
    ids=lambda objective: objective.name,
)
def test_denoisers_follow_their_distributions(objective: Objective) -> None:
    for length in (7, 120):
        found = implementation(objective).noise_fits(sampled(objective, length=length), VOCABULARY)
        assert least(found) > 1e-3 and not any(fit.forbidden for fit in found)
        for fit in found:
            # The number of GLM's blanks is random.
            assert fit.expected.sum() == pytest.approx(
                fit.measured.sum(), rel=0.03 if objective.name == "glm" else 1e-9
            )


@pytest.mark.parametrize(
    ("objective", "truth"),
    [
        (SPANS, dataclasses.replace(SPANS, noise_density=0.2)),
        (SPANS, dataclasses.replace(SPANS, mean_noise_span_length=2.0)),
        (SPANS, dataclasses.replace(SPANS, t5_exact=True)),
        (LONG, dataclasses.replace(LONG, mean_noise_span_length=9.0)),
        (PREFIX, dataclasses.replace(PREFIX, max_target_fraction=0.6)),
        (PREFIX, dataclasses.replace(PREFIX, max_target_fraction=0.45)),
        (MaskedLM(), MaskedLM(replace_with_mask=0.85, replace_with_random=0.075)),
        (MaskedLM(), MaskedLM(mask_rate=0.2)),
        (CausalMasking(), CausalMasking(mean_spans=1.6)),
        (FillInTheMiddle(), FillInTheMiddle(fim_rate=0.65)),
        (BlankInfilling(), BlankInfilling(mean_span_length=2.5)),
        (BlankInfilling(), BlankInfilling(mask_rate=0.2)),
    ],
    ids=lambda objective: objective.kind,
)
def test_other_distributions_are_rejected(objective: Objective, truth: Objective) -> None:
    assert least(implementation(objective).noise_fits(sampled(truth), VOCABULARY)) < 1e-4


def balls_into_spans(noise: int, spans: int, key: int) -> tuple[int, ...]:
    """Simulate a wrong sampler: each token beyond one per span is added to a random span."""
    extra = rng.below(rng.bits(rng.fold_in(9, key), 1, noise - spans)[0], spans)
    return tuple((1 + np.bincount(extra, minlength=spans)).tolist())


def sorted_cuts_with_repeats(noise: int, spans: int, key: int) -> tuple[int, ...]:
    """Simulate a wrong sampler: cuts are drawn with replacement, so that spans can be empty."""
    cuts = np.sort(rng.below(rng.bits(rng.fold_in(9, key), 1, spans - 1)[0], noise + 1))
    return tuple(np.diff([0, *cuts.tolist(), noise]).tolist())


@pytest.mark.parametrize("sampler", [balls_into_spans, sorted_cuts_with_repeats])
def test_right_counts_in_wrong_spans_are_rejected(sampler: Callable[[int, int, int], tuple[int, ...]]) -> None:
    noise, spans = LONG.noise_counts(120)
    share = (noise - spans) / 120
    found = [ObservedNoise(120, noise, sampler(noise, spans, key), cut=key / 300 < share) for key in range(300)]
    assert least(implementation(LONG).noise_fits(found, VOCABULARY)) < 1e-6


def test_p_values_of_the_correct_distribution_are_uniform() -> None:
    """The spans of an example sum to its noise tokens. If they were treated as independent, they would fit too well."""
    found = np.array(
        [
            implementation(LONG).noise_fits(sampled(LONG, 60, seed=7 * seed), VOCABULARY)[0].p_value
            for seed in range(120)
        ]
    )
    assert 0.2 < (found < 0.3).mean() < 0.42 and 0.4 < (found < 0.5).mean() < 0.6
    assert 0.6 < (found < 0.7).mean() < 0.8


@pytest.mark.parametrize(("total", "parts"), [(1, 1), (5, 1), (6, 2), (7, 3), (9, 4), (5, 5)])
def test_composition_distributions_by_enumeration(total: int, parts: int) -> None:
    all_ = [parts_ for parts_ in itertools.product(range(1, total + 1), repeat=parts) if sum(parts_) == total]
    one = np.bincount([composition[0] for composition in all_], minlength=total + 1) / len(all_)
    np.testing.assert_allclose(composition_distribution(total, parts), one, atol=1e-12)
    if parts > 1:
        pairs = np.zeros((total + 1, total + 1))
        for composition in all_:
            pairs[composition[0], composition[-1]] += 1 / len(all_)
        np.testing.assert_allclose(composition_pair_distribution(total, parts), pairs, atol=1e-12)


@pytest.mark.parametrize("total", [1, 2, 5])
def test_expected_span_counts_of_lengths_drawn_up_to_a_total(total: int) -> None:
    probabilities = (0.0, 0.5, 0.2, 0.3)
    wanted = np.zeros(total + 1)
    for draws in itertools.product(range(1, 4), repeat=total):
        left = total
        for length in draws:
            wanted[min(length, left)] += np.prod([probabilities[draw] for draw in draws]) * (left > 0)
            left = max(left - length, 0)
    wanted[0] = 0.0
    np.testing.assert_allclose(expected_span_counts(probabilities, total), wanted, atol=1e-12)


@pytest.mark.parametrize("outcomes", [2, 3, 6, 41])
def test_p_value_of_independent_draws_is_pearsons(outcomes: int) -> None:
    generator = np.random.default_rng(outcomes)
    probabilities = generator.dirichlet(np.ones(outcomes))
    labels = tuple(map(str, range(outcomes)))
    for measured in (generator.multinomial(1000, probabilities), 1000 * probabilities, np.full(outcomes, 100.0)):
        fit = multinomial("draws", labels, np.asarray(measured, np.float64), probabilities)
        expected = chisquare(measured, np.sum(measured) * probabilities).pvalue
        assert fit.p_value == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_combined_p_value_corrects_for_the_number_of_tests() -> None:
    assert combined([0.5]) == pytest.approx(0.5) and combined([]) == combined([1.0]) == 1.0
    assert combined([0.01, 0.9]) == pytest.approx(1 - 0.99**2)


MIXTURES: dict[Layout, tuple[Objective, ...]] = {
    "encoder_decoder": (SPANS, LONG, PREFIX, BartDenoising(permute_sentences=False), BlankInfilling()),
    "prefix_lm": (
        SPANS,
        dataclasses.replace(PREFIX, mode="S"),
        CausalLM(),
        FillInTheMiddle(),
        CausalMasking(),
        BlankInfilling(name="glm", mean_span_length=2.0),
        MaskedLM(),
    ),
    "causal_lm": (CausalLM(),),
    "encoder": (MaskedLM(),),
}


def one_epoch(stream: TrainingStream) -> RowStatistics:
    rows = sum(stream.rows_per_epoch.values())
    assert rows % stream.batch_size == 0
    return row_statistics(stream, rows)


@pytest.mark.parametrize("examples", ["windows", "documents"])
@pytest.mark.parametrize("layout", list(MIXTURES))
def test_statistics_equal_slow_counts(tmp_path: Path, layout: Layout, examples: str) -> None:
    sizes = [40, 25, 3, 90, 12, 7, 61] * 12
    store = numbered_store(tmp_path / "s", sum(sizes), lengths=sizes)
    data = dataclasses.replace(data_config(layout, MIXTURES[layout]), example_mode=examples)
    stream = TrainingStream([store], data, 1)
    found = one_epoch(stream)
    positions: collections.Counter[str] = collections.Counter()
    filled: collections.Counter[str] = collections.Counter()
    scored = np.zeros(store.vocabulary.base_size, np.int64)
    loss: collections.Counter[int] = collections.Counter()
    targets = "encoder" if layout == "encoder" else "decoder"
    for row in range(found.rows):
        features = {name: values[0] for name, values in stream.get_row(row).items()}
        for stack in {"encoder", targets} if layout == "encoder_decoder" else {targets}:
            tokens = features[f"{stack}_target_tokens" if stack == targets else "encoder_input_tokens"].tolist()
            positions[stack] += len(tokens)
            filled[stack] += sum(token != 0 for token in tokens)
        names = np.broadcast_to(features["denoiser_ids"], features[f"{targets}_loss_weights"].shape)
        wanted = zip(features[f"{targets}_target_tokens"], features[f"{targets}_loss_weights"], names, strict=True)
        for token, weight, name in wanted:
            if weight:
                loss[int(name)] += 1
                if EOS_ID < token < store.vocabulary.base_size:
                    scored[token] += 1
    assert {fill.stack: (fill.positions, fill.filled) for fill in found.fill} == {
        stack: (positions[stack], filled[stack]) for stack in positions
    }
    assert found.fill_share == pytest.approx(sum(filled.values()) / sum(positions.values()))
    total = sum(loss.values())
    for index, part in enumerate(found.parts):
        assert part.measured[2] == pytest.approx(loss[index] / total)
    # The documents of this store have no EOS, so every scored token below the sentinels is a token of the text.
    exposure = sum(part.exposure for part in found.parts)
    assert exposure == pytest.approx(scored.sum() / sum(sizes), rel=0.02)
    assert all(not one.broken for one in found.objectives)
    assert sum(one.examples for one in found.objectives) >= found.rows


def test_measured_mixture_matches_the_expected_one(tmp_path: Path) -> None:
    stream = TrainingStream([numbered_store(tmp_path / "s", 60_000)], data_config(), 7)
    found = row_statistics(stream, 1400)
    assert found.rows == 1400
    for part in found.parts:
        # The cut of prefix LM is random, and so is its number of loss tokens.
        assert part.measured == pytest.approx(part.expected, rel=0.02 if part.objective.kind != "prefix_lm" else 0.08)
    assert sum(part.exposure for part in found.parts) == pytest.approx(
        sum(part.scored * part.expected[1] for part in found.parts), rel=0.01
    )
    assert least([fit for one in found.objectives for fit in one.fits]) > 1e-4
    assert found.coverage["python_docs"] == pytest.approx(1.0, abs=0.02)


def test_packed_corpora_and_pairs_are_counted_separately(tmp_path: Path) -> None:
    pairs, content = pair_store(tmp_path / "p", [(5 + i % 9, 3 + i % 4) for i in range(60)])
    text = numbered_store(tmp_path / "t", 500, base=pairs.vocabulary.base_size - 3, num_sentinels=4)
    own = data_config("encoder_decoder", (SpanCorruption(name="R", mean_noise_span_length=8.0),))
    corpora = (
        CorpusShareConfig(name="text", corpus=own.corpus, rate=3.0),
        CorpusShareConfig(name="pairs", corpus=own.corpus, mixture=(Supervised(),), example_mode="documents"),
    )
    data: DataConfig = dataclasses.replace(own, corpora=corpora)
    stream = TrainingStream([text, pairs], data, 4)
    found = row_statistics(stream, 400)
    by_name = {part.corpus: part for part in found.parts}
    assert by_name["text"].measured[0] == pytest.approx(0.75) == by_name["text"].expected[0]
    assert by_name["pairs"].measured == pytest.approx(by_name["pairs"].expected, rel=0.05)
    wanted = sum(len(targets) for _, targets in content)
    whole = sum(len(inputs) + len(targets) for inputs, targets in content)
    assert by_name["pairs"].scored == pytest.approx(wanted / whole, rel=0.05)
    assert by_name["pairs"].exposure == pytest.approx(wanted / whole, rel=0.05)
    assert found.coverage["pairs"] == pytest.approx(1.0)
    sizes = document_lengths(pairs.split("train"), 2)
    assert sizes["inputs"].tolist() == [len(inputs) for inputs, _ in content]
    assert sizes["targets"].tolist() == [len(targets) for _, targets in content]
    assert repeated_documents(pairs.split("train"), 2).repeated == 0


def test_repeated_ngrams_equal_a_count_with_sets() -> None:
    text = rng.below(rng.bits(rng.fold_in(3, np.arange(12)), 1, 60), 2) + 5
    rows = [(row // 2, tokens) for row, tokens in enumerate(text.astype(np.int32))]
    rows.append((9, np.array([5, 6], np.int32)))
    ngrams = [(row, tuple(tokens[i : i + NGRAM].tolist())) for row, tokens in rows for i in range(len(tokens) - 7)]
    where: dict[tuple[int, ...], set[int]] = {}
    for row, ngram in ngrams:
        where.setdefault(ngram, set()).add(row)
    wanted = sum(len(where[ngram]) > 1 for _, ngram in ngrams) / len(ngrams)
    assert 0.1 < wanted < 1 and repeated_ngrams(rows) == pytest.approx(wanted)
    assert repeated_ngrams([]) == repeated_ngrams([(0, text[0])]) == 0.0
    assert repeated_ngrams([(0, text[0]), (1, text[0])]) == 1.0


def test_store_statistics_of_a_known_store(tmp_path: Path) -> None:
    texts = ["one two  three", "again", "ünïcode\n", "again", "again", "x" * 300]
    store = text_store(tmp_path / "s", texts)
    split = store.split("train")
    sizes = document_lengths(split, 1)["documents"]
    assert sizes.tolist() == [len(text.encode()) for text in texts]
    for log in (False, True):
        found = summarize_lengths(sizes, bins=7, log=log)
        assert found.count == found.counts_H.sum() == len(texts)
        assert found.mean == pytest.approx(np.mean(sizes)) and found.quantiles[0] == 5 and found.quantiles[-1] == 300
        for low, high, count in zip(found.edges_H[:-1], found.edges_H[1:], found.counts_H, strict=True):
            assert count == sum(low <= size < high for size in sizes.tolist())
    repeats = repeated_documents(split, 1)
    assert (repeats.checked, repeats.repeated, repeats.most) == (6, 2, 3)
    part = repeated_documents(split, 1, max_tokens=len(texts[0]) + 8)
    assert (part.checked, part.repeated) == (2, 0)
    use = token_usage(store, "train")
    counts = collections.Counter("".join(texts).encode())
    assert use.tokens == sum(counts.values()) and use.unknown == 0 and use.byte_fallback is None
    assert use.frequent[0] == ("x", 300) and len(use.frequent) == min(len(counts), 40)
    assert use.unused == use.pieces - len(counts) == 256 - len(counts)
    words = sum(len(text.split()) for text in texts)
    assert use.words == (words, use.tokens) and use.tokens_per_word == pytest.approx(use.tokens / words)


def test_bytes_without_a_piece_are_counted(tmp_path: Path) -> None:
    from t5x_like.config import CorpusConfig, TokenizerConfig
    from t5x_like.data.store.prepare import prepare

    (tmp_path / "a.txt").write_text("plain words of a text, again and again.\n" * 200 + "\U0001f980")
    data = dataclasses.replace(
        data_config(),
        corpus=CorpusConfig(files=(str(tmp_path / "a.txt"),), validation_fraction=0.0),
        tokenizer=TokenizerConfig(vocab_size=280),
        store_dir=str(tmp_path / "stores"),
    )
    (store,) = prepare(data, report=lambda line: None, workers=1)
    use = token_usage(store, "train")
    assert use.byte_fallback == 4 and use.unknown == 0
    assert store.split("validation").num_documents == 0
