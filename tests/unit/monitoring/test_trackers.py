"""W&B (offline) and MLflow (a local file store) receive the numbers of metrics.jsonl, also over a restart."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from t5x_like.monitoring import mlflow_writer, wandb_writer
from t5x_like.monitoring.writers import WRITERS, JsonlWriter, Writer, Writers

pytestmark = pytest.mark.external


def values(step: int) -> dict[str, float]:
    return {"loss": 4.0 / step, "loss/R_3_0.15": 1.0 / 3.0 + step, "tokens_per_second": 1e7}


def write_twice(name: str, run_dir: Path) -> dict[int, dict[str, float]]:
    """Write as a run that is killed after step 30 and resumes from step 10; return metrics.jsonl by step."""
    (run_dir / "config.json").write_text(json.dumps({"name": "a run"}))
    for restored_step, steps in ((None, (10, 20, 30)), (10, (20, 30, 40))):
        record = JsonlWriter(run_dir / "metrics.jsonl", restored_step=restored_step)
        tracker: Writer = WRITERS.lookup(name, "monitoring.writers.0")(run_dir, restored_step)
        writers = Writers(record, [tracker])
        for step in steps:
            writers.write(step, values(step))
        writers.close()
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    # The check of the line is not a number of the step.
    checks = ("previous_step", "crc32")
    return {line.pop("step"): {k: v for k, v in line.items() if k not in checks} for line in lines}


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    expected = write_twice("mlflow", tmp_path)
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    run_id = (tmp_path / mlflow_writer.RUN_ID).read_text()
    found: dict[int, dict[str, float]] = {}
    for name in values(10):
        for metric in client.get_metric_history(run_id, mlflow_writer.mlflow_name(name)):
            assert name not in found.setdefault(metric.step, {}), "a step was written twice"
            found[metric.step][name] = metric.value
    assert found == expected and sorted(found) == [10, 20, 30, 40]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    expected = write_twice("wandb", tmp_path)
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    # `finish` returns before the process of W&B has written its buffers; at its end, a program waits for that process.
    found: dict[int, dict[str, float]] = {}
    deadline = time.monotonic() + 120
    while found.keys() != expected.keys() and time.monotonic() < deadline:
        time.sleep(0.1)
        found = merged(files)
    assert found == expected and sorted(found) == [10, 20, 30, 40]
    assert len({file.stem for file in files}) == 1, "both processes write one run"
    assert (tmp_path / wandb_writer.RUN_ID).read_text() in files[0].name


def merged(files: list[Path]) -> dict[int, dict[str, float]]:
    """Return the metrics by step of several logs, which agree on the steps that they share."""
    found: dict[int, dict[str, float]] = {}
    for file in files:
        for step, metrics in history(file).items():
            assert found.setdefault(step, metrics) == metrics
    return found


def history(file: Path) -> dict[int, dict[str, float]]:
    """Return the metrics by step in a transaction log of W&B."""
    from wandb.proto import wandb_internal_pb2

    found: dict[int, dict[str, float]] = {}
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = items["_step"]
            found[step] = {name: value for name, value in items.items() if not name.startswith("_")}
    return found


def log_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format: blocks of 32 KiB of fragments with a header."""
    position, fragments, block = 7, b"", 2**15
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
        length, kind = struct.unpack_from("<HB", data, position + 4)
        fragments += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # Complete, or the last fragment.
            yield fragments
            fragments = b""
