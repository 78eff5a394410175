"""`t5x-like` with a loss that is NaN or a spike for one batch: `python -m helpers.poisoned_train ARGUMENTS`.

In the batch that begins with the row POISONED_ROW of the run, the first row that process POISONED_PROCESS (default: 0)
loads has a mark for which the loss is multiplied by POISON (default: nan). The batch is recognised by its rows, so that
it is poisoned again when a run returns to it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp

from t5x_like.cli.main import main
from t5x_like.monitoring.metrics import WeightedMean
from t5x_like.trainer.session import TrainSession
from t5x_like.training import train_step

_MARK = 7
_WEIGHTS = "decoder_loss_weights"
_batch_metrics = train_step.batch_metrics


def next_batch(self: TrainSession) -> Any:
    with self.clock.state("data_wait"):
        batch = next(self.batches)
        is_poisoned = self.rows_read(self.step) == int(os.environ["POISONED_ROW"])
        if is_poisoned and jax.process_index() == int(os.environ.get("POISONED_PROCESS", "0")):
            for features in batch.values():
                features[_WEIGHTS][0, 0] = _MARK
        if self.rows is not None:
            self.rows.write(self.step + 1, batch, self.batches.last_indices())
        return self.program.shard_batch(batch)


def batch_metrics(apply: Any, params: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
    metrics, coefficients = _batch_metrics(apply, params, batch, *arguments, **options)
    marked = jnp.stack([(features[_WEIGHTS] == _MARK).any() for features in batch.values()]).any()
    loss = metrics["loss"]
    poisoned = WeightedMean(loss.sum * jnp.where(marked, float(os.environ.get("POISON", "nan")), 1.0), loss.weight)
    return {**metrics, "loss": poisoned}, coefficients


if __name__ == "__main__":
    TrainSession.next_batch = next_batch  # type: ignore[method-assign]
    train_step.batch_metrics = batch_metrics
    sys.exit(main())
