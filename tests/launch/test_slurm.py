"""Rendered SLURM jobs on a real cluster of two nodes: they train as one job and resume by themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import fault_plugin
from helpers.launch_examples import REPOSITORY
from helpers.slurm_cluster import Cluster, cluster, why_not

WHY_NOT = why_not()
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900), pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

STEPS = 20
ECC = "INTERNAL: CUDA error: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a cluster, with a prepared recipe in the directory that its nodes share."""
    folder = tmp_path_factory.mktemp("cluster")
    shutil.copy(REPOSITORY / "tests/helpers/fault_recipe.py", folder / "recipe.py")
    shutil.copy(REPOSITORY / "tests/helpers/fault_plugin.py", folder)
    (folder / "texts").mkdir()
    for number, source in enumerate(sorted((REPOSITORY / "t5x_like/config").glob("*.py"))):
        shutil.copy(source, folder / "texts" / f"{number}.txt")
    t5x_like("prepare", "recipe.py", cwd=folder)
    with cluster(folder) as started:
        yield started


def t5x_like(*arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    argv = [sys.executable, "-m", "t5x_like", *arguments]
    result = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def submit(slurm: Cluster, name: str, *options: str, recipe: str = "recipe.py", overrides: tuple[str, ...] = ()) -> str:
    """Render and submit a job with one process and two devices on each node; return its job id.

    Args:
      slurm: The cluster.
      name: Name of the job and of its run directory.
      options: Options of `t5x-like launch slurm`.
      recipe: The recipe.
      overrides: Further arguments of `train`.
    """
    folder = slurm.directory
    variables = {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        # Later jobs read the programs that the first one compiles.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    env = [word for item in variables.items() for word in ("--env", "=".join(item))]
    cpus = ["--nodes", "2", "--gpus-per-node", "0", "--python", sys.executable]
    files = ["--name", name, "--output", name]
    train_arguments = [
        "--",
        "--expect-devices",
        "4",
        "--training.num-train-steps",
        str(STEPS),
        "--monitoring.num_decoded_samples",
        "0",
        *overrides,
    ]
    t5x_like("launch", "slurm", recipe, *cpus, *env, *files, *options, *train_arguments, cwd=folder)
    return slurm.run("sbatch", "--parsable", f"{name}/train.sbatch", cwd=folder).strip()


def losses(folder: Path) -> dict[int, float]:
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line["loss"] for line in lines}


def log(slurm: Cluster, name: str, job: str) -> str:
    return (slurm.directory / f"{name}-{job}.log").read_text()


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster) -> tuple[str, dict[str, Any]]:
    job = submit(slurm, "plain")
    return job, slurm.wait(job, "COMPLETED", "FAILED", seconds=400)


def test_two_tasks_on_two_nodes_form_one_job(slurm: Cluster, undisturbed: tuple[str, dict[str, Any]]) -> None:
    job, ended = undisturbed
    text = log(slurm, "plain", job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0"), text
    assert "0: launcher: slurm, process 0/2, coordinator node1:" in text
    assert "1: launcher: slurm, process 1/2, coordinator node1:" in text
    assert ended["NumNodes"] == "2" and ended["NodeList"] == "node[1-2]"
    assert max(losses(slurm.directory / "runs/plain")) == STEPS


def test_stopped_job_is_requeued_and_resumes(slurm: Cluster, undisturbed: tuple[str, dict[str, Any]]) -> None:
    job = submit(slurm, "stopped")
    slurm.wait(job, "RUNNING", seconds=200)
    deadline = time.monotonic() + 300
    while not losses(slurm.directory / "runs/stopped"):
        assert time.monotonic() < deadline, log(slurm, "stopped", job)
        time.sleep(0.1)
    # SLURM sends this signal before a preemption and before the time limit.
    slurm.run("scancel", "--signal=TERM", job)
    slurm.wait(job, "PENDING", seconds=120)
    saved = json.loads((slurm.directory / "runs/stopped/exit.json").read_text())
    assert saved["code"] == 42 and 0 < saved["step"] < STEPS
    ended = slurm.wait(job, "COMPLETED", "FAILED", seconds=400)
    text = log(slurm, "stopped", job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), text
    assert "exit code 42: the job is requeued" in text
    assert losses(slurm.directory / "runs/stopped") == losses(slurm.directory / "runs/plain")


def test_job_is_requeued_after_a_device_has_failed(slurm: Cluster, undisturbed: tuple[str, dict[str, Any]]) -> None:
    (slurm.directory / fault_plugin.FAULTS).write_text(json.dumps([(STEPS // 2, ECC)]))
    job = submit(slurm, "faulty", recipe="recipe.py:faulty")
    ended = slurm.wait(job, "COMPLETED", "FAILED", seconds=600)
    text = log(slurm, "faulty", job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), text
    assert text.count("a device failed") == 1 and "exit code 42: the job is requeued" in text
    assert "Traceback" not in text and "Check failed" not in text
    assert losses(slurm.directory / "runs/faulty") == losses(slurm.directory / "runs/plain")


def test_job_whose_device_fails_at_every_start_is_ended(slurm: Cluster) -> None:
    (slurm.directory / fault_plugin.FAULTS).write_text(json.dumps([(1, ECC)] * 3))
    limit = ("--monitoring.max-starts-without-progress", "2")
    job = submit(slurm, "looping", recipe="recipe.py:faulty", overrides=limit)
    ended = slurm.wait(job, "COMPLETED", "FAILED", seconds=600)
    text = log(slurm, "looping", job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "2"), text
    assert text.count("a device failed") == 2
    assert "the last 2 starts ended before a checkpoint was saved at all" in text


def test_job_with_a_configuration_error_is_not_restarted(slurm: Cluster) -> None:
    job = submit(slurm, "wrong", "--env", "JAX_NUM_CPU_DEVICES=3")
    ended = slurm.wait(job, "COMPLETED", "FAILED", seconds=400)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), log(slurm, "wrong", job)
