"""Whole runs by the command line with --workdir in a bucket end bit for bit as a run in a local directory."""

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.bucket_proxy import Faults
from helpers.bucket_servers import Server, without_bucket_settings
from helpers.saved_state import saved_state
from helpers.time_to_end import WITHIN_SECONDS, ended

from t5x_like.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_USAGE
from t5x_like.storage import locations, segments
from t5x_like.storage.locations import Url, location

pytestmark = [pytest.mark.buckets, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).parents[2]
HELPERS = Path(__file__).parents[1] / "helpers"
RECIPE = HELPERS / "fault_recipe.py"
STEPS = ("--training.num-train-steps", "30")
TIMINGS = (
    "crc32",
    "step_time_s",
    "tokens_per_second",
    "data_wait_fraction",
    "mfu",
    "goodput",
    "lost_time/",
    "repeated_requests",
)
NOISE = re.compile(r"^(?:[EIW]\d{4} |t5x-like: --trust ).*\n", re.MULTILINE)
"""Lines that TensorStore writes to stderr, and that --trust was not needed."""


class Workspace:
    """Directory with a corpus in which commands are run."""

    def __init__(self, directory: Path, settings: Mapping[str, str] = {}) -> None:
        self.directory = directory
        self.environment = {
            **without_bucket_settings(),
            **settings,
            "PYTHONPATH": str(REPOSITORY),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(60)]
        (directory / "texts").mkdir(parents=True)
        for number in range(20):
            (directory / "texts" / f"{number}.txt").write_text(" ".join(rng.choices(words, k=400)))

    def start(self, *arguments: str | Path, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "t5x_like", *map(str, arguments)],
            cwd=self.directory,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *arguments: str | Path, code: int = EXIT_OK) -> str:
        return finish(self.start(*arguments), code)

    def once(self, out: str, *arguments: str | Path) -> Path:
        """Run a command that writes `out`, unless the test with another server has done so, and return its path."""
        if not (self.directory / out).exists():
            self.run(*arguments)
        return self.directory / out


def finish(process: subprocess.Popen[str], code: int = EXIT_OK) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output
    return NOISE.sub("", output)


def numbers(output: str) -> list[str]:
    """Return the results in an output of `eval` or `generate`: the words without frames, and without paths."""
    return [word for word in output.split() if "run" not in word and not set(word) & set("━─┳┏┓┡┩╇└┴┘/")]


def logged(text: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the entries that depend on time."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMINGS)} for line in lines]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with an undisturbed run in a local directory."""
    workspace = Workspace(tmp_path_factory.mktemp("local") / "a")
    workspace.run("prepare", RECIPE)
    workspace.run("train", RECIPE, "--workdir", "run", *STEPS)
    return workspace


@pytest.fixture
def settings(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


def at(server: Server, name: str) -> Url:
    url = location(server.url(name))
    assert isinstance(url, Url)
    return url


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.05)


def state_in(url: Url, tmp_path: Path, workspace: Workspace, step: int = 30) -> Any:
    """Return all arrays of a checkpoint by path."""
    script = (
        "import sys, numpy as np; from pathlib import Path; from helpers.saved_state import saved_state;"
        "from t5x_like.storage.mirror import local_copy;"
        "np.savez(sys.argv[2], **saved_state(local_copy(sys.argv[1], 'MODEL'), int(sys.argv[3])))"
    )
    environment = {**workspace.environment, "PYTHONPATH": f"{REPOSITORY}:{HELPERS.parent}"}
    command = [sys.executable, "-c", script, str(url), str(tmp_path / "state.npz"), str(step)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    import numpy as np

    return np.load(tmp_path / "state.npz")


def assert_same_arrays(found: Any, expected: Mapping[str, Any]) -> None:
    assert set(found.files) == set(expected)
    assert all(found[path].tobytes() == expected[path].tobytes() for path in expected)


def test_killed_run_ends_as_a_local_one(local: Workspace, server: Server, settings: None, tmp_path: Path) -> None:
    """Prepare, train, SIGKILL, SIGTERM, resume; evaluate, follow, examine, generate, export, average, compare and start
    another run, all from the bucket."""
    workspace = Workspace(tmp_path / "a", server.environment)
    run, stores = at(server, "runs/a"), ("--data.store-dir", server.url("stores"))
    workspace.run("prepare", RECIPE, *stores)
    train = ("train", RECIPE, "--workdir", str(run), *STEPS, *stores)
    committed = run / "checkpoints" / "committed"
    for signal_number, step, code in ((signal.SIGKILL, 8, -signal.SIGKILL), (signal.SIGTERM, 16, EXIT_RESUMABLE)):
        process = workspace.start(*train)
        wait_until(lambda step=step: f"{step}.json" in locations.children(committed), process)
        process.send_signal(signal_number)
        finish(process, code)
    workspace.run(*train)

    assert_same_arrays(state_in(run, tmp_path, workspace), saved_state(local.directory / "run", 30))
    metrics = locations.read_bytes(run / "metrics.jsonl") or b""
    assert logged(metrics.decode()) == logged((local.directory / "run/metrics.jsonl").read_text())
    assert json.loads(locations.read_bytes(run / "exit.json") or b"")["code"] == EXIT_OK
    kept = {name.partition(".")[0] for name in locations.children(run / "checkpoints" / "data")}
    assert kept == {name.partition(".")[0] for name in locations.children(committed)} >= {"24", "30"} and len(kept) == 3
    assert locations.read_bytes(run / "lease") is None
    names = set(locations.children(run))
    assert names >= {"config.json", "run.json", "log.txt", "report.html", "samples.json", "evaluations.jsonl"}

    # config.json names the stores, and these commands do not.
    trust = ("--trust", server.url("stores"))
    before = locations.read_bytes(run / "evaluations.jsonl")
    in_bucket = workspace.run("eval", f"{run}:24,30", *trust)
    # Paths differ, and the widths of tables with them.
    assert numbers(in_bucket) == numbers(local.run("eval", "run:24,30"))
    assert locations.read_bytes(run / "evaluations.jsonl") == before
    added = [json.loads(locations.read_bytes(run / key) or b"") for key in locations.keys(run) if "_results/" in key]
    assert sorted(result["step"] for result in added) == [24, 30] and all(result["intervals"] for result in added)
    assert "1 checkpoints evaluated" in workspace.run("eval", str(run), "--follow", *trust), "the third that is kept"
    assert "intact" in workspace.run("doctor", str(run), *trust)

    # Each command reads from the bucket and writes there.
    locations.write_bytes(run.with_name("prompts.jsonl"), b'{"prompt": "abc"}\n{"prompt": "de"}\n')
    (local.directory / "prompts.jsonl").write_bytes(b'{"prompt": "abc"}\n{"prompt": "de"}\n')
    out = run.with_name("out")
    files = ("--input", str(run.with_name("prompts.jsonl")), "--output", str(out / "answers.jsonl"))
    workspace.run("generate", str(run), *files, *trust)
    generate = ("generate", "run", "--input", "prompts.jsonl", "--output", "answers.jsonl")
    answers = local.once("answers.jsonl", *generate).read_bytes()
    assert locations.read_bytes(out / "answers.jsonl") == answers
    workspace.run("export", str(run), str(out / "exported"), *trust)
    exported = local.once("exported", "export", "run", "exported")
    weights = sorted(exported.rglob("*.safetensors"))
    assert weights
    for path in weights:
        name = path.relative_to(exported).as_posix()
        assert locations.read_bytes(out / "exported" / name) == path.read_bytes()
    workspace.run("average", f"{run}:24,30", str(out / "mean"), *trust)
    mean = local.once("mean", "average", "run:24,30", "mean")
    assert_same_arrays(state_in(out / "mean", tmp_path, workspace), saved_state(mean, 30))
    workspace.run("compare", f"{run}:24", f"{run}:30", "--output", str(out / "page.html"), *trust)
    assert len(locations.read_bytes(out / "page.html") or b"") > 1000

    # A run that starts from the mean.
    start = ("--training.num-train-steps", "2", "--initialize-from.directory")
    warm = run.with_name("warm")
    workspace.run("train", RECIPE, "--workdir", str(warm), *start, str(out / "mean"), *stores)
    warm_locally = local.once("warm", "train", RECIPE, "--workdir", "warm", *start, "mean")
    assert_same_arrays(state_in(warm, tmp_path, workspace, 2), saved_state(warm_locally, 2))


@pytest.mark.slow
@pytest.mark.extended
def test_other_outputs_are_those_of_a_local_run(server: Server, settings: None, tmp_path: Path) -> None:
    """Train by the Python API, embed, fine-tune, predict and sweep, all in the bucket."""
    workspace, local = Workspace(tmp_path / "a", server.environment), Workspace(tmp_path / "b")
    texts = [json.dumps({"text": f"text {number}", "label": "ab"[number % 2]}) for number in range(200)]
    for each in (workspace, local):
        (each.directory / "texts.jsonl").write_text("\n".join(texts))
    out, stores = at(server, "outputs"), ("--data.store-dir", server.url("stores5"))
    trust = ("--trust", server.url("stores5"))
    two = ("--training.num-train-steps", "2")
    workspace.run("prepare", RECIPE, *stores)
    local.run("prepare", RECIPE)
    local.run("train", RECIPE, "--workdir", "run", *two)
    script = "import sys, t5x_like; from t5x_like.config.recipes import load_recipe; from dataclasses import replace;"
    script += "run = load_recipe(sys.argv[1]); run = replace(run, training=replace(run.training, num_train_steps=2));"
    script += (
        "run = replace(run, data=replace(run.data, store_dir=sys.argv[3])); assert t5x_like.train(run, sys.argv[2])"
    )
    command = [sys.executable, "-c", script, str(RECIPE), str(out / "run"), stores[1]]
    subprocess.run(command, env=workspace.environment, cwd=workspace.directory, check=True, capture_output=True)
    assert_same_arrays(state_in(out / "run", tmp_path, workspace, 2), saved_state(local.directory / "run", 2))

    for each, place, model, options in ((workspace, f"{out}/", out / "run", trust), (local, "", "run", ())):
        each.run("embed", str(model), "--input", "texts.jsonl", "--output", f"{place}vectors.npy", *options)
        fields = ("--data.corpus.files", "texts.jsonl", "--data.corpus.inputs-field", "text")
        fields = (*fields, "--data.corpus.text-field", "label", "--training.global-batch-size", "4", *two)
        stored = stores if each is workspace else ()
        each.run("train", "finetune:classify", "--from", str(model), "--workdir", f"{place}labels", *fields, *stored)
        predict = ("--input", "texts.jsonl", "--output", f"{place}predicted.jsonl")
        each.run("predict", f"{place}labels", *predict, *options)
        rates = ("--training.schedule.learning-rate", "1e-3", "1e-4", *two, *stored)
        each.run("sweep", RECIPE, "--workdir", f"{place}sweep", *rates, *options)
    for name in ("vectors.npy", "predicted.jsonl"):
        assert locations.read_bytes(out / name) == (local.directory / name).read_bytes()
    arms = sorted(path.name for path in (local.directory / "sweep").iterdir() if path.is_dir())
    assert locations.children(out / "sweep") == sorted([*arms, "study.html"]) and len(arms) == 2
    for arm in arms:
        found = (segments.read_file(out / "sweep" / arm, "metrics.jsonl") or b"").decode()
        assert logged(found) == logged((local.directory / "sweep" / arm / "metrics.jsonl").read_text())


def start_processes(
    hosts: list[Workspace], workdir: str, recipe: str, *options: str, prefix: tuple[str, ...] = ()
) -> list[subprocess.Popen[str]]:
    """Start a process of a run on each host."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    processes = []
    for index, host in enumerate(hosts):
        flags = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", str(len(hosts)), "--process-id", str(index))
        mesh = ("--devices", "2", "--sharding.data", "2")
        processes.append(host.start("train", recipe, "--workdir", workdir, *mesh, *flags, *options, prefix=prefix))
    return processes


def test_two_hosts_without_a_shared_directory(server: Server, faults: Faults, settings: None, tmp_path: Path) -> None:
    """Two processes in different folders, with a slow object store, give the bits of two in one folder."""
    recipe, stores = f"{HELPERS / 'multiprocess_recipe.py'}:decoder", ("--data.store-dir", server.url("stores2"))
    hosts = [Workspace(tmp_path / f"host{index}", server.environment) for index in (0, 1)]
    hosts[0].run("prepare", recipe, *stores)

    def train(workdir: str) -> None:
        for process in start_processes(hosts, workdir, recipe, "--training.num-train-steps", "8", *stores):
            finish(process)

    run = at(server, "runs/two")
    faults.seconds = 0.05
    train(str(run))
    faults.seconds = 0.0
    train(str(tmp_path / "shared"))
    metrics = (locations.read_bytes(run / "metrics.jsonl") or b"").decode()
    assert logged(metrics) == logged((tmp_path / "shared" / "metrics.jsonl").read_text())
    assert {"log.txt", "log.1.txt"} <= set(locations.children(run))


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root for mount namespaces")
def test_four_hosts_that_see_no_common_directory(server: Server, settings: None, tmp_path: Path) -> None:
    """Each of four processes has a file system of its own where the others have theirs."""
    recipe, stores = f"{HELPERS / 'multiprocess_recipe.py'}:decoder", ("--data.store-dir", server.url("stores4"))
    hosts = [Workspace(tmp_path / f"host{index}", server.environment) for index in range(4)]
    hosts[0].run("prepare", recipe, *stores)
    options = ("--training.num-train-steps", "8", *stores)
    for process in start_processes(hosts, str(tmp_path / "shared"), recipe, *options):
        finish(process)
    for host in hosts:
        host.environment["TMPDIR"] = str(tmp_path / "tmp")
    enter = 'mount -t tmpfs none "$0" && mkdir -p "$0/tmp" "$PWD" && cd "$PWD" && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", enter, str(tmp_path))
    run = at(server, "runs/four")
    for process in start_processes(hosts, str(run), recipe, *options, prefix=prefix):
        finish(process)
    metrics = (locations.read_bytes(run / "metrics.jsonl") or b"").decode()
    assert logged(metrics) == logged((tmp_path / "shared" / "metrics.jsonl").read_text())
    assert_same_arrays(state_in(run, tmp_path, hosts[0], 8), saved_state(tmp_path / "shared", 8))
    assert {"log.txt", "log.1.txt", "log.2.txt", "log.3.txt"} <= set(locations.children(run))


@pytest.mark.parametrize("kind", ["bucket", "permission"])
def test_missing_bucket_or_permission_ends_all_processes_with_one_message(
    local: Workspace, server: Server, faults: Faults, kind: str
) -> None:
    faults.status = 403 if kind == "permission" else 0
    workdir = server.url("x", bucket="missing") if kind == "bucket" else server.url("x")
    local.environment.update(server.environment)
    processes = start_processes([local, local], workdir, str(RECIPE))
    outputs, seconds = ended(processes)
    output = NOISE.sub("", "".join(outputs))
    assert [process.returncode for process in processes] == [EXIT_USAGE, EXIT_USAGE], output
    assert seconds < WITHIN_SECONDS, output
    reason = "PERMISSION_DENIED" if kind == "permission" else "NOT_FOUND"
    told = [line for line in output.splitlines() if line.startswith("t5x-like: ") and reason in line]
    assert len(told) == 1 and "Traceback" not in output, output
    assert not os.path.exists(local.directory / "s3:") and not os.path.exists(local.directory / "gs:")


def test_credentials_that_expire_end_all_processes(
    server: Server, faults: Faults, settings: None, tmp_path: Path
) -> None:
    if server.scheme == "s3":
        pytest.skip("retries and the exit code do not depend on the protocol; gs:// covers them")
    recipe, stores = f"{HELPERS / 'multiprocess_recipe.py'}:decoder", ("--data.store-dir", server.url("stores3"))
    hosts = [Workspace(tmp_path / f"host{index}", server.environment) for index in (0, 1)]
    hosts[0].run("prepare", recipe, *stores)
    run = at(server, "runs/expired")
    length = ("--training.num-train-steps", "1000000", "--checkpoints.save-every-steps", "1000000")
    processes = start_processes(hosts, str(run), recipe, *length, *stores)
    wait_until(lambda: b"step" in (segments.read_file(run, "metrics.jsonl") or b""), processes[0])
    began = time.monotonic()
    faults.status = 401 if server.scheme == "gs" else 403
    outputs = [finish(process, EXIT_USAGE) for process in processes]
    # The uploads of half a minute have failed.
    assert 15 < time.monotonic() - began < WITHIN_SECONDS
    told = [line for output in outputs for line in output.splitlines() if "cannot be accessed" in line]
    assert len([line for line in told if line.startswith("t5x-like: ")]) == 1, outputs
