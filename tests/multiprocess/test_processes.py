"""Runs of several processes (gloo, two simulated devices each) give the results of one process on the same mesh shape.

However one process ends, all end with one exit code, and the same command resumes.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import fault_plugin, multiprocess_recipe
from helpers.fault_runs import children
from helpers.recorded_rows import recorded_rows
from helpers.time_to_end import WITHIN_SECONDS, ended

from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig, RunConfig, ShardingConfig
from t5x_like.config.overrides import apply_overrides
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE, RESTART_CODES
from t5x_like.program import build_program
from t5x_like.trainer.train import train
from t5x_like.utils import tree_paths

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
RECIPE = Path(__file__).parents[1] / "helpers" / "multiprocess_recipe.py"
ARCHITECTURES = ("encoder_decoder", "prefix_lm", "decoder", "encoder")
TIMINGS = ("crc32", "step_time_s", "tokens_per_second", "data_wait_fraction", "mfu", "goodput", "lost_time/")
TOLERANCE = 1e-5
"""Relative tolerance of losses: sums over devices are added in another order."""
MESHES = {2: ("--sharding.data", "2"), 4: ("--sharding.data", "2", "--sharding.tensor", "2")}
"""Mesh overrides by number of processes: data=2, fsdp=2 on four devices; data=2, fsdp=2, tensor=2 on eight."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Change to a directory with a corpus and its prepared store."""
    root = tmp_path_factory.mktemp("processes")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(60)]
    (root / "texts").mkdir()
    for number in range(20):
        (root / "texts" / f"{number}.txt").write_text(" ".join(rng.choices(words, k=400)))
    before = Path.cwd()
    os.chdir(root)
    prepare(multiprocess_recipe.encoder_decoder().data, report=lambda line: None)
    yield root
    os.chdir(before)


def environment(root: Path) -> dict[str, str]:
    """Return the environment, with a compilation cache that later processes share."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **cache}


def launch(
    root: Path,
    workdir: Path,
    architecture: str = "encoder_decoder",
    processes: int = 2,
    overrides: tuple[str, ...] = (),
    max_restarts: int = 0,
) -> subprocess.Popen[str]:
    """Start `t5x-like launch local`."""
    options = ("-n", str(processes), "--devices-per-process", "2", "--workdir", str(workdir), "--execute")
    options = (*options, "--max-restarts", str(max_restarts))
    command = ("launch", "local", f"{RECIPE}:{architecture}", *options, "--", *MESHES[processes], *overrides)
    return start(root, "t5x_like", *command)


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=root,
        env=environment(root),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str], code: int = EXIT_OK) -> str:
    """Wait for the end, check the exit code, and return the output."""
    output, _ = process.communicate(timeout=800)
    assert process.returncode == code, output
    return output


def in_one_process(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, mesh: tuple[str, ...], devices: int
) -> Path:
    """Run the same training in this process, on the first devices."""
    some = jax.devices()[:devices]
    run = apply_overrides(getattr(multiprocess_recipe, architecture)(), list(mesh))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: some)
        assert train(run, workdir) == EXIT_OK
    return workdir


def records(workdir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without timings."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMINGS)} for line in lines]


def assert_same_curve(workdir: Path, reference: Path) -> None:
    """Assert that both runs have every step once, with the same text and the same loss."""
    lines, expected = records(workdir), records(reference)
    steps = list(range(1, len(expected) + 1))
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == steps
    for line, wanted in zip(lines, expected, strict=True):
        assert line.keys() == wanted.keys()
        assert line["loss_tokens"] == wanted["loss_tokens"]
        for name in ("loss", "grad_norm", "accuracy"):
            assert line[name] == pytest.approx(wanted[name], rel=TOLERANCE if name == "loss" else 1e-3), line["step"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    rows = recorded_rows(workdir)
    assert sorted(rows) == steps and rows == recorded_rows(reference)


@pytest.fixture(scope="module")
def two_process_runs(root: Path) -> dict[str, Path]:
    """Run directories of training by two processes, by architecture."""
    return {}


def trained_by_two(root: Path, two_process_runs: dict[str, Path], architecture: str) -> Path:
    if architecture not in two_process_runs:
        workdir = root / f"two_{architecture}"
        output = finish(launch(root, workdir, architecture))
        assert "[1] launcher: jax, process 1/2, coordinator 127.0.0.1" in output
        assert output.count("evaluated step 24") == 1 and "[0] step 24/24" in output
        two_process_runs[architecture] = workdir
    return two_process_runs[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_processes_have_the_loss_curve_of_one(
    root: Path, two_process_runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    workdir = trained_by_two(root, two_process_runs, architecture)
    one = in_one_process(root / f"one_{architecture}", monkeypatch, architecture, MESHES[2], devices=4)
    assert_same_curve(workdir, one)
    scores = [json.loads((run / "evaluation.json").read_text())["objectives"] for run in (workdir, one)]
    assert scores[0].keys() == scores[1].keys()
    for name, wanted in scores[1].items():
        assert scores[0][name] == pytest.approx(wanted, rel=1e-4)
    assert {path.name for path in workdir.glob("log*.txt")} == {"log.txt", "log.1.txt"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_four_processes_have_the_loss_curve_of_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    fewer = ("--training.num-train-steps", "8")
    workdir = root / f"four_{architecture}"
    finish(launch(root, workdir, architecture, processes=4, overrides=fewer))
    one = in_one_process(
        root / f"one_of_eight_{architecture}", monkeypatch, architecture, (*MESHES[4], *fewer), devices=8
    )
    assert_same_curve(workdir, one)


def test_directory_that_is_not_shared_is_refused_with_the_hosts(root: Path) -> None:
    """Two processes with one relative --workdir in different folders, as on hosts that share no disk."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    started = []
    for index in (0, 1):
        folder = root / f"host{index}"
        folder.mkdir()
        (folder / "texts").symlink_to(root / "texts")
        (folder / "stores").symlink_to(root / "stores")
        flags = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(index))
        options = ("--workdir", "runs/a", "--devices", "2", *flags, *MESHES[2])
        started.append(start(folder, "t5x_like", "train", f"{RECIPE}:decoder", *options))
    outputs, seconds = ended(started)
    assert [process.returncode for process in started] == [EXIT_REFUSED, EXIT_REFUSED], outputs
    assert seconds < WITHIN_SECONDS, outputs
    host = re.escape(socket.gethostname())
    expected = rf"runs/a is not shared by all processes: .* process 0 \(host {host}\) .* by process 1 \(host {host}\)"
    assert re.search(expected, outputs[0]) and "process 0 reports the reason" in outputs[1]
    assert json.loads((root / "host0/runs/a/exit.json").read_text())["code"] == EXIT_REFUSED
    assert not list((root / "host0/runs/a").glob(".shared*")) and not (root / "host1/runs").exists()


def saved_arrays(workdir: Path, step: int, sharding: ShardingConfig, devices: int) -> dict[str, np.ndarray]:
    """Return the whole state of a checkpoint, restored to a mesh of this process."""
    run = apply_overrides(multiprocess_recipe.encoder_decoder(), [])
    run = RunConfig(**{**{name: getattr(run, name) for name in run.__dataclass_fields__}, "sharding": sharding})
    program = build_program(run, jax.devices()[:devices])
    manager = CheckpointManager(workdir / "checkpoints", CheckpointConfig(), read_only=True)
    _, state, _ = manager.restore(program.abstract_state, step=step)
    manager.close()
    return {path: np.asarray(leaf) for path, leaf in tree_paths.by_path(state).items()}


def test_checkpoint_of_two_processes_resumes_in_one_on_another_mesh(
    root: Path, two_process_runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = trained_by_two(root, two_process_runs, "encoder_decoder")
    whole = saved_arrays(workdir, 12, ShardingConfig(), devices=1)
    split = saved_arrays(workdir, 12, ShardingConfig(fsdp=4, tensor=2), devices=8)
    assert any(path.startswith("opt_state/") for path in whole)
    assert all(whole[path].tobytes() == split[path].tobytes() for path in whole)

    copy = Path(shutil.copytree(workdir, root / "resumed_in_one"))
    for later in (16, 20, 24):
        shutil.rmtree(copy / "checkpoints" / str(later))
    (copy / "evaluations.jsonl").unlink()
    in_one_process(copy, monkeypatch, "encoder_decoder", ("--sharding.tensor", "2"), devices=8)
    assert_same_curve(copy, workdir)
    meta = [
        CheckpointManager(run / "checkpoints", CheckpointConfig(), read_only=True).read_meta(24)
        for run in (copy, workdir)
    ]
    assert meta[0]["data"] == meta[1]["data"] and meta[0]["mesh"] != meta[1]["mesh"]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 800
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{path} did not appear:\n{process.communicate()[0]}")
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def newest(workdir: Path) -> int:
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def test_all_processes_end_with_any_one_and_the_same_command_resumes(
    root: Path, two_process_runs: dict[str, Path]
) -> None:
    """SIGTERM to one process, a changed configuration, and SIGKILL of one process leave the final result unchanged."""
    undisturbed = trained_by_two(root, two_process_runs, "encoder_decoder")
    workdir = root / "disturbed"

    process = launch(root, workdir)
    wait_for(workdir / "metrics.jsonl", process)
    os.kill(children(process)[1], signal.SIGTERM)
    output = finish(process, EXIT_RESUMABLE)
    exit_record = json.loads((workdir / "exit.json").read_text())
    assert (exit_record["code"], exit_record["reason"], exit_record["process"]) == (
        EXIT_RESUMABLE,
        "stopped by SIGTERM",
        0,
    )
    assert exit_record["step"] == newest(workdir) < 24
    assert output.count(f"saved step {exit_record['step']}") == 1 and "Traceback" not in output

    refused = finish(launch(root, workdir, overrides=("--training.schedule.learning-rate", "1")), EXIT_REFUSED)
    assert refused.count("training.schedule.learning_rate: 0.003 in the run, 1.0 now") == 1
    assert "[1] t5x-like: process 1 ends with exit code 3: process 0 reports the reason" in refused

    process = launch(root, workdir)
    wait_for(workdir / "checkpoints" / str(exit_record["step"] // 4 * 4 + 4), process)
    pids = children(process)
    os.kill(pids[1], signal.SIGKILL)
    output = process.communicate(timeout=800)[0]
    assert process.returncode in RESTART_CODES, output
    assert not any(map(is_alive, pids))

    finish(launch(root, workdir))
    assert records(workdir) == records(undisturbed)
    arrays = [saved_arrays(run, 24, ShardingConfig(), devices=1) for run in (workdir, undisturbed)]
    assert all(arrays[0][path].tobytes() == arrays[1][path].tobytes() for path in arrays[1])


FAULTS = (
    (3, "INTERNAL: CUDA error: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered"),
    (6, "INTERNAL: CUDA_ERROR_NVLINK_UNCORRECTABLE: uncorrectable NVLink error detected during the execution"),
    (10, "INTERNAL: Core halted unexpectedly: INTERNAL: Accelerator device halted prematurely"),
    (14, "INTERNAL: ICI link between chip 3 and chip 7 is down"),
    (17, fault_plugin.HANG),
)
"""Faults of one run, each before a step: failed devices and links, and a storage that does not answer."""


def test_local_launcher_restarts_after_faults_up_to_the_undisturbed_result(
    root: Path, two_process_runs: dict[str, Path]
) -> None:
    undisturbed = trained_by_two(root, two_process_runs, "encoder_decoder")
    workdir = root / "faulty"
    (root / fault_plugin.FAULTS).write_text(json.dumps(FAULTS))
    process = launch(root, workdir, "faulty", overrides=("--timeouts.save", "20"), max_restarts=10)
    output = finish(process)
    restarts = re.findall(r"t5x-like launch: exit code (\d+), restart (\d+) of 10", output)
    assert restarts == [(str(EXIT_RESUMABLE), str(number)) for number in range(1, len(FAULTS) + 1)], output
    assert output.count("a device failed") == len(FAULTS) - 1
    assert "Traceback" not in output and "Check failed" not in output and "*** Begin stack trace" not in output
    # The first process that exceeds the limit ends, and the other one finds that it has ended.
    assert any("takes longer than 20 seconds" in path.read_text() for path in workdir.glob("stacks.*.txt"))
    assert records(workdir) == records(undisturbed)
    arrays = [saved_arrays(run, 24, ShardingConfig(), devices=1) for run in (workdir, undisturbed)]
    assert all(arrays[0][path].tobytes() == arrays[1][path].tobytes() for path in arrays[1])


def test_fault_at_every_start_ends_the_job(root: Path) -> None:
    """A fault before the first save returns at each start: the run is refused after its limit of starts."""
    workdir = root / "crash_loop"
    (root / fault_plugin.FAULTS).write_text(json.dumps([(1, FAULTS[0][1])] * 3))
    overrides = ("--monitoring.max-starts-without-progress", "2")
    output = finish(launch(root, workdir, "faulty", overrides=overrides, max_restarts=10), EXIT_REFUSED)
    assert output.count(", restart ") == 2 and "the last 2 starts ended before a checkpoint was saved" in output


def test_a_stopped_process_ends_all_with_their_stacks(root: Path) -> None:
    """SIGSTOP of process 0, which runs jax's coordination service: the other one exceeds the limit of its step, and the
    launcher ends the stopped one."""
    workdir = root / "stopped"
    process = launch(root, workdir, overrides=("--timeouts.step", "10", "--training.num-train-steps", "100000"))
    wait_for(workdir / "checkpoints" / "4", process)
    pids = children(process)
    os.kill(pids[0], signal.SIGSTOP)
    output = finish(process, EXIT_RESUMABLE)
    stacks = (workdir / "stacks.1.txt").read_text()
    assert "takes longer than 10 seconds" in stacks and "session.py" in stacks
    assert not any(map(is_alive, pids))
    assert "Check failed" not in output and "*** Begin stack trace" not in output
    assert json.loads((workdir / "exit.json").read_text())["code"] == EXIT_RESUMABLE


def test_eval_and_generate_give_the_same_results_with_two_processes_as_with_one(
    root: Path, two_process_runs: dict[str, Path]
) -> None:
    workdir = trained_by_two(root, two_process_runs, "encoder_decoder")
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abc de", "fgh", "a b c d e")))
    two = ("t5x_like.launching.local", "-n", "2", "--devices-per-process", "2", "--", sys.executable, "-m")
    results = []
    for prefix, devices in ((two, ()), ((), ("--devices", "4"))):
        scores = root / f"scores{len(results)}.json"
        mesh = ("t5x_like", "eval", str(workdir), "--output", str(scores), *devices)
        finish(start(root, *prefix, *mesh))
        answers = root / f"answers{len(results)}.jsonl"
        generate = (
            "generate",
            str(workdir),
            "--input",
            str(prompts),
            "--max-new-tokens",
            "8",
            "--output",
            str(answers),
        )
        finish(start(root, *prefix, "t5x_like", *generate, *devices))
        results.append((json.loads(scores.read_text()), [json.loads(x) for x in answers.read_text().splitlines()]))
    (scores_of_two, texts), (scores_of_one, expected_texts) = results
    for name, objective in scores_of_one["objectives"].items():
        assert scores_of_two["objectives"][name] == pytest.approx(objective, rel=1e-4)
    assert scores_of_two["prefix_lm"] == pytest.approx(scores_of_one["prefix_lm"], rel=1e-4)
    assert [text["output"] for text in texts] == [text["output"] for text in expected_texts] and len(texts) == 3
