"""Objectives registered as seqio Tasks give the same examples through seqio."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

seqio = pytest.importorskip("seqio")

from helpers.seqio_examples import register, source  # noqa: E402

from t5x_like.config import CausalLM, DataConfig, MaskedLM, Objective, PrefixLM, SpanCorruption  # noqa: E402
from t5x_like.config.objectives import Layout  # noqa: E402
from t5x_like.data.objectives.examples import Examples  # noqa: E402
from t5x_like.data.objectives.registry import denoise, restore  # noqa: E402
from t5x_like.data.seqio_.register_mixtures import draw, register_mixture, vocabulary_of  # noqa: E402
from t5x_like.data.stream.feature_converters import convert  # noqa: E402
from t5x_like.data.tokenizers.vocabulary import Vocabulary  # noqa: E402
from t5x_like.errors import ConfigError, DataError  # noqa: E402

pytestmark = pytest.mark.slow

VOCABULARY = Vocabulary(base_size=460, num_sentinels=40)
SPANS = SpanCorruption(name="X_3_0.5", noise_density=0.5, mode="X", rate=2.0)
PREFIX = PrefixLM(name="S", mode="S")
LENGTHS = {"inputs": 40, "targets": 40}
DOCUMENTS = 200


def documents() -> list[np.ndarray]:
    from helpers.seqio_examples import examples

    return [example["targets"] for example in examples(0, DOCUMENTS)]


def config(layout: Layout = "encoder_decoder", mixture: tuple[Objective, ...] = (SPANS, PREFIX)) -> DataConfig:
    targets = 0 if layout == "encoder" else 40
    return DataConfig(layout=layout, mixture=mixture, inputs_length=40, targets_length=targets, seed=7)


@pytest.fixture(scope="module")
def corpus() -> str:
    return register("corpus_of_numbers", names=("targets",), count=DOCUMENTS)


@pytest.fixture(scope="module")
def mixture(corpus: str) -> str:
    register_mixture("two_denoisers", config(), task=corpus, vocabulary=VOCABULARY)
    return "two_denoisers"


def read(name: str, lengths: dict[str, int] = LENGTHS, seed: int = 5, shuffle: bool = False) -> list[dict[str, Any]]:
    task = seqio.get_mixture_or_task(name)
    return list(task.get_dataset(lengths, "train", shuffle=shuffle, seed=seed, num_epochs=1).as_numpy_iterator())


def window_of(example: dict[str, Any], objective: Objective) -> np.ndarray:
    return restore(example["inputs"], example["targets"], objective, VOCABULARY)


@pytest.mark.parametrize("objective", [SPANS, PREFIX], ids=lambda objective: objective.name)
def test_examples_equal_denoise_of_window_and_key(mixture: str, objective: Objective) -> None:
    found = read(f"{mixture}_{objective.name.replace('.', '_')}")
    assert len(found) > 3
    for example in found:
        key = np.array([example["window_keys"]], np.int64).view(np.uint64)
        window = window_of(example, objective)
        expected = denoise(window[None], key, objective, VOCABULARY)
        assert np.array_equal(example["inputs"], expected.inputs_NxI[0, : expected.input_lengths_N[0]])
        assert np.array_equal(example["targets"], expected.targets_NxT[0, : expected.target_lengths_N[0]])
        assert example["inputs"].dtype == np.int32
    assert len({int(example["window_keys"]) for example in found}) == len(found)


def test_each_document_is_read_once_by_one_task(mixture: str) -> None:
    """Concatenated windows are the text of the objective's documents, except for the incomplete last window."""
    total = sum(map(len, documents()))
    seen = 0
    for objective, (start, stop) in zip((SPANS, PREFIX), _shares(), strict=True):
        text = np.concatenate([tokens for tokens in documents() if start <= draw(tokens, 7) < stop])
        examples = read(f"two_denoisers_{objective.name.replace('.', '_')}")
        windows = [window_of(example, objective) for example in examples]
        found = np.concatenate(windows)
        assert np.array_equal(found, text[: len(found)]) and len(text) - len(found) < len(windows[0])
        seen += len(found)
    assert total - seen < 2 * 80


def _shares() -> tuple[tuple[float, float], tuple[float, float]]:
    task = seqio.TaskRegistry.get("two_denoisers_X_3_0_5")
    edge = next(step.keywords["stop"] for step in task.preprocessors if "stop" in getattr(step, "keywords", {}))
    longest = [objective.raw_window_length("encoder_decoder", 40, 40) for objective in (SPANS, PREFIX)]
    assert edge == pytest.approx(2 * longest[0] / (2 * longest[0] + longest[1])), "twice the examples"
    return (0.0, edge), (edge, 1.0)


def test_equal_seeds_repeat_and_other_seeds_differ(mixture: str) -> None:
    one, again, other = (read(f"{mixture}_S", seed=seed, shuffle=True) for seed in (5, 5, 6))
    for name in ("inputs", "targets"):
        assert all(np.array_equal(a[name], b[name]) for a, b in zip(one, again, strict=True))
    keys = [{int(example["window_keys"]) for example in found} for found in (one, other)]
    assert not keys[0] & keys[1]


def test_tasks_of_a_mixture_have_different_keys(mixture: str) -> None:
    """seqio gives each Task of a Mixture the same seed."""
    keys = [{int(e["window_keys"]) for e in read(f"{mixture}_{name}")} for name in ("X_3_0_5", "S")]
    assert not keys[0] & keys[1]


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm"])
def test_seqios_converter_gives_our_features(mixture: str, layout: Layout) -> None:
    converter = {"encoder_decoder": seqio.EncDecFeatureConverter, "prefix_lm": seqio.PrefixLMFeatureConverter}[layout]
    rows = seqio.get_dataset(mixture, LENGTHS, converter(pack=False), "train", seed=5, num_epochs=1)
    compared = 0
    for row, example in zip(rows.as_numpy_iterator(), read(mixture), strict=True):
        lengths = (np.array([len(example[name])]) for name in ("inputs", "targets"))
        converted = convert(Examples(example["inputs"][None], example["targets"][None], *lengths), layout, 40, 40)
        assert set(converted) == set(row) and all(np.array_equal(converted[name][0], row[name]) for name in row)
        compared += 1
    assert compared > 5


def test_nothing_is_trimmed_and_rows_are_full(mixture: str) -> None:
    """The lengths include the mode token and EOS; shorter lengths are refused."""
    for example in read(f"{mixture}_X_3_0_5"):
        assert example["inputs"][-1] == 1 == example["targets"][-1]
        assert example["inputs"][0] == VOCABULARY.mode_id("X")
        assert max(len(example["inputs"]), len(example["targets"])) in (39, 40)
    with pytest.raises(DataError, match="found 39 for inputs, expected at least 40"):
        read(mixture, {"inputs": 39, "targets": 40})


@pytest.mark.parametrize(
    ("objective", "layout", "converter", "lengths"),
    [
        (CausalLM(), "causal_lm", lambda: seqio.LMFeatureConverter(pack=False), {"targets": 80}),
        (
            MaskedLM(replace_with_mask=1.0, replace_with_random=0.0),
            "encoder",
            lambda: seqio.EncoderFeatureConverter(mask_id=VOCABULARY.mask_id, pack=False),
            {"inputs": 40, "targets": 40},
        ),
    ],
    ids=["causal_lm", "masked_lm"],
)
def test_other_layouts(
    corpus: str, objective: Objective, layout: Layout, converter: Any, lengths: dict[str, int]
) -> None:
    name = f"alone_{objective.name}"
    register_mixture(name, config(layout, (objective,)), task=corpus, vocabulary=VOCABULARY)
    rows = list(seqio.get_dataset(name, lengths, converter(), "train", seed=5, num_epochs=1).as_numpy_iterator())
    stack = "encoder" if layout == "encoder" else "decoder"
    targets = np.stack([row[f"{stack}_target_tokens"] for row in rows])
    weights = np.stack([row[f"{stack}_loss_weights"] for row in rows])
    assert (targets > 0).all(), "windows fill their rows"
    assert weights.sum() == (len(rows) * 6 if layout == "encoder" else targets.size)


def test_objectives_that_seqio_cannot_express_are_refused(corpus: str) -> None:
    many = dataclasses.replace(SPANS, mean_noise_span_length=1.0)
    with pytest.raises(ConfigError, match="19 sentinels in windows of 38, expected at most 10, as the vocabulary has"):
        few = Vocabulary(base_size=490, num_sentinels=10)
        register_mixture("too_many", config(mixture=(many,)), task=corpus, vocabulary=few)
    with pytest.raises(ConfigError, match="whole words"):
        whole = MaskedLM(masking_unit="word")
        register_mixture("words", config("encoder", (whole,)), task=corpus, vocabulary=VOCABULARY)
    assert not [name for name in seqio.TaskRegistry.names() if name.startswith(("too_many", "words"))]


def test_vocabulary_of_seqio_vocabularies() -> None:
    found = vocabulary_of(seqio.ByteVocabulary(extra_ids=100))
    assert found == Vocabulary(base_size=259, num_sentinels=100)
    assert found.first_sentinel_id == seqio.ByteVocabulary(extra_ids=100).vocab_size - 1
    assert source(0, 1, ("targets",)) is not None


def test_registered_mixture_read_live_resumes_exactly(mixture: str) -> None:
    """Its Python functions are pure and declared stateless to tf.data."""
    from t5x_like.config import SeqioConfig
    from t5x_like.data.seqio_.live_dataset import LiveBatches

    data = dataclasses.replace(config(), mixture=(), seqio=SeqioConfig(mixture_or_task=mixture))
    batches = LiveBatches(data, 2)
    steps = batches.identity["preprocessors"][f"{mixture}_S"]
    assert steps[-1][1]["objective"]["max_target_fraction"] == PREFIX.max_target_fraction
    next(batches)
    files = batches.state_files()
    following = [next(batches)["main"] for _ in range(3)]
    again = LiveBatches(data, 2)
    again.restore(files)
    for features in following:
        found = next(again)["main"]
        assert all(np.array_equal(found[name], values) for name, values in features.items())
