"""Real processes, with gloo between them, two simulated devices each: what they compute and write together is what one
process does on a mesh of the same shape; and however one of them ends, all end, with one code, and can go on."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import recipe

from t5x_like.checkpoints import trees
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE, CheckpointConfig, PartitioningConfig, RunConfig
from t5x_like.config.errors import RESTART_CODES
from t5x_like.config.recipes import apply_overrides
from t5x_like.data.prepare import prepare
from t5x_like.program import assemble
from t5x_like.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("recipe.py")
ARCHITECTURES = ("encoder_decoder", "prefix_lm", "decoder", "encoder")
TIMINGS = {"seconds_per_step", "tokens_per_second", "data_wait_fraction", "mfu", "goodput"}
TOLERANCE = 1e-5
"""Relative, of losses: sums over devices are added in another order."""
MESHES = {2: ("--partitioning.data", "2"), 4: ("--partitioning.data", "2", "--partitioning.tensor", "2")}
"""By the number of processes: data=2, fsdp=2 on four devices; data=2, fsdp=2, tensor=2 on eight."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a corpus and its prepared store, which is the current one."""
    place = tmp_path_factory.mktemp("processes")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(60)]
    (place / "texts").mkdir()
    for number in range(20):
        (place / "texts" / f"{number}.txt").write_text(" ".join(rng.choices(words, k=400)))
    before = Path.cwd()
    os.chdir(place)
    prepare(recipe.encoder_decoder().data, report=lambda line: None)
    yield place
    os.chdir(before)


def environment(place: Path) -> dict[str, str]:
    """Compiled programs are kept for the processes that are started later."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(place / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **kept}


def launch(
    place: Path,
    workdir: Path,
    architecture: str = "encoder_decoder",
    processes: int = 2,
    overrides: tuple[str, ...] = (),
) -> subprocess.Popen[str]:
    """`t5x-like launch local`."""
    options = ("-n", str(processes), "--devices-per-process", "2", "--workdir", str(workdir), "--execute")
    command = ("launch", "local", f"{RECIPE}:{architecture}", *options, "--", *MESHES[processes], *overrides)
    return start(place, "t5x_like", *command)


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=place,
        env=environment(place),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str], code: int = EXIT_OK) -> str:
    """Waits for the end, checks the exit code, and returns the output."""
    output, _ = process.communicate(timeout=800)
    assert process.returncode == code, output
    return output


def in_one_process(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, mesh: tuple[str, ...], devices: int
) -> Path:
    """The same run here, on the first devices."""
    some = jax.devices()[:devices]
    run = apply_overrides(getattr(recipe, architecture)(), list(mesh))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: some)
        assert train(run, workdir) == EXIT_OK
    return workdir


def records(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def assert_same_curve(found: Path, expected: Path) -> None:
    """Every step once, the same text in each of them, and the same loss."""
    ours, theirs = records(found), records(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, len(theirs) + 1))
    for line, wanted in zip(ours, theirs, strict=True):
        assert line.keys() == wanted.keys()
        assert line["loss_tokens"] == wanted["loss_tokens"]
        for name in ("loss", "gradient_norm", "accuracy"):
            assert line[name] == pytest.approx(wanted[name], rel=TOLERANCE if name == "loss" else 1e-3), line["step"]
    assert ours[-1]["loss"] < ours[0]["loss"]


@pytest.fixture(scope="module")
def of_two(place: Path) -> dict[str, Path]:
    """Run directories of two processes, by architecture."""
    return {}


def trained_by_two(place: Path, of_two: dict[str, Path], architecture: str) -> Path:
    if architecture not in of_two:
        workdir = place / f"two_{architecture}"
        output = finish(launch(place, workdir, architecture))
        assert "[1] launcher: jax, process 1/2, coordinator 127.0.0.1" in output
        assert output.count("evaluated step 24") == 1 and "[0] step 24/24" in output
        of_two[architecture] = workdir
    return of_two[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_processes_have_the_curve_of_one(
    place: Path, of_two: dict[str, Path], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    workdir = trained_by_two(place, of_two, architecture)
    one = in_one_process(place / f"one_{architecture}", monkeypatch, architecture, MESHES[2], devices=4)
    assert_same_curve(workdir, one)
    scores = [json.loads((run / "evaluation.json").read_text())["objectives"] for run in (workdir, one)]
    assert scores[0].keys() == scores[1].keys()
    for name, wanted in scores[1].items():
        assert scores[0][name] == pytest.approx(wanted, rel=1e-4)
    assert {path.name for path in workdir.glob("log*.txt")} == {"log.txt", "log.1.txt"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_four_processes_have_the_curve_of_one(place: Path, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    fewer = ("--training.num-train-steps", "8")
    workdir = place / f"four_{architecture}"
    finish(launch(place, workdir, architecture, processes=4, overrides=fewer))
    one = in_one_process(
        place / f"one_of_eight_{architecture}", monkeypatch, architecture, (*MESHES[4], *fewer), devices=8
    )
    assert_same_curve(workdir, one)


def saved_arrays(workdir: Path, step: int, partitioning: PartitioningConfig, devices: int) -> dict[str, np.ndarray]:
    """The whole state of a checkpoint, restored to a mesh of this process."""
    run = apply_overrides(recipe.encoder_decoder(), [])
    run = RunConfig(**{**{name: getattr(run, name) for name in run.__dataclass_fields__}, "partitioning": partitioning})
    program = assemble(run, jax.devices()[:devices])
    manager = CheckpointManager(workdir / "checkpoints", CheckpointConfig(), read_only=True)
    _, state, _ = manager.restore(program.abstract_state, step=step)
    manager.close()
    return {path: np.asarray(leaf) for path, leaf in trees.by_path(state).items()}


def test_a_checkpoint_of_two_processes_goes_on_in_one_on_another_mesh(
    place: Path, of_two: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = trained_by_two(place, of_two, "encoder_decoder")
    whole = saved_arrays(workdir, 12, PartitioningConfig(), devices=1)
    split = saved_arrays(workdir, 12, PartitioningConfig(fsdp=4, tensor=2), devices=8)
    assert any(path.startswith("opt_state/") for path in whole)
    assert all(whole[path].tobytes() == split[path].tobytes() for path in whole)

    copy = Path(shutil.copytree(workdir, place / "goes_on_in_one"))
    for later in (16, 20, 24):
        shutil.rmtree(copy / "checkpoints" / str(later))
    (copy / "evaluations.jsonl").unlink()
    in_one_process(copy, monkeypatch, "encoder_decoder", ("--partitioning.tensor", "2"), devices=8)
    assert_same_curve(copy, workdir)
    meta = [
        CheckpointManager(run / "checkpoints", CheckpointConfig(), read_only=True).read_meta(24)
        for run in (copy, workdir)
    ]
    assert meta[0]["data"] == meta[1]["data"] and meta[0]["mesh"] != meta[1]["mesh"]


def children(process: subprocess.Popen[str]) -> list[int]:
    """Of the launcher: its processes, in order."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return sorted(int(pid) for task in tasks for pid in (task / "children").read_text().split())


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


def test_however_one_process_ends_all_end_and_the_same_command_goes_on(place: Path, of_two: dict[str, Path]) -> None:
    """SIGTERM to one of them, another configuration, SIGKILL of one, and then to the end: as if nothing had been."""
    undisturbed = trained_by_two(place, of_two, "encoder_decoder")
    workdir = place / "disturbed"

    process = launch(place, workdir)
    wait_for(workdir / "metrics.jsonl", process)
    os.kill(children(process)[1], signal.SIGTERM)
    output = finish(process, EXIT_RESUMABLE)
    left = json.loads((workdir / "exit.json").read_text())
    assert (left["code"], left["reason"], left["process"]) == (EXIT_RESUMABLE, "stopped by SIGTERM", 0)
    assert left["step"] == newest(workdir) < 24
    assert output.count(f"saved step {left['step']}") == 1 and "Traceback" not in output

    refused = finish(launch(place, workdir, overrides=("--training.schedule.learning-rate", "1")), EXIT_REFUSED)
    assert refused.count("training.schedule.learning_rate: 0.003 in the run, 1.0 now") == 1
    assert "[1] t5x-like: process 1 ends with exit code 3: process 0 says why" in refused

    process = launch(place, workdir)
    wait_for(workdir / "checkpoints" / str(left["step"] // 4 * 4 + 4), process)
    pids = children(process)
    os.kill(pids[1], signal.SIGKILL)
    output = process.communicate(timeout=800)[0]
    assert process.returncode in RESTART_CODES, output
    assert not any(map(is_alive, pids))

    finish(launch(place, workdir))
    assert records(workdir) == records(undisturbed)
    arrays = [saved_arrays(run, 24, PartitioningConfig(), devices=1) for run in (workdir, undisturbed)]
    assert all(arrays[0][path].tobytes() == arrays[1][path].tobytes() for path in arrays[1])


def test_eval_and_generate_say_with_two_processes_what_they_say_with_one(place: Path, of_two: dict[str, Path]) -> None:
    workdir = trained_by_two(place, of_two, "encoder_decoder")
    prompts = place / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abc de", "fgh", "a b c d e")))
    two = ("t5x_like.launching.local", "-n", "2", "--devices-per-process", "2", "--", sys.executable, "-m")
    results = []
    for prefix, devices in ((two, ()), ((), ("--devices", "4"))):
        scores = place / f"scores{len(results)}.json"
        mesh = ("t5x_like", "eval", str(workdir), "--output", str(scores), *devices)
        finish(start(place, *prefix, *mesh))
        answers = place / f"answers{len(results)}.jsonl"
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
        finish(start(place, *prefix, "t5x_like", *generate, *devices))
        results.append((json.loads(scores.read_text()), [json.loads(x) for x in answers.read_text().splitlines()]))
    (found, texts), (wanted, wanted_texts) = results
    for name, objective in wanted["objectives"].items():
        assert found["objectives"][name] == pytest.approx(objective, rel=1e-4)
    assert found["prefix_lm"] == pytest.approx(wanted["prefix_lm"], rel=1e-4)
    assert [text["output"] for text in texts] == [text["output"] for text in wanted_texts] and len(texts) == 3
