"""Metrics of a Task by seqio's Evaluator with known model answers: order, postprocessing, padding."""

from __future__ import annotations

import functools

import numpy as np
import pytest

seqio = pytest.importorskip("seqio")
import tensorflow as tf  # noqa: E402

from t5x_like.config import PrefixLM  # noqa: E402
from t5x_like.config.data import DataConfig  # noqa: E402
from t5x_like.config.seqio_task import EvaluationTask  # noqa: E402
from t5x_like.data.seqio_.evaluator import ModelAnswer, TaskEvaluator, ended  # noqa: E402
from t5x_like.data.tokenizers.bytes import ByteTokenizer  # noqa: E402
from t5x_like.errors import DataError  # noqa: E402
from t5x_like.evaluation import text_metrics  # noqa: E402

pytestmark = pytest.mark.slow
VOCABULARY = seqio.ByteVocabulary(extra_ids=8)
TOKENIZER = ByteTokenizer(8)
QUESTIONS = ["one two", "three", "four five six", "three", "a very long question that is cut"]
LABELS = ["yes", "no", "no", "no", "yes"]


def dataset(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices({"inputs": QUESTIONS, "targets": LABELS, "number": list(range(5))})


def score_metric(targets, scores):
    return {"weighted": float(np.sum(np.asarray(scores) * (np.arange(len(targets)) + 1)))}


def aux_metric(targets, predictions, aux_values):
    return {"said_by": aux_values["scores"][predictions.index(1)], "count": seqio.metrics.Scalar(len(targets))}


def label_of(text, example=None, is_target=False):
    """Return the label of targets or predictions, which come with their example."""
    assert example["inputs_pretokenized"].decode() == QUESTIONS[int(example["number"])]
    del is_target
    return text_metrics.class_id(["no", "yes"])(text)


@functools.cache
def registered(
    name="labels", fns=(text_metrics.accuracy, score_metric, aux_metric), splits=("validation",), loose=False
):
    feature = seqio.Feature(VOCABULARY, add_eos=True)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset, splits=splits),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        postprocess_fn=None if loose else label_of,
        output_features={"inputs": feature, "targets": feature},
        metric_fns=list(fns),
    )
    return name


def data(layout):
    return DataConfig(layout=layout, mixture=(PrefixLM(name="S"),), inputs_length=16, targets_length=6)


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm", "causal_lm"])
def test_answers_are_compared_with_their_own_targets(layout):
    """The model answers with the correct label, in upper case for the third example, and with 'y' for the fifth."""
    answers = ["yes", "no", "NO", "no", "y"]
    asked = []

    def answer(task, what, examples):
        asked.append((task, what))
        texts = [TOKENIZER.decode(example.inputs) for example in examples]
        assert texts == [question[:15] for question in QUESTIONS], "15 tokens and EOS fit"
        assert [TOKENIZER.decode(example.targets) for example in examples] == LABELS
        assert all(example.inputs[-1] == example.targets[-1] == 1 for example in examples)
        return [ModelAnswer(ended(TOKENIZER.encode(text), 6), -float(index)) for index, text in enumerate(answers)]

    (result,) = TaskEvaluator(EvaluationTask(mixture_or_task=registered()), data(layout)).evaluate(answer)
    assert asked == [("labels", "predict"), ("labels", "score"), ("labels", "predict_with_aux")]
    assert result.metrics == {
        "accuracy": pytest.approx(60.0),
        "weighted": -(0 * 1 + 1 * 2 + 2 * 3 + 3 * 4 + 4 * 5),
        "said_by": 0.0,
        "count": 5.0,
    }
    assert [row["target"] for row in result.rows] == [1, 0, 0, 0, 1]
    assert [row["prediction"] for row in result.rows] == [1, 0, -1, 0, -1]
    assert [row["output"] for row in result.rows] == answers
    assert [row["score"] for row in result.rows] == [0, -1, -2, -3, -4]
    assert {fn.__name__ for fn, _, _ in result.functions} == {"accuracy", "score_metric"}


def test_mixture_evaluates_its_tasks_and_reports_those_left_out():
    registered(), registered("no_metrics", fns=()), registered("other_split", splits=("test",))
    if "mixed" not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add("mixed", [("labels", 1), ("no_metrics", 2), ("other_split", 1)])
    evaluator = TaskEvaluator(EvaluationTask(mixture_or_task="mixed", num_examples=2), data("encoder_decoder"))
    assert evaluator.tasks == ["labels"]
    assert sorted(evaluator.left_out) == ["no_metrics: no metric functions", "other_split: no split 'validation'"]
    results = evaluator.evaluate(
        lambda *of: [ModelAnswer((TOKENIZER.encode("yes")[0], 1)), ModelAnswer(tuple(TOKENIZER.encode("yes")))]
    )
    assert [len(result.rows) for result in results] == [2]
    with pytest.raises(DataError, match="found nothing to score .other_split: no split 'validation'"):
        TaskEvaluator(EvaluationTask(mixture_or_task=registered("other_split", splits=("test",))), data("causal_lm"))


def test_unsupported_tasks_are_refused():
    name = registered()
    with pytest.raises(DataError, match="expected a decoder"):
        TaskEvaluator(
            EvaluationTask(mixture_or_task=name),
            DataConfig(layout="encoder", mixture=(PrefixLM(name="S"),), inputs_length=8, targets_length=0),
        )
    evaluator = TaskEvaluator(EvaluationTask(mixture_or_task=name), data("encoder_decoder"))
    assert evaluator.foreign_vocabularies(TOKENIZER) == [] and evaluator.vocab_size == 267

    def fails(targets, predictions):
        raise ValueError("no good")

    broken = TaskEvaluator(EvaluationTask(mixture_or_task=registered("broken", fns=(fails,))), data("encoder_decoder"))
    with pytest.raises(DataError, match="Failed to evaluate task broken: no good"):
        broken.evaluate(lambda task, what, examples: [ModelAnswer((1,))] * len(examples))
