"""Metrics against values computed by hand, general properties, and t5's own functions where they are installed."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.errors import ConfigError, DataError
from t5x_like.evaluation import bootstrap, text_metrics
from t5x_like.evaluation.score_predictions import score_file

WORDS = st.lists(st.sampled_from("the a cat dog sat ran on mat , . An".split()), max_size=8).map(" ".join)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6)
NEEDS = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}
TEXTS = ("bleu", "chrf", "rouge", "squad", "trivia_qa", "accuracy", "span_f1")


def require(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason="the extra metrics is not installed")


def test_squad_equals_values_by_hand():
    """'The Cat!' is 'cat'; of 'black cat sat' (3 tokens) and 'cat' (1 token) one is shared: F1 = 2 / 4."""
    assert text_metrics.normalize_squad("  The  Cat's, an 'Apple'! ") == "cats apple"
    assert text_metrics.normalize_trivia_qa("The Cat’s_apple") == "cat s apple"
    result = text_metrics.squad(
        [["The Cat!"], ["black cat sat", "dog"], ["no"], "plain"], ["cat", "a cat", "yes", "plain"]
    )
    assert result == {"em": pytest.approx(50.0), "f1": pytest.approx(100 * (1 + 0.5 + 0 + 1) / 4)}


def test_bleu_and_chrf_equal_values_by_hand():
    """'the cat sat on' has no 4-gram of 'the cat sat down on': counts 4/4, 2/3, 1/2, 0/1; brevity exp(1 - 5/4). The
    zero is smoothed to half of the inverse of its denominator."""
    pytest.importorskip("sacrebleu", reason="the extra metrics is not installed")
    result = text_metrics.bleu(["the cat sat down on"], ["the cat sat on"])["bleu"]
    precisions = [4 / 4, 2 / 3, 1 / 2, 0.5 / 1]
    assert result == pytest.approx(100 * math.exp(1 - 5 / 4) * math.prod(precisions) ** 0.25)
    assert text_metrics.bleu([["no", "the cat sat on it"]], ["the cat sat on it"])["bleu"] == pytest.approx(100)
    uneven = [["the cat sat on it", "x y z"], ["a dog ran home today"]]
    assert text_metrics.bleu(uneven, ["the cat sat on it", "a dog ran home today"])["bleu"] == pytest.approx(100)
    # One character in common of "ab" and "ac": only 1- and 2-grams exist, with precision and recall 1/2 and 0.
    assert text_metrics.chrf(["ab"], ["ac"])["chrf"] == pytest.approx(25.0)
    assert text_metrics.signature("bleu", ["a b"], ["a c"]).startswith("nrefs:1|case:mixed|eff:no|tok:intl|smooth:exp")


def test_rouge_equals_values_by_hand():
    """Two swapped sentences: all words match, half of the longest common subsequence, and each line by itself."""
    pytest.importorskip("rouge_score", reason="the extra metrics is not installed")
    result = text_metrics.rouge(["one two . three four ."], ["three four . one two ."])
    assert result["rouge1"] == pytest.approx(100) and result["rougeL"] == pytest.approx(50)
    assert result["rougeLsum"] == pytest.approx(100), "' . ' ends a sentence, as in T5"
    assert result["rouge2"] == pytest.approx(100 * 2 / 3)
    several = text_metrics.rouge([["nothing", "one two"], "three"], ["one two", "three"], score_keys=("rouge1",))
    assert several == {"rouge1": pytest.approx(100)}


def test_class_metrics_equal_values_by_hand():
    sklearn = pytest.importorskip("sklearn.metrics", reason="the extra metrics is not installed")
    to_id = text_metrics.class_id(["no", "yes"])
    predicted = [to_id(text, example={}, is_target=False) for text in ("yes", "no", "perhaps", "yes")]
    assert predicted == [1, 0, -1, 1]
    # With targets 1, 0, 1, 0 the invalid prediction counts as 0: one hit, two predicted and two true.
    before = np.array(predicted)
    assert text_metrics.f1_score_with_invalid([1, 0, 1, 0], before) == {"f1": pytest.approx(50.0)}
    assert before.tolist() == predicted, "the argument must not be modified"
    # F1 of the classes: 0: 2/3, 1: 2/3, 2: 0.
    assert text_metrics.mean_multiclass_f1(3)([0, 1, 2, 1], [0, 1, 0, -1]) == {
        "mean_3class_f1": pytest.approx(100 * (2 / 3 + 2 / 3 + 0) / 3)
    }
    assert text_metrics.f1_macro(["a", "b"], ["a", "c"]) == {"f1_macro": pytest.approx(50.0)}
    true, guess = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    by_hand = (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    assert text_metrics.matthews_corrcoef(true, guess)["matthews_corrcoef"] == pytest.approx(100 * by_hand)
    assert sklearn.matthews_corrcoef(true, guess) == pytest.approx(by_hand)


def test_correlations_equal_values_by_hand():
    pytest.importorskip("scipy", reason="the extra metrics is not installed")
    assert text_metrics.number_of("3.5 ") == 3.5 and text_metrics.number_of("many") == -1.0
    true, predicted = [1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0]
    assert text_metrics.spearman_corrcoef(true, predicted)["spearman_corrcoef"] == pytest.approx(100)
    assert text_metrics.pearson_corrcoef(true, predicted)["pearson_corrcoef"] == pytest.approx(
        100 * np.corrcoef(true, predicted)[0, 1]
    )
    assert math.isnan(text_metrics.pearson_corrcoef([1.0, 1.0], [0.0, 2.0])["pearson_corrcoef"])


def test_sequence_accuracy_is_the_share_of_equal_texts():
    found = text_metrics.sequence_accuracy(["a b", ["c", "d"], "e"], ["a b", "d", "E"])
    assert found == {"sequence_accuracy": pytest.approx(100 * 2 / 3)}


def test_span_f1_equals_values_by_hand():
    """Two of three true spans are among the three predicted ones."""
    true = "PER: Ada Lovelace $$ LOC: London $$ PER: Ada Lovelace"
    predicted = "PER: Ada Lovelace $$ ORG: London $$ nothing $$ PER: Ada Lovelace"
    assert text_metrics.span_f1([true], [predicted]) == {"span_f1": pytest.approx(100 * 2 * 2 / 6)}
    assert text_metrics.span_f1([""], [""]) == {"span_f1": 0.0}


@pytest.mark.parametrize("name", TEXTS)
@settings(max_examples=15, deadline=None)
@given(pairs=PAIRS, seed=st.integers(0, 9))
def test_text_metrics_are_bounded_and_independent_of_the_order(name, pairs, seed):
    """Values are in [0, 100], and independent of the order of the examples."""
    require(name)
    metric = text_metrics.METRICS[name]
    targets, predictions = [target for target, _ in pairs], [prediction for _, prediction in pairs]
    result = metric(targets, predictions)
    assert all(-1e-6 <= value <= 100 + 1e-6 for value in result.values())
    order = np.random.default_rng(seed).permutation(len(pairs))
    again = metric([targets[i] for i in order], [predictions[i] for i in order])
    assert again == {key: pytest.approx(value) for key, value in result.items()}


@pytest.mark.parametrize("name", TEXTS)
def test_equal_texts_score_100(name):
    require(name)
    texts = ["PER: an orange cat sat on the mat", "LOC: the dog ran . away from home ."]
    result = text_metrics.METRICS[name](texts, texts)
    assert list(result.values()) == pytest.approx([100.0] * len(result))


@settings(max_examples=20, deadline=None)
@given(answers=st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=1, max_size=4), more=WORDS)
def test_additional_answers_never_lower_the_score(answers, more):
    predicted = ["the cat"] * len(answers)
    before = text_metrics.squad(answers, predicted)
    after = text_metrics.squad([[*result, more] for result in answers], predicted)
    assert after["em"] >= before["em"] and after["f1"] >= before["f1"]


@pytest.mark.external
def test_metrics_equal_those_of_t5():
    """All but ROUGE are equal up to rounding; t5's ROUGE is the median of a random bootstrap of 1000 draws."""
    t5_metrics = pytest.importorskip("t5.evaluation.metrics", reason="t5 is not installed")
    rng = np.random.default_rng(0)
    vocabulary = 'the a cat dog sat ran on mat, quickly. London\'s (old) "house" an'.split()

    def text():
        return " ".join(rng.choice(vocabulary, size=rng.integers(1, 12)))

    targets, predictions = [text() for _ in range(60)], [text() for _ in range(60)]
    predictions[::3] = targets[::3]
    answers = [[target, text()] for target in targets]
    assert text_metrics.bleu(targets, predictions) == pytest.approx(t5_metrics.bleu(targets, predictions))
    assert text_metrics.squad(answers, predictions) == pytest.approx(t5_metrics.squad(answers, predictions))
    assert text_metrics.trivia_qa(answers, predictions) == pytest.approx(t5_metrics.trivia_qa(answers, predictions))
    assert text_metrics.accuracy(targets, predictions) == pytest.approx(t5_metrics.accuracy(targets, predictions))
    rouge = t5_metrics.rouge(targets, predictions, score_keys=("rouge1", "rouge2", "rougeL", "rougeLsum"))
    assert text_metrics.rouge(targets, predictions) == pytest.approx(rouge, abs=1.0)
    one = t5_metrics.rouge(targets[1:2], predictions[1:2])
    assert {key: text_metrics.rouge(targets[1:2], predictions[1:2])[key] for key in one} == pytest.approx(one)
    true, predicted = rng.integers(0, 2, 50), rng.integers(-1, 3, 50)
    assert text_metrics.f1_score_with_invalid(true, predicted) == pytest.approx(
        t5_metrics.f1_score_with_invalid(true, predicted.copy())
    )
    three = rng.integers(0, 3, 50)
    assert text_metrics.mean_multiclass_f1(3)(three, predicted) == pytest.approx(
        t5_metrics.mean_multiclass_f1(3)(three, predicted)
    )
    x, y = rng.normal(size=30), rng.normal(size=30)
    assert text_metrics.pearson_corrcoef(x, y) == pytest.approx(t5_metrics.pearson_corrcoef(x, y))
    assert text_metrics.spearman_corrcoef(x, y) == pytest.approx(t5_metrics.spearman_corrcoef(x, y))


def test_interval_of_a_mean_agrees_with_its_standard_error():
    values = np.random.default_rng(3).normal(size=400)
    low, high = bootstrap.interval(bootstrap.ratio_draws(values, np.ones(400)))
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_draws_of_two_models_are_paired():
    """A constant difference of two models is the same on each draw."""
    sums, weights = np.random.default_rng(0).random(50), np.ones(50)
    assert bootstrap.ratio_draws(sums + 1, weights) - bootstrap.ratio_draws(sums, weights) == pytest.approx(1.0)
    drawn = bootstrap.metric_draws(lambda t, p: {"mean": float(np.mean(p)), "text": "no number"}, sums, sums, count=40)
    assert list(drawn) == ["mean"] and drawn["mean"] == pytest.approx(bootstrap.ratio_draws(sums, weights, count=40))
    assert bootstrap.interval([1.0, float("nan")]) is None


def test_predictions_of_a_file_are_scored(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(
        '{"answers": ["The cat"], "output": "cat"}\n\n{"answers": ["dog", "hound"], "output": "a hound!"}\n'
    )
    result = score_file(path, ["squad", "accuracy"], draws=50)
    assert result["num_examples"] == 2
    assert result["metrics"] == {"squad/em": 100.0, "squad/f1": 100.0, "accuracy/accuracy": 0.0}
    assert result["intervals"]["squad/em"] == (100.0, 100.0)
    with pytest.raises(ConfigError, match="found blue, expected names from bleu, chrf"):
        score_file(path, ["blue"])
    with pytest.raises(ConfigError, match="found acuracy, .*separated by commas; perhaps accuracy"):
        score_file(path, ["acuracy"])
    with pytest.raises(DataError, match=r"predictions.jsonl:1: found the fields 'answers', 'output', expected 'guess'"):
        score_file(path, ["squad"], prediction_field="guess")
    path.write_text('{"target": "1.5", "prediction": "2"}\n{"target": "some", "prediction": "3"}\n')
    with pytest.raises(DataError, match="2: found 'some' in 'target', expected a number for the metric pearson"):
        score_file(path, ["pearson"])


def test_a_metric_that_takes_one_text_says_which_target_is_a_list(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"answers": "a", "output": "a"}\n{"answers": ["b", "c"], "output": "b"}\n')
    monkeypatch.setitem(text_metrics.METRICS._entries, "words", lambda targets, _: {"words": len(targets[1].split())})
    with pytest.raises(
        DataError, match=r"words cannot score .*the target in \S+answers.jsonl:2 is a list: name a field"
    ):
        score_file(path, ["words"])
    path.write_text('{"answers": "a", "output": "a"}\n{"answers": 3, "output": "b"}\n')
    with pytest.raises(DataError, match=r"'int' object has no attribute 'split'$"):
        score_file(path, ["words"])


def test_tokenizations_of_sacrebleu_by_name(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"target": "a small-scale test, here", "prediction": "a small test here now"}))
    result = score_file(path, ["bleu", "bleu:char"], draws=1)
    assert result["metrics"]["bleu/bleu"] != result["metrics"]["bleu:char/bleu"]
    assert "tok:char" in result["signatures"]["bleu:char"] and "tok:intl" in result["signatures"]["bleu"]
    with pytest.raises(ConfigError, match="found bleu:13b, expected one of 13a, char"):
        score_file(path, ["bleu:13b"])
