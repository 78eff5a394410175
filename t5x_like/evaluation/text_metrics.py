"""Metrics of predicted text, in per cent, with the settings and the text normalization of T5's published tasks.

Each is a function (targets, predictions) -> {name: value}, the interface of seqio's `metric_fns`. Targets and
predictions are in the same order, after the Task's `postprocess_fn`. The required libraries are in the extra `metrics`.

Intended differences from t5 0.9.4: ROUGE is the mean over the examples, not the median of a random bootstrap of the
mean; several references for BLEU are given per example, as for SQuAD; arguments are not modified.
"""

from __future__ import annotations

import collections
import functools
import itertools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.errors import ConfigError, ConfigProblem, DataError, SafetyError
from t5x_like.evaluation.agreement import macro_f1, pearson, spearman
from t5x_like.evaluation.calibration import calibration
from t5x_like.evaluation.word_labels import entity_scores
from t5x_like.utils.name_registry import Registry

MetricFn = Callable[[Sequence[Any], Sequence[Any]], Mapping[str, float]]

METRICS: Registry[MetricFn] = Registry("metric")
"""Metrics by the names of `t5x-like eval --metrics`."""


def register_metric(name: str) -> Callable[[MetricFn], MetricFn]:
    """Return a decorator that registers a metric: a function (targets, predictions) -> {name: value}."""
    return METRICS.decorator(name)


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_LABEL = -1


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SafetyError(
            f"a metric needs the package {name.partition('.')[0]} ({error}): `pip install t5x-like[metrics]`"
        ) from None


def _require_pairs(targets: Sequence[Any], predictions: Sequence[Any]) -> None:
    if len(targets) != len(predictions):
        raise DataError(f"found {len(targets)} targets and {len(predictions)} predictions, expected equal numbers")
    if not len(targets):
        raise DataError("found no predictions, expected at least one to score")


def references(target: Any) -> list[str]:
    """Return the references of one example: a text is one reference, a list of texts are several."""
    return [target] if isinstance(target, str) else [str(text) for text in target]


# Translation.


def bleu(targets: Sequence[Any], predictions: Sequence[str], *, tokenize: str = "intl") -> dict[str, float]:
    """Return corpus BLEU by sacreBLEU: exponential smoothing, case-sensitive, international tokenization (as in T5).

    Args:
      targets: For each example a text, or a list of references.
      predictions: A text for each example.
      tokenize: sacreBLEU's name of the tokenizer.
    """
    _require_pairs(targets, predictions)
    score = _library("sacrebleu").corpus_bleu(
        list(predictions),
        _streams(targets),
        smooth_method="exp",
        force=True,
        lowercase=False,
        tokenize=tokenize,
        use_effective_order=False,
    )
    return {"bleu": float(score.score)}


def bleu_of(tokenize: str) -> MetricFn:
    """Return `bleu` with another tokenization of sacreBLEU, such as 13a, the one of WMT.

    Raises:
      ConfigError: sacreBLEU has no such tokenization.
    """
    names = sorted(_library("sacrebleu.metrics").BLEU.TOKENIZERS)
    if tokenize not in names:
        raise ConfigError([ConfigProblem("--metrics", f"bleu:{tokenize}", f"one of {', '.join(names)} after bleu:")])
    return functools.partial(bleu, tokenize=tokenize)


def chrf(targets: Sequence[Any], predictions: Sequence[str]) -> dict[str, float]:
    """Return corpus chrF2 by sacreBLEU (Popovic 2015): character n-grams up to 6, no words, recall with weight 2."""
    _require_pairs(targets, predictions)
    return {"chrf": float(_library("sacrebleu").corpus_chrf(list(predictions), _streams(targets)).score)}


def signature(name: str, targets: Sequence[Any], predictions: Sequence[str]) -> str | None:
    """Return sacreBLEU's signature of `bleu` or `chrf` for these texts; None for other metrics."""
    name, _, tokenize = name.partition(":")
    if name not in ("bleu", "chrf"):
        return None
    library = _library("sacrebleu.metrics")
    metric = library.BLEU(tokenize=tokenize or "intl", smooth_method="exp") if name == "bleu" else library.CHRF()
    metric.corpus_score(list(predictions), _streams(targets))
    return str(metric.get_signature())


def _streams(targets: Sequence[Any]) -> list[list[str | None]]:
    """Return references in sacreBLEU's format: stream k has the k-th reference of each example, or None."""
    per_example = [references(target) for target in targets]
    return [
        [texts[number] if number < len(texts) else None for texts in per_example]
        for number in range(max(map(len, per_example)))
    ]


# Summaries.


def rouge(
    targets: Sequence[Any],
    predictions: Sequence[str],
    *,
    score_keys: Sequence[str] = ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    use_stemmer: bool = False,
) -> dict[str, float]:
    """Return the mean F-measure of rouge_score's ROUGE-N, -L and -Lsum.

    If an example has several references, the best one counts, separately for each key. ROUGE-Lsum treats lines as
    sentences. As in T5, " . " ends a sentence, because summaries of CNN/DailyMail are tokenized in this way.
    """
    _require_pairs(targets, predictions)
    keys = tuple(score_keys)
    scores_N = [
        _rouge_of(tuple(references(target)), prediction, keys, use_stemmer)
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {key: 100 * float(np.mean([scores[index] for scores in scores_N])) for index, key in enumerate(keys)}


@functools.lru_cache(maxsize=2**15)
def _rouge_of(targets: tuple[str, ...], prediction: str, keys: tuple[str, ...], use_stemmer: bool) -> tuple[float, ...]:
    """Return the scores of one example; cached, because a bootstrap needs them many times."""
    scores = _rouge_scorer(keys, use_stemmer).score_multi(
        [_sentences_on_lines(target) for target in targets], _sentences_on_lines(prediction)
    )
    return tuple(float(scores[key].fmeasure) for key in keys)


@functools.lru_cache(maxsize=8)
def _rouge_scorer(keys: tuple[str, ...], use_stemmer: bool) -> Any:
    return _library("rouge_score.rouge_scorer").RougeScorer(list(keys), use_stemmer=use_stemmer)


def _sentences_on_lines(summary: str) -> str:
    return summary.replace(" . ", " .\n")


# Questions.


def normalize_squad(answer: str) -> str:
    """Apply SQuAD's official normalization: lower case, no ASCII punctuation, no articles, single spaces."""
    return _without_articles("".join(c for c in answer.lower() if c not in string.punctuation))


def normalize_trivia_qa(answer: str) -> str:
    """Apply TriviaQA's official normalization: as SQuAD's, but marks become spaces, curly quotes and accents too."""
    marks = string.punctuation + "‘’´`_"
    return _without_articles("".join(" " if c in marks else c for c in answer.lower()))


def _without_articles(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


def squad(targets: Sequence[Any], predictions: Sequence[str]) -> dict[str, float]:
    """Return exact match and token F1 of SQuAD, each the best over an example's answers.

    Args:
      targets: Answers of each example; a text is a single answer.
    """
    return _answers(targets, predictions, normalize_squad)


def trivia_qa(targets: Sequence[Any], predictions: Sequence[str]) -> dict[str, float]:
    """Return exact match and token F1 of TriviaQA; see `squad`."""
    return _answers(targets, predictions, normalize_trivia_qa)


def _answers(targets: Sequence[Any], predictions: Sequence[str], normalize: Callable[[str], str]) -> dict[str, float]:
    _require_pairs(targets, predictions)
    exact, f1 = [], []
    for target, prediction in zip(targets, predictions, strict=True):
        output = normalize(prediction)
        answers = [normalize(answer) for answer in references(target)]
        if not answers:
            raise DataError("found an example without answers, expected at least one per question")
        exact.append(max(answer == output for answer in answers))
        f1.append(max(_token_f1(answer.split(), output.split()) for answer in answers))
    return {"em": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}


def _token_f1(target: Sequence[str], prediction: Sequence[str]) -> float:
    """Return the F1 of tokens as multisets; 0 if no token is shared, as in SQuAD's script."""
    shared = sum((collections.Counter(target) & collections.Counter(prediction)).values())
    return 2 * shared / (len(target) + len(prediction)) if shared else 0.0


# Classes.


def class_id(classes: Sequence[str], default: int = _NO_LABEL) -> Callable[..., int]:
    """Return a `postprocess_fn` that converts a label to its index, and any other text to `default`."""
    numbers = {label: number for number, label in enumerate(classes)}

    def postprocess(text: str, **_: Any) -> int:
        return numbers.get(text, default)

    return postprocess


def number_of(text: str, default: float = -1.0, **_: Any) -> float:
    """Convert a text to a number, or to `default`: a `postprocess_fn` for tasks such as STS-B."""
    try:
        return float(text)
    except ValueError:
        return default


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Return the share of predictions that equal their target, or one of the targets if there are several."""
    _require_pairs(targets, predictions)
    is_correct = [
        prediction in target if isinstance(target, list | tuple) else bool(np.array_equal(prediction, target))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {"accuracy": 100 * float(np.mean(is_correct))}


def sequence_accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Return `accuracy` of whole texts under T5's name."""
    return {"sequence_accuracy": accuracy(targets, predictions)["accuracy"]}


def f1_score_with_invalid(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Return the F1 of class 1 of classes 0 and 1. A prediction of any other number counts as the wrong class."""
    _require_pairs(targets, predictions)
    true, predicted = np.asarray(targets), np.array(predictions)
    valid = (predicted == 0) | (predicted == 1)
    predicted = np.where(valid, predicted, 1 - true)
    return {"f1": macro_f1(true.tolist(), predicted.tolist(), [1])}


def mean_multiclass_f1(num_classes: int) -> MetricFn:
    """Return a metric: the mean F1 of the classes 0 to `num_classes` - 1; other predictions belong to no class."""
    name = f"mean_{num_classes}class_f1"

    def metric(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
        return {name: _macro_f1(targets, predictions, range(num_classes))}

    return metric


def f1_macro(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Return the mean F1 of the labels that occur among the targets."""
    return {"f1_macro": _macro_f1(targets, predictions, sorted(set(targets)))}


def _macro_f1(targets: Sequence[Any], predictions: Sequence[Any], labels: Sequence[Any]) -> float:
    _require_pairs(targets, predictions)
    return macro_f1(targets, predictions, labels)


def matthews_corrcoef(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Return Matthews' correlation coefficient, times 100; 0 if one side is constant."""
    _require_pairs(targets, predictions)
    return {"matthews_corrcoef": 100 * float(_library("sklearn.metrics").matthews_corrcoef(targets, predictions))}


# Numbers.


def pearson_corrcoef(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """Return Pearson's correlation coefficient, times 100; nan if one side is constant."""
    _require_pairs(targets, predictions)
    return {"pearson_corrcoef": pearson(targets, predictions)}


def spearman_corrcoef(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """Return Spearman's rank correlation coefficient, times 100; nan if one side is constant."""
    _require_pairs(targets, predictions)
    return {"spearman_corrcoef": spearman(targets, predictions)}


# Spans.


def span_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Return the F1 of named entities over all examples, in mT5's format "PER: Ada Lovelace $$ LOC: London".

    A predicted span is correct if its tag and text equal those of a target span that is not matched yet. A part without
    exactly one colon is ignored.
    """
    _require_pairs(targets, predictions)
    num_shared = num_predicted = num_true = 0
    for target, prediction in zip(targets, predictions, strict=True):
        true, predicted = collections.Counter(_spans(target)), collections.Counter(_spans(prediction))
        num_shared += sum((true & predicted).values())
        num_predicted, num_true = num_predicted + sum(predicted.values()), num_true + sum(true.values())
    return {"span_f1": 100 * 2 * num_shared / (num_predicted + num_true) if num_shared else 0.0}


def _spans(text: str) -> list[tuple[str, str]]:
    parts = [part.split(":") for part in text.split(" $$ ")]
    return [(part[0].strip(), part[1].strip()) for part in parts if len(part) == 2]


def entity_f1(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Return precision, recall and F1 of the entities of word labels, as seqeval and conlleval count them.

    Args:
      targets, predictions: The labels of each sentence, as a list or as a text with spaces between them.
    """
    _require_pairs(targets, predictions)
    return entity_scores(*([_labels(sentence) for sentence in side] for side in (targets, predictions)))


def word_accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Return the share of words with the true label; a word without a prediction counts as wrong. See `entity_f1`."""
    _require_pairs(targets, predictions)
    pairs = [
        pair
        for target, prediction in zip(targets, predictions, strict=True)
        for pair in itertools.zip_longest(_labels(target), _labels(prediction)[: len(_labels(target))])
    ]
    return {"word_accuracy": 100 * float(np.mean([true == said for true, said in pairs]))}


def _labels(sentence: Any) -> list[str]:
    return sentence.split() if isinstance(sentence, str) else [str(label) for label in sentence]


for _name, _metric in {
    "bleu": bleu,
    "chrf": chrf,
    "rouge": rouge,
    "squad": squad,
    "trivia_qa": trivia_qa,
    "accuracy": accuracy,
    "f1": f1_score_with_invalid,
    "f1_macro": f1_macro,
    "matthews": matthews_corrcoef,
    "pearson": pearson_corrcoef,
    "spearman": spearman_corrcoef,
    "span_f1": span_f1,
    "entity_f1": entity_f1,
    "word_accuracy": word_accuracy,
    "calibration": calibration,
}.items():
    METRICS.register(_name, _metric)
