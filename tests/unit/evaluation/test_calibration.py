"""Calibration and confusion, against scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from t5x_like.errors import DataError
from t5x_like.evaluation.calibration import BINS, calibration, confusion
from t5x_like.evaluation.score_predictions import score_file

LABELS = ("no", "yes", "maybe")


def random_predictions(rows: int = 400) -> tuple[list[str], np.ndarray]:
    generator = np.random.default_rng(0)
    p_NxC = generator.dirichlet(np.ones(3), rows)
    return [str(label) for label in generator.choice(LABELS, rows)], p_NxC


def as_dicts(p_NxC: np.ndarray) -> list[dict[str, float]]:
    return [dict(zip(LABELS, row.tolist(), strict=True)) for row in p_NxC]


def test_calibration_equals_scikit_learn() -> None:
    sklearn_calibration = pytest.importorskip("sklearn.calibration")
    metrics = pytest.importorskip("sklearn.metrics")
    true, p_NxC = random_predictions()
    found = calibration(true, as_dicts(p_NxC))
    index_N = np.array([LABELS.index(label) for label in true])
    confidence_N, right_N = p_NxC.max(1), p_NxC.argmax(1) == index_N
    fraction_B, mean_B = sklearn_calibration.calibration_curve(right_N, confidence_N, n_bins=BINS)
    counts_B = np.bincount(np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence_N))
    shares_B = counts_B[counts_B > 0] / len(true)
    assert found["ece"] == pytest.approx(100 * (shares_B * abs(fraction_B - mean_B)).sum())
    assert found["nll"] == pytest.approx(metrics.log_loss(index_N, p_NxC, labels=[0, 1, 2]))
    assert found["brier"] == pytest.approx(np.square(p_NxC - np.eye(3)[index_N]).sum(1).mean())


def test_certain_and_right_predictions_are_calibrated() -> None:
    certain = [{"yes": 1.0, "no": 0.0}] * 3
    assert calibration(["yes"] * 3, certain) == {"ece": 0, "brier": 0, "nll": 0}
    assert calibration(["no"] * 3, certain)["ece"] == 100
    with pytest.raises(DataError, match="found the labels perhaps, expected a probability for each label"):
        calibration(["perhaps"], certain[:1])


def test_confusion_equals_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    true, p_NxC = random_predictions()
    predicted = [LABELS[index] for index in p_NxC.argmax(1)]
    found = confusion(true, predicted)
    assert found["labels"] == sorted(LABELS)
    assert found["counts"] == metrics.confusion_matrix(true, predicted, labels=found["labels"]).tolist()


def test_metrics_of_probabilities_and_the_table_of_a_file(tmp_path: Path) -> None:
    true, p_NxC = random_predictions(30)
    rows = [
        {"target": label, "prediction": max(p, key=lambda name: p[name]), "probabilities": p}
        for label, p in zip(true, as_dicts(p_NxC), strict=True)
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = score_file(path, ["accuracy", "calibration", "confusion"], draws=30)
    assert result["metrics"]["calibration/ece"] == pytest.approx(calibration(true, as_dicts(p_NxC))["ece"])
    assert result["intervals"]["calibration/ece"] is not None
    assert np.sum(result["confusion"]["counts"]) == 30 and "confusion" not in result["metrics"]
    path.write_text(json.dumps({"target": "no", "prediction": "no", "probabilities": 3}))
    with pytest.raises(DataError, match=":1: found 3 in 'probabilities', expected an object of probabilities"):
        score_file(path, ["calibration"])
