"""Metrics against values computed by hand, laws, and t5's own functions where these are installed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import ConfigError, DataError
from t5x_like.evaluation import bootstrap, metrics
from t5x_like.evaluation.predictions import score_file

WORDS = st.lists(st.sampled_from("the a cat dog sat ran on mat , . An".split()), max_size=8).map(" ".join)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6)
NEEDS = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}
TEXTS = ("bleu", "chrf", "rouge", "squad", "trivia_qa", "accuracy", "span_f1")


def require(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason="the extra metrics is not installed")


def test_squad_by_hand():
    """'The Cat!' is 'cat'; of 'black cat sat' (3 tokens) and 'cat' (1 token) one is shared: F1 = 2 / 4."""
    assert metrics.normalize_squad("  The  Cat's, an 'Apple'! ") == "cats apple"
    assert metrics.normalize_trivia_qa("The Cat’s_apple") == "cat s apple"
    found = metrics.squad([["The Cat!"], ["black cat sat", "dog"], ["no"], "plain"], ["cat", "a cat", "yes", "plain"])
    assert found == {"em": pytest.approx(50.0), "f1": pytest.approx(100 * (1 + 0.5 + 0 + 1) / 4)}


def test_bleu_and_chrf_by_hand():
    """'the cat sat on' has no 4-gram of 'the cat sat down on': counts 4/4, 2/3, 1/2, 0/1; brevity exp(1 - 5/4). The
    zero is smoothed to half of its denominator's inverse."""
    pytest.importorskip("sacrebleu", reason="the extra metrics is not installed")
    found = metrics.bleu(["the cat sat down on"], ["the cat sat on"])["bleu"]
    precisions = [4 / 4, 2 / 3, 1 / 2, 0.5 / 1]
    assert found == pytest.approx(100 * math.exp(1 - 5 / 4) * math.prod(precisions) ** 0.25)
    assert metrics.bleu([["no", "the cat sat on it"]], ["the cat sat on it"])["bleu"] == pytest.approx(100)
    uneven = [["the cat sat on it", "x y z"], ["a dog ran home today"]]
    assert metrics.bleu(uneven, ["the cat sat on it", "a dog ran home today"])["bleu"] == pytest.approx(100)
    # One character in common of "ab" and "ac": only 1- and 2-grams exist, with precision and recall 1/2 and 0.
    assert metrics.chrf(["ab"], ["ac"])["chrf"] == pytest.approx(25.0)
    assert metrics.signature("bleu", ["a b"], ["a c"]).startswith("nrefs:1|case:mixed|eff:no|tok:intl|smooth:exp")


def test_rouge_by_hand():
    """Two sentences swapped: every word is there, half of the longest common line, and each line by itself is whole."""
    pytest.importorskip("rouge_score", reason="the extra metrics is not installed")
    found = metrics.rouge(["one two . three four ."], ["three four . one two ."])
    assert found["rouge1"] == pytest.approx(100) and found["rougeL"] == pytest.approx(50)
    assert found["rougeLsum"] == pytest.approx(100), "' . ' ends a sentence, as in T5"
    assert found["rouge2"] == pytest.approx(100 * 2 / 3)
    several = metrics.rouge([["nothing", "one two"], "three"], ["one two", "three"], score_keys=("rouge1",))
    assert several == {"rouge1": pytest.approx(100)}


def test_classes_by_hand():
    sklearn = pytest.importorskip("sklearn.metrics", reason="the extra metrics is not installed")
    to_id = metrics.class_id(["no", "yes"])
    said = [to_id(text, example={}, is_target=False) for text in ("yes", "no", "perhaps", "yes")]
    assert said == [1, 0, -1, 1]
    # Against 1, 0, 1, 0 the invalid answer counts as 0: one hit of two said and two true.
    before = np.array(said)
    assert metrics.f1_score_with_invalid([1, 0, 1, 0], before) == {"f1": pytest.approx(50.0)}
    assert before.tolist() == said, "what was given is as it was"
    # F1 of the classes: 0: 2/3, 1: 2/3, 2: 0.
    assert metrics.mean_multiclass_f1(3)([0, 1, 2, 1], [0, 1, 0, -1]) == {
        "mean_3class_f1": pytest.approx(100 * (2 / 3 + 2 / 3 + 0) / 3)
    }
    assert metrics.f1_macro(["a", "b"], ["a", "c"]) == {"f1_macro": pytest.approx(50.0)}
    true, guess = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    by_hand = (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    assert metrics.matthews_corrcoef(true, guess)["matthews_corrcoef"] == pytest.approx(100 * by_hand)
    assert sklearn.matthews_corrcoef(true, guess) == pytest.approx(by_hand)


def test_numbers_by_hand():
    pytest.importorskip("scipy", reason="the extra metrics is not installed")
    assert metrics.number_of("3.5 ") == 3.5 and metrics.number_of("many") == -1.0
    true, said = [1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0]
    assert metrics.spearman_corrcoef(true, said)["spearman_corrcoef"] == pytest.approx(100)
    assert metrics.pearson_corrcoef(true, said)["pearson_corrcoef"] == pytest.approx(
        100 * np.corrcoef(true, said)[0, 1]
    )
    assert math.isnan(metrics.pearson_corrcoef([1.0, 1.0], [0.0, 2.0])["pearson_corrcoef"])


def test_spans_by_hand():
    """Two of three true spans are among the three that are said."""
    true = "PER: Ada Lovelace $$ LOC: London $$ PER: Ada Lovelace"
    said = "PER: Ada Lovelace $$ ORG: London $$ nothing $$ PER: Ada Lovelace"
    assert metrics.span_f1([true], [said]) == {"span_f1": pytest.approx(100 * 2 * 2 / 6)}
    assert metrics.span_f1([""], [""]) == {"span_f1": 0.0}


@pytest.mark.parametrize("name", TEXTS)
@settings(max_examples=15, deadline=None)
@given(pairs=PAIRS, seed=st.integers(0, 9))
def test_laws_of_metrics_of_text(name, pairs, seed):
    """In [0, 100]; the order of the examples does not matter."""
    require(name)
    metric = metrics.METRICS[name]
    targets, predictions = [target for target, _ in pairs], [prediction for _, prediction in pairs]
    found = metric(targets, predictions)
    assert all(-1e-6 <= value <= 100 + 1e-6 for value in found.values())
    order = np.random.default_rng(seed).permutation(len(pairs))
    again = metric([targets[i] for i in order], [predictions[i] for i in order])
    assert again == {key: pytest.approx(value) for key, value in found.items()}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_said_right_is_worth_all(name):
    require(name)
    texts = ["PER: an orange cat sat on the mat", "LOC: the dog ran . away from home ."]
    found = metrics.METRICS[name](texts, texts)
    assert list(found.values()) == pytest.approx([100.0] * len(found))


@settings(max_examples=20, deadline=None)
@given(answers=st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=1, max_size=4), more=WORDS)
def test_more_answers_never_hurt(answers, more):
    said = ["the cat"] * len(answers)
    before = metrics.squad(answers, said)
    after = metrics.squad([[*found, more] for found in answers], said)
    assert after["em"] >= before["em"] and after["f1"] >= before["f1"]


@pytest.mark.slow
def test_as_t5s_own_metrics():
    """On the same data: all but ROUGE to rounding; t5's ROUGE is the middle of a random bootstrap of 1000 draws."""
    theirs = pytest.importorskip("t5.evaluation.metrics", reason="t5 is not installed")
    rng = np.random.default_rng(0)
    vocabulary = 'the a cat dog sat ran on mat, quickly. London\'s (old) "house" an'.split()

    def text():
        return " ".join(rng.choice(vocabulary, size=rng.integers(1, 12)))

    targets, predictions = [text() for _ in range(60)], [text() for _ in range(60)]
    predictions[::3] = targets[::3]
    answers = [[target, text()] for target in targets]
    assert metrics.bleu(targets, predictions) == pytest.approx(theirs.bleu(targets, predictions))
    assert metrics.squad(answers, predictions) == pytest.approx(theirs.squad(answers, predictions))
    assert metrics.trivia_qa(answers, predictions) == pytest.approx(theirs.trivia_qa(answers, predictions))
    assert metrics.accuracy(targets, predictions) == pytest.approx(theirs.accuracy(targets, predictions))
    rouge = theirs.rouge(targets, predictions, score_keys=("rouge1", "rouge2", "rougeL", "rougeLsum"))
    assert metrics.rouge(targets, predictions) == pytest.approx(rouge, abs=1.0)
    one = theirs.rouge(targets[1:2], predictions[1:2])
    assert {key: metrics.rouge(targets[1:2], predictions[1:2])[key] for key in one} == pytest.approx(one)
    true, said = rng.integers(0, 2, 50), rng.integers(-1, 3, 50)
    assert metrics.f1_score_with_invalid(true, said) == pytest.approx(theirs.f1_score_with_invalid(true, said.copy()))
    three = rng.integers(0, 3, 50)
    assert metrics.mean_multiclass_f1(3)(three, said) == pytest.approx(theirs.mean_multiclass_f1(3)(three, said))
    x, y = rng.normal(size=30), rng.normal(size=30)
    assert metrics.pearson_corrcoef(x, y) == pytest.approx(theirs.pearson_corrcoef(x, y))
    assert metrics.spearman_corrcoef(x, y) == pytest.approx(theirs.spearman_corrcoef(x, y))


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(3).normal(size=400)
    low, high = bootstrap.interval(bootstrap.of_ratio(values, np.ones(400)))
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_draws_of_two_models_belong_together():
    """A model that is better by the same amount everywhere is so on each draw."""
    sums, weights = np.random.default_rng(0).random(50), np.ones(50)
    assert bootstrap.of_ratio(sums + 1, weights) - bootstrap.of_ratio(sums, weights) == pytest.approx(1.0)
    drawn = bootstrap.of_metric(lambda t, p: {"mean": float(np.mean(p)), "text": "no number"}, sums, sums, count=40)
    assert list(drawn) == ["mean"] and drawn["mean"] == pytest.approx(bootstrap.of_ratio(sums, weights, count=40))
    assert bootstrap.interval([1.0, float("nan")]) is None


def test_predictions_from_a_file(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(
        '{"answers": ["The cat"], "output": "cat"}\n\n{"answers": ["dog", "hound"], "output": "a hound!"}\n'
    )
    found = score_file(path, ["squad", "accuracy"], draws=50)
    assert found["num_examples"] == 2
    assert found["metrics"] == {"squad/em": 100.0, "squad/f1": 100.0, "accuracy/accuracy": 0.0}
    assert found["intervals"]["squad/em"] == (100.0, 100.0)
    with pytest.raises(ConfigError, match="found blue, expected names out of bleu, chrf"):
        score_file(path, ["blue"])
    with pytest.raises(DataError, match=r"predictions.jsonl:1: found the fields 'answers', 'output', expected 'guess'"):
        score_file(path, ["squad"], prediction_field="guess")
    path.write_text('{"target": "1.5", "prediction": "2"}\n{"target": "some", "prediction": "3"}\n')
    with pytest.raises(DataError, match="2: found 'some' in 'target', expected a number for the metric pearson"):
        score_file(path, ["pearson"])
