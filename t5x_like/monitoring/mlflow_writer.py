"""Metric writer "mlflow": MLflow (the `mlflow` extra).

MLFLOW_TRACKING_URI names the server; without it the metrics are in `mlruns` in the run directory.
MLFLOW_EXPERIMENT_NAME names the experiment.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from t5x_like.monitoring.writers import Writer, register_writer

RUN_ID = "mlflow_run_id"
"""File of the run directory with MLflow's id of the run, so that a restart continues it."""
_EXPERIMENT = "t5x_like"
_NOT_ALLOWED = re.compile(r"[^\w\-. :]")
_MAX_METRICS = 1000
"""Number of metrics that MLflow accepts in one request."""


def mlflow_name(name: str) -> str:
    """Return the name of a metric in MLflow, with dots for slashes: in its file store, `loss` is a file and cannot also
    be the folder of `loss/R`."""
    return _NOT_ALLOWED.sub("_", name.replace("/", "."))


class MlflowWriter:
    """Writer to a run of MLflow."""

    def __init__(self, run_dir: Path) -> None:
        """Begin the run, or continue it.

        Raises:
          ImportError: mlflow is not installed.
        """
        if "MLFLOW_TRACKING_URI" not in os.environ:
            # MLflow 3 recommends a database and asks for this variable before it writes files.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        run_dir.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI", (run_dir.absolute() / "mlruns").as_uri())
        self._client = MlflowClient(tracking_uri=uri)
        id_file = run_dir / RUN_ID
        self._last_step = -1
        if id_file.exists():
            self._run_id = id_file.read_text()
            history = self._client.get_metric_history(self._run_id, "loss")
            self._last_step = max((metric.step for metric in history), default=-1)
            self._client.update_run(self._run_id, "RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._run_id = self._client.create_run(experiment_id, run_name=run_dir.absolute().name).info.run_id
        id_file.write_text(self._run_id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        # After a restart the steps since the checkpoint are written again, with equal values: MLflow would keep both.
        if step <= self._last_step:
            return
        now = int(time.time() * 1000)
        metrics = [Metric(mlflow_name(name), float(value), now, step) for name, value in values.items()]
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _MAX_METRICS])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


@register_writer("mlflow")
def _mlflow(run_dir: Path, restored_step: int | None) -> Writer:
    return MlflowWriter(run_dir)
