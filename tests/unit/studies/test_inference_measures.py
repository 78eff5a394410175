"""Measures of decoding: exact cache bytes, one measurement for a checkpoint, and a draft that is the model itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest

from t5x_like.checkpoints import model_dir
from t5x_like.config import ModelConfig, StackConfig
from t5x_like.errors import DataError
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.models.factory import init_params
from t5x_like.studies import inference_measures
from t5x_like.studies.inference_measures import measure_decoding, measure_speculation

STACK = StackConfig(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16, positions="rope")


def saved(folder: Path, *, has_encoder: bool = False) -> EvaluatedCheckpoint:
    model = ModelConfig(encoder=STACK if has_encoder else None, decoder=STACK, vocab_size=40)
    folder.mkdir()
    model_dir.save(folder, model, None, {"params": init_params(model, jax.random.key(0))})
    return EvaluatedCheckpoint(folder.name, folder, 0, {}, {}, {}, {}, [], (), {})


@pytest.mark.slow
@pytest.mark.parametrize("has_encoder", [False, True])
def test_decoding_is_measured_once(has_encoder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_measures, "TURNS", 1)
    run = saved(tmp_path / "run", has_encoder=has_encoder)
    found = measure_decoding(run, 2)
    assert found["cache_over_predicted"] == 1.0
    # Another checkpoint, and other rows, are measured for themselves.
    monkeypatch.setattr(inference_measures, "_opened", lambda _: ())
    monkeypatch.setattr(inference_measures, "_decoding", lambda *_: {"cache_bytes": 1.0})
    assert measure_decoding(run, 1) == measure_decoding(dataclasses.replace(run, step=5), 2) == {"cache_bytes": 1.0}
    assert measure_decoding(run, 2) == found


def test_a_draft_of_another_step_is_measured_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_measures, "_opened", lambda checkpoint: checkpoint.step)
    monkeypatch.setattr(inference_measures, "_speculation", lambda run, draft: {"acceptance": float(draft)})
    run = EvaluatedCheckpoint("run", tmp_path, 0, {}, {}, {}, {}, [], (), {})
    for step in (5, 6):
        assert measure_speculation(run, dataclasses.replace(run, step=step)) == {"acceptance": step}


@pytest.mark.parametrize("content", ["{", "[]", '{"decoding_2 at step 0": 1}', '{"decoding_2 at step 0": {"a": null}}'])
def test_a_damaged_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / inference_measures.FILE).write_text(content)
    with pytest.raises(DataError, match=r"inference\.json: found .*, expected .*; delete the file"):
        measure_decoding(EvaluatedCheckpoint("run", tmp_path, 0, {}, {}, {}, {}, [], (), {}), 2)


@pytest.mark.slow
def test_a_draft_that_is_the_model_is_accepted_whole(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    found = measure_speculation(model, model)
    assert (found["acceptance"], found["tokens_per_pass"], found["tokens_over_formula"]) == (1, 5, 1)
