"""Growing batches, balanced experts, rounded parameters and moments: a resumed run is the uninterrupted one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.saved_state import saved_state
from helpers.small_run import small_run

from t5x_like.config import (
    BatchSizeStage,
    CausalLM,
    CompilationCacheConfig,
    MoEConfig,
    MonitoringConfig,
    RunConfig,
)
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK
from t5x_like.trainer.train import train

pytestmark = pytest.mark.slow
LENGTH, SIZES = 32, (8, 8, 16, 16, 16, 32)


def steps(run: RunConfig, number: int) -> RunConfig:
    return dataclasses.replace(run, training=dataclasses.replace(run.training, num_train_steps=number))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_is_resumed_within_the_ramp(tmp_path: Path) -> None:
    stages = (BatchSizeStage(until_step=2, batch_size=8), BatchSizeStage(until_step=5, batch_size=16))
    run = small_run(
        tmp_path,
        "causal_lm",
        [CausalLM(name="text")],
        lengths=(0, LENGTH),
        stack={"experts": MoEConfig(num_experts=4, scoring="sigmoid", bias_update_rate=0.01)},
        training={
            "global_batch_size": 32,
            "batch_size_ramp": stages,
            "optimizer_state_type": "bfloat16",
            "parameter_type": "bfloat16",
        },
        compilation_cache=CompilationCacheConfig(directory=str(tmp_path / "compiled")),
        monitoring=MonitoringConfig(writers=(), num_decoded_samples=0, log_every_steps=1, record_rows=True),
    )
    prepare(run.data, report=lambda line: None)
    for workdir, ends in (("undisturbed", (6,)), ("resumed", (3, 6))):
        for end in ends:
            assert train(steps(run, end), tmp_path / workdir) == EXIT_OK
    undisturbed, resumed = (saved_state(tmp_path / name, 6) for name in ("undisturbed", "resumed"))
    assert {path: leaf.tobytes() for path, leaf in resumed.items()} == {
        path: leaf.tobytes() for path, leaf in undisturbed.items()
    }
    bias = undisturbed["params/decoder/layers/mlp/router_bias"]
    # Each of the six steps is rounded, by 2**-7 of the value at most.
    assert np.any(bias) and np.abs(bias.astype(np.float32)).max() <= 6 * 0.01 * (1 + 2.0**-7) ** 6

    for workdir in ("undisturbed", "resumed"):
        rows = [record["main"]["indices"] for record in records(tmp_path / workdir / "rows.jsonl")]
        assert [len(each) for each in rows] == list(SIZES)
        assert sum(rows, []) == list(range(sum(SIZES)))
        metrics = records(tmp_path / workdir / "metrics.jsonl")
        assert [record["loss_tokens"] for record in metrics] == [size * LENGTH for size in SIZES]
        for record, size in zip(metrics, SIZES, strict=True):
            tokens = record["tokens_per_second"] * record["step_time_s"]
            assert tokens == pytest.approx(size * LENGTH, rel=1e-6)
            assert record["moe/max_load/decoder"] >= 1.0
