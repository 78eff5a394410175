"""Metrics of text against text, in per cent, with the settings and the text normalisation of T5's published tasks.

Each is a function (targets, predictions) -> {name: value}, as seqio's `metric_fns` want it: targets and predictions are
in the same order, after the Task's `postprocess_fn`. The libraries behind them come with the extra `metrics`.

Where this differs from t5 0.9.4, on purpose: ROUGE is the mean over the examples, not the middle of a random bootstrap
around it; several references of BLEU are given per example, as for SQuAD; nothing given is changed in place.
"""

from __future__ import annotations

import collections
import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.config.errors import DataError, RefusedError

MetricFn = Callable[[Sequence[Any], Sequence[Any]], Mapping[str, float]]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_LABEL = -1


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RefusedError(
            f"a metric needs the package {name.partition('.')[0]} ({error}): `pip install t5x-like[metrics]`"
        ) from None


def _require_pairs(targets: Sequence[Any], predictions: Sequence[Any]) -> None:
    if len(targets) != len(predictions):
        raise DataError(f"found {len(targets)} targets and {len(predictions)} predictions, expected as many of both")
    if not len(targets):
        raise DataError("found no predictions, expected at least one to score")


def references(target: Any) -> list[str]:
    """The references of one example: a text is one, a list of texts are several."""
    return [target] if isinstance(target, str) else [str(one) for one in target]


# Translation.


def bleu(targets: Sequence[Any], predictions: Sequence[str], *, tokenize: str = "intl") -> dict[str, float]:
    """Corpus BLEU by sacreBLEU: exponential smoothing, case matters, international tokenisation (T5's settings).

    Args:
      targets: A text, or several references, per example.
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


def chrf(targets: Sequence[Any], predictions: Sequence[str]) -> dict[str, float]:
    """Corpus chrF2 by sacreBLEU (Popovic 2015): characters up to 6-grams, no words, recall counts twice."""
    _require_pairs(targets, predictions)
    return {"chrf": float(_library("sacrebleu").corpus_chrf(list(predictions), _streams(targets)).score)}


def signature(name: str, targets: Sequence[Any], predictions: Sequence[str]) -> str | None:
    """sacreBLEU's own account of how `bleu` or `chrf` scores these; None for other metrics."""
    if name not in ("bleu", "chrf"):
        return None
    library = _library("sacrebleu.metrics")
    metric = library.BLEU(tokenize="intl", smooth_method="exp") if name == "bleu" else library.CHRF()
    metric.corpus_score(list(predictions), _streams(targets))
    return str(metric.get_signature())


def _streams(targets: Sequence[Any]) -> list[list[str | None]]:
    """References as sacreBLEU wants them: the first of each example, the second of each; None where there is none."""
    per_example = [references(target) for target in targets]
    return [
        [found[number] if number < len(found) else None for found in per_example]
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
    """Mean F-measure of rouge_score's ROUGE-N, -L and -Lsum.

    Of several references of an example the best counts, for each key by itself. ROUGE-Lsum takes lines for sentences.
    As in T5, " . " ends one: summaries of CNN/DailyMail are tokenised like that.
    """
    _require_pairs(targets, predictions)
    keys = tuple(score_keys)
    found = [
        _rouge_of(tuple(references(target)), prediction, keys, use_stemmer)
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {key: 100 * float(np.mean([scores[place] for scores in found])) for place, key in enumerate(keys)}


@functools.lru_cache(maxsize=2**15)
def _rouge_of(targets: tuple[str, ...], prediction: str, keys: tuple[str, ...], use_stemmer: bool) -> tuple[float, ...]:
    """Of one example, which a bootstrap asks for again and again."""
    scores = _rouge_scorer(keys, use_stemmer).score_multi(
        [_sentences_on_lines(one) for one in targets], _sentences_on_lines(prediction)
    )
    return tuple(float(scores[key].fmeasure) for key in keys)


@functools.lru_cache(maxsize=8)
def _rouge_scorer(keys: tuple[str, ...], use_stemmer: bool) -> Any:
    return _library("rouge_score.rouge_scorer").RougeScorer(list(keys), use_stemmer=use_stemmer)


def _sentences_on_lines(summary: str) -> str:
    return summary.replace(" . ", " .\n")


# Questions.


def normalize_squad(answer: str) -> str:
    """SQuAD's official normalisation: lower case, no ASCII punctuation, no articles, single spaces."""
    return _without_articles("".join(c for c in answer.lower() if c not in string.punctuation))


def normalize_trivia_qa(answer: str) -> str:
    """TriviaQA's official normalisation: as SQuAD's, but a space for each mark, curly quotes and accents too."""
    marks = string.punctuation + "‘’´`_"
    return _without_articles("".join(" " if c in marks else c for c in answer.lower()))


def _without_articles(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


def squad(targets: Sequence[Any], predictions: Sequence[str]) -> dict[str, float]:
    """Exact match and token F1 of SQuAD, each the best over an example's answers.

    Args:
      targets: The answers of each example; a text is one answer.
    """
    return _answers(targets, predictions, normalize_squad)


def trivia_qa(targets: Sequence[Any], predictions: Sequence[str]) -> dict[str, float]:
    """Exact match and token F1 of TriviaQA; see `squad`."""
    return _answers(targets, predictions, normalize_trivia_qa)


def _answers(targets: Sequence[Any], predictions: Sequence[str], normalize: Callable[[str], str]) -> dict[str, float]:
    _require_pairs(targets, predictions)
    exact, f1 = [], []
    for target, prediction in zip(targets, predictions, strict=True):
        said = normalize(prediction)
        answers = [normalize(answer) for answer in references(target)]
        if not answers:
            raise DataError("found an example without answers, expected at least one per question")
        exact.append(max(answer == said for answer in answers))
        f1.append(max(_token_f1(answer.split(), said.split()) for answer in answers))
    return {"em": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}


def _token_f1(target: Sequence[str], prediction: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of tokens as multisets; 0 where none is shared, as in SQuAD's script."""
    shared = sum((collections.Counter(target) & collections.Counter(prediction)).values())
    return 2 * shared / (len(target) + len(prediction)) if shared else 0.0


# Classes.


def class_id(classes: Sequence[str], default: int = _NO_LABEL) -> Callable[..., int]:
    """A `postprocess_fn` that turns a label's text into its number; any other text into `default`."""
    numbers = {label: number for number, label in enumerate(classes)}

    def postprocess(text: str, **_: Any) -> int:
        return numbers.get(text, default)

    return postprocess


def number_of(text: str, default: float = -1.0, **_: Any) -> float:
    """A `postprocess_fn` for tasks such as STS-B: the number that a text spells, or `default`."""
    try:
        return float(text)
    except ValueError:
        return default


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Share of predictions that equal their target (or one of them, where a target is a list)."""
    _require_pairs(targets, predictions)
    right = [
        prediction in target if isinstance(target, list | tuple) else bool(np.array_equal(prediction, target))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {"accuracy": 100 * float(np.mean(right))}


def sequence_accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """`accuracy` of whole texts, under T5's name for it."""
    return {"sequence_accuracy": accuracy(targets, predictions)["accuracy"]}


def f1_score_with_invalid(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """F1 of class 1 out of 0 and 1. A prediction of any other number counts as the wrong one of the two."""
    _require_pairs(targets, predictions)
    true, said = np.asarray(targets), np.array(predictions)
    valid = (said == 0) | (said == 1)
    said = np.where(valid, said, 1 - true)
    return {"f1": 100 * float(_library("sklearn.metrics").f1_score(true, said, zero_division=0))}


def mean_multiclass_f1(num_classes: int) -> MetricFn:
    """A metric: the mean of the F1 of the classes 0 to `num_classes` - 1; other predictions are of none of them."""
    name = f"mean_{num_classes}class_f1"

    def metric(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
        return {name: _macro_f1(targets, predictions, range(num_classes))}

    return metric


def f1_macro(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """The mean of the F1 of the labels that occur among the targets."""
    return {"f1_macro": _macro_f1(targets, predictions, sorted(set(targets)))}


def _macro_f1(targets: Sequence[Any], predictions: Sequence[Any], labels: Sequence[Any]) -> float:
    _require_pairs(targets, predictions)
    score = _library("sklearn.metrics").f1_score
    return 100 * float(score(targets, predictions, labels=list(labels), average="macro", zero_division=0))


def matthews_corrcoef(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Matthews' correlation of two classifications, times 100; 0 where one of them says the same always."""
    _require_pairs(targets, predictions)
    return {"matthews_corrcoef": 100 * float(_library("sklearn.metrics").matthews_corrcoef(targets, predictions))}


# Numbers.


def pearson_corrcoef(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """Pearson's correlation, times 100; nan where one side does not vary."""
    return {"pearson_corrcoef": _correlation("pearsonr", targets, predictions)}


def spearman_corrcoef(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """Spearman's correlation (of ranks, equal numbers sharing theirs), times 100; nan where one side does not vary."""
    return {"spearman_corrcoef": _correlation("spearmanr", targets, predictions)}


def _correlation(name: str, targets: Sequence[float], predictions: Sequence[float]) -> float:
    _require_pairs(targets, predictions)
    if len(set(targets)) < 2 or len(set(predictions)) < 2:
        return float("nan")
    return 100 * float(getattr(_library("scipy.stats"), name)(targets, predictions)[0])


# Spans.


def span_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """F1 of named entities over all examples, in mT5's form "PER: Ada Lovelace $$ LOC: London": a span is right if its
    tag and text are among the target's that are not matched yet. A part without exactly one colon is no span."""
    _require_pairs(targets, predictions)
    shared = said = true = 0
    for target, prediction in zip(targets, predictions, strict=True):
        wanted, found = collections.Counter(_spans(target)), collections.Counter(_spans(prediction))
        shared += sum((wanted & found).values())
        said, true = said + sum(found.values()), true + sum(wanted.values())
    return {"span_f1": 100 * 2 * shared / (said + true) if shared else 0.0}


def _spans(text: str) -> list[tuple[str, str]]:
    parts = [part.split(":") for part in text.split(" $$ ")]
    return [(part[0].strip(), part[1].strip()) for part in parts if len(part) == 2]


METRICS: dict[str, MetricFn] = {
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
}
"""By the names of `t5x-like eval --metrics`."""
