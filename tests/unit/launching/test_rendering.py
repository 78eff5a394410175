"""Rendered launch files: one table of exit codes, one cluster detection, and no secrets."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.config_examples import REPOSITORY

from t5x_like.cli import train
from t5x_like.cli.arguments import process_flags
from t5x_like.cli.main import main
from t5x_like.distributed.cluster_detection import detect_cluster
from t5x_like.errors import EXIT_CODES, EXIT_RESUMABLE, RESTART_CODES, ConfigError
from t5x_like.hardware.topologies import ACCELERATORS, Topology, parse_topology
from t5x_like.launching import accelerator_names, gke, restart_loop, skypilot, slurm, tpu_vm
from t5x_like.launching.executor import execute
from t5x_like.launching.job import Job, resource_name
from t5x_like.launching.rendering import Rendering, Step, to_text
from t5x_like.launching.restart_loop import RestartLoop, Supervisor

JOB = Job(name="ul2_20b", recipe="ul2", workdir="/runs/ul2")
V5E, H100 = parse_topology("v5e:16x16", num_slices=2), parse_topology("h100:16")
GKE = gke.Gke(job=JOB, topology=V5E, image="image")
_BUCKET = ("--bucket", "gs://b")


def renderings(job: Job = JOB, directory: Path = Path("launch")) -> dict[str, Rendering]:
    return {
        "tpu-vm": tpu_vm.render(tpu_vm.TpuVm(job, V5E, zone="z", directory=directory)),
        "gke": gke.render(gke.Gke(job, V5E, image="image", directory=directory)),
        "gke of GPUs": gke.render(gke.Gke(job, H100, image="image", directory=directory)),
        "slurm": slurm.render(slurm.Slurm(job, nodes=2, directory=directory)),
        "skypilot": skypilot.render(skypilot.SkyPilot(job, H100, directory=directory)),
    }


# One table of exit codes.


def test_exit_codes_are_unique() -> None:
    codes = [entry.code for entry in EXIT_CODES]
    assert len(set(codes)) == len(codes)
    assert RESTART_CODES == (42, 134, 137, 143)


def run_batch_script(folder: Path, script: str, code: int, restarts: int = 0) -> tuple[int, bool]:
    """Return the exit code of a batch script whose processes end with `code`, and whether it requeued itself."""
    programs = {"srun": f"exit {code}", "scontrol": f'echo "$*" >{folder}/asked'}
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "asked").unlink(missing_ok=True)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True)
    asked = folder / "asked"
    return result.returncode, asked.exists() and asked.read_text() == "requeue 7\n"


CODES = sorted({entry.code for entry in EXIT_CODES} | {5, 127, 139, 255})


@pytest.mark.parametrize("code", CODES)
def test_slurm_restarts_after_restartable_codes(tmp_path: Path, code: int) -> None:
    script = slurm.batch_script(slurm.Slurm(JOB))
    assert run_batch_script(tmp_path, script, code) == (code, code in RESTART_CODES)
    assert run_batch_script(tmp_path, script, code, restarts=JOB.max_restarts) == (code, False)


def jobset_action(document: dict[str, Any], code: int, *, evicted: bool) -> str:
    """Return the action of the Job and JobSet controllers for the end of a pod, by their documented rules."""
    spec = document["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0, "a Job fails with its first pod"
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        exits = rule.get("onExitCodes")
        conditions = [condition["type"] for condition in rule.get("onPodConditions", [])]
        if exits and (code in exits["values"]) == (exits["operator"] == "In"):
            reason, message = "PodFailurePolicy", f"Container train for pod d/p failed with exit code {code}"
        elif evicted and "DisruptionTarget" in conditions:
            reason, message = "PodFailurePolicy", "Pod d/p has condition DisruptionTarget"
        else:
            continue
        message += f" matching {rule['action']} rule at index {index}"
        break
    for rule in spec["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(pattern in message for pattern in patterns):
            return str(rule["action"])
    return "RestartJobSet"


@pytest.mark.parametrize("code", [code for code in CODES if code])
def test_jobset_restarts_after_restartable_codes(code: int) -> None:
    document = gke.jobset(GKE)
    expected = "RestartJobSet" if code in RESTART_CODES else "FailJobSet"
    assert jobset_action(document, code, evicted=False) == expected
    assert jobset_action(document, code, evicted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert document["spec"]["failurePolicy"]["maxRestarts"] == JOB.max_restarts


def test_skypilot_recovers_after_restartable_codes() -> None:
    recovery = skypilot.task(skypilot.SkyPilot(JOB, H100))["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": list(RESTART_CODES)}


def test_additional_restart_codes_reach_every_target() -> None:
    job = Job(name="n", recipe="r", workdir="w", restart_codes=(42, 99), max_restarts=77)
    for target, rendering in renderings(job).items():
        text = to_text(rendering)
        assert "99" in text and "134" not in text, target
        assert "77" in text or target == "skypilot", "SkyPilot recovers without a limit"


# Restart loop of TPU VMs.


def run_restart_loop(tmp_path: Path, codes: list[int], max_restarts: int) -> tuple[int, int]:
    """Return the restart loop's exit code and number of runs of a command that ends with these codes in turn."""
    count = tmp_path / "count"
    count.write_text("")
    script = f'printf x >>{count}; n=$(wc -c <{count}); set -- {" ".join(map(str, codes))}; shift $((n - 1)); exit "$1"'
    code = Supervisor(["sh", "-c", script], max_restarts=max_restarts, restart_codes=RESTART_CODES, seconds=0).run()
    return code, len(count.read_text())


def test_restart_loop_restarts_after_restartable_codes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_restart_loop(tmp_path, [42, 134, 137, 143, 0], 10) == (0, 5)
    assert run_restart_loop(tmp_path, [42, 1, 0], 10) == (1, 2)
    capfd.readouterr()
    assert run_restart_loop(tmp_path, [42, 42, 42, 0], 2) == (42, 3)
    assert capfd.readouterr().err.splitlines() == [f"restart_loop: exit code 42, restart {n} of 2" for n in (1, 2)]


def test_delay_doubles_until_a_run_has_lasted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, delays = 0.0, []

    def advance(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    def once(lengths: Iterator[float]) -> int:
        advance(next(lengths))
        return 42

    loop = RestartLoop(max_restarts=9, restart_codes=[42], seconds=10, report=lambda line: None)
    monkeypatch.setattr("t5x_like.launching.restart_loop.time.monotonic", lambda: clock)
    monkeypatch.setattr(loop, "_wait", delays.append)
    lengths = iter([5.0] * 7 + [1000.0, 5.0, 5.0])
    assert loop.run(lambda: once(lengths)) == 42
    assert delays == [10, 20, 40, 80, 160, 300, 300, 10, 10]


# As when a thread waits in the kernel for a disk: the first thread has ended, and another one has not.
ENDS_BY_HALF = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the state of a process is read from /proc")
@pytest.mark.parametrize("can_be_killed", [True, False])
def test_restart_loop_kills_or_gives_up_a_command_that_has_not_ended_completely(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], can_be_killed: bool
) -> None:
    monkeypatch.setattr(restart_loop, "KILL_SECONDS", 1.0 if can_be_killed else 0.2)
    monkeypatch.setattr(restart_loop, "_POLL_SECONDS", 0.05)
    kill, given_up = Supervisor._kill, []
    if not can_be_killed:
        monkeypatch.setattr(Supervisor, "_kill", staticmethod(given_up.append))
    command = [sys.executable, "-c", ENDS_BY_HALF]
    code = Supervisor(command, max_restarts=1, restart_codes=(EXIT_RESUMABLE,), seconds=0).run()
    output = capfd.readouterr().err
    assert "killing process" in output and "restart 1" not in output
    if can_be_killed:
        assert code == 128 + signal.SIGKILL and "cannot be killed" not in output
    else:
        # It is not started again beside the process that still runs.
        assert code == EXIT_RESUMABLE and "cannot be killed" in output
        kill(given_up[0])
        given_up[0].wait(60)


def test_restart_loop_forwards_signals_and_refuses_a_second_instance(tmp_path: Path) -> None:
    pid_file, started = tmp_path / "pid", tmp_path / "started"
    child = f"trap 'exit 42' TERM; touch {started}; while :; do sleep 0.05; done"
    argv = [
        sys.executable,
        "-m",
        "t5x_like.launching.restart_loop",
        "--pid-file",
        str(pid_file),
        "--",
        "sh",
        "-c",
        child,
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not started.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        second = subprocess.run(argv, env=environment, capture_output=True, text=True)
        assert second.returncode == 3 and "still running" in second.stderr
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
        _, error = process.communicate(timeout=240)
    assert process.returncode == 42, "a stopped command must not be restarted"
    assert error == "restart_loop: exit code 42\n"


# Cluster detection.


def flags_of(command: list[str]) -> Any:
    parser = argparse.ArgumentParser()
    train.register(parser.add_subparsers())
    return process_flags(parser.parse_known_args(command[command.index("train") :])[0])


def command_of(script: str) -> list[str]:
    """Return the words of the command that starts the program, as a shell reads them."""
    # The command may have several lines, which end with a backslash, and may come after `exec` or `srun`.
    lines = script.replace("\\\n", " ").splitlines()
    (line,) = (line for line in lines if " train " in line)
    body = line.partition("||")[0]
    printed = subprocess.run(["bash", "-c", f"set -- {body.strip()}; printf '%s\\0' \"$@\""], capture_output=True)
    return printed.stdout.decode().split("\0")[:-1]


def test_slurm_processes_are_detected() -> None:
    spec = slurm.Slurm(JOB, nodes=2, gpus_per_node=8)
    flags = flags_of(command_of(slurm.batch_script(spec)))
    assert flags.expect_processes == flags.expect_devices == spec.num_processes == 16
    for task in range(16):
        environment = {
            "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "16", "SLURM_PROCID": str(task),
            "SLURM_LOCALID": str(task % 8), "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
            "SLURM_NODEID": str(task // 8), "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
        }  # fmt: skip
        info = detect_cluster(flags, environment)
        assert (info.launcher, info.process_count, info.process_index) == ("slurm", 16, task)
        assert info.local_device_ids == (task % 8,)


def test_skypilot_processes_are_detected() -> None:
    flags = flags_of(command_of(skypilot.task(skypilot.SkyPilot(JOB, H100))["run"]))
    assert (flags.expect_processes, flags.expect_devices) == (2, 16)
    for rank in range(2):
        environment = {
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": str(rank),
        }
        info = detect_cluster(flags, environment)
        assert (info.launcher, info.process_count, info.process_index) == ("skypilot", 2, rank)
        assert info.coordinator is not None and info.coordinator.startswith("10.0.0.1:")
    tpu = skypilot.task(skypilot.SkyPilot(JOB, parse_topology("v5e:4x4")))
    assert detect_cluster(flags_of(command_of(tpu["run"])), environment, on_tpu_vm=True).launcher == "gcetpu"
    assert (tpu["num_nodes"], tpu["resources"]["accelerators"]) == (1, "tpu-v5litepod-16")


def test_pods_with_gpus_are_detected() -> None:
    document = gke.jobset(gke.Gke(JOB, H100, image="image"))
    (container,) = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    flags = flags_of(container["command"])
    assert (flags.expect_processes, flags.expect_devices) == (2, 16)
    fixed = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    (index,) = (entry for entry in container["env"] if "valueFrom" in entry)
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]
    info = detect_cluster(flags, {**fixed, index["name"]: "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert (info.launcher, info.process_count, info.process_index) == ("jax", 2, 1)
    assert info.coordinator == "ul2-20b-slice-job-0-0.ul2-20b:8476", "the first pod's name in the JobSet's network"


def test_tpu_processes_are_detected() -> None:
    flags = flags_of(command_of(tpu_vm.run_script(tpu_vm.TpuVm(JOB, V5E, zone="z"))))
    assert detect_cluster(flags, {}, on_tpu_vm=True).launcher == "gcetpu"
    assert (flags.expect_processes, flags.expect_devices) == (128, 512)
    (container,) = gke.jobset(GKE)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    pod_environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_WORKER_HOSTNAMES": "a,b"}
    assert detect_cluster(flags_of(container["command"]), pod_environment, on_tpu_vm=True).launcher == "gketpu"


# Accelerators.


@pytest.mark.parametrize(
    "accelerator", [kind for kind in ACCELERATORS if "nvl" not in kind.name and "pcie" not in kind.name]
)
def test_every_accelerator_has_cloud_names(accelerator: Any) -> None:
    topology = parse_topology({2: "{}:4x4", 3: "{}:4x4x4", 0: "{}:8"}[accelerator.axes].format(accelerator.name))
    assert accelerator_names.cloud_names(topology).gke
    assert accelerator_names.chips_per_host(topology) * topology.num_hosts == topology.num_chips


@pytest.mark.parametrize(
    ("topology", "name"),
    [("v5e:16x16", "v5litepod-256"), ("v5p:4x4x4", "v5p-128"), ("v4:2x2x2", "v4-16"), ("v6e:8x8", "v6e-64")],
)
def test_accelerator_types_of_topologies(topology: str, name: str) -> None:
    assert accelerator_names.accelerator_type(parse_topology(topology)) == name


def test_shapes_that_accelerator_types_cannot_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="v5p:8x8x8"):
        accelerator_names.accelerator_type(Topology(parse_topology("v5p:4x4x8").accelerator, (4, 4, 32)))
    with pytest.raises(ConfigError, match="TPU VMs"):
        tpu_vm.render(tpu_vm.TpuVm(JOB, parse_topology("tpu7x:4x4x4"), zone="z"))
    with pytest.raises(ConfigError, match="skypilot"):
        skypilot.render(skypilot.SkyPilot(JOB, V5E))


@pytest.mark.parametrize("name", ["ul2_20b", "a b", "1", "-", "", "é" * 90, "x" * 90, "UL2", "a;b", "run-1", "a\nb"])
def test_resource_names_are_valid(name: str) -> None:
    resource = resource_name(name)
    assert len(resource) <= 40 and resource[0].isalpha() and resource[-1].isalnum()
    assert all(
        letter.isascii() and (letter.isalnum() or letter == "-") and letter == letter.lower() for letter in resource
    )
    assert (resource == name) == (name == "run-1")


def test_different_names_give_different_resource_names() -> None:
    names = ["a b", "a;b", "a\nb", "a--b", "x" * 80, "x" * 81]
    assert len({resource_name(name) for name in names}) == len(names)


def test_packed_source_excludes_hidden_files_runs_and_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        "pyproject.toml",
        "t5x_like/cli/main.py",
        "configs/runs/mine.py",
        "t5x_like/data/runs/x",
        "t5x_like/build.py",
    ]
    for name in [*wanted, ".git/x", ".venv/x", ".venv-launch/x", "runs/x", "build/x", "t5x_like/__pycache__/x"]:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    Path("launch").mkdir()
    spec = tpu_vm.TpuVm(JOB, V5E, zone="z", source="source")
    (pack,) = (step.argv for step in tpu_vm.render(spec).steps if step.argv[0] == "tar")
    subprocess.run(pack, check=True)
    # As the worker's script unpacks it.
    (unpack,) = (line for line in tpu_vm.setup_script(spec).splitlines() if line.startswith("tar "))
    Path("launch/source").mkdir()
    subprocess.run(["bash", "-c", unpack], cwd="launch", check=True)
    unpacked = [str(path.relative_to("launch/source")) for path in Path("launch/source").rglob("*") if path.is_file()]
    assert sorted(unpacked) == sorted(wanted)


# Secrets.


def test_values_of_secrets_are_not_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = "hf_" + "planted" * 4
    monkeypatch.setenv("HF_TOKEN", planted)
    job = Job(name="n", recipe="r", workdir="w", secrets=("HF_TOKEN",))
    for target, rendering in renderings(job).items():
        text = to_text(rendering)
        assert "HF_TOKEN" in text and planted not in text, target
    task = yaml.safe_load(renderings(job)["skypilot"].files[skypilot.TASK])
    assert task["secrets"] == {"HF_TOKEN": None} and "envs" not in task


@pytest.mark.parametrize(
    "token", ["hf_" + "a" * 30, "AKIA" + "A" * 16, "-----BEGIN RSA PRIVATE KEY-----", "ghp_" + "a" * 36]
)
def test_access_tokens_in_arguments_are_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="--secret"):
        Job(name="n", recipe="r", workdir="w", env={"TOKEN": token})
    with pytest.raises(ConfigError, match="--secret"):
        Job(name="n", recipe="r", workdir="w", arguments=("--x", token))


@pytest.mark.parametrize(
    "wrong",
    [{"env": {"A=B": "x"}}, {"secrets": ("A B",)}, {"env": {"A": "x"}, "secrets": ("A",)}, {"arguments": ("a\0b",)},
     {"restart_codes": (0,)}, {"max_restarts": -1}, {"workdir": "\udcff"}],
)  # fmt: skip
def test_invalid_jobs_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Job(**{"name": "n", "recipe": "r", "workdir": "w", **wrong})


# The command.


def test_launch_without_execute_only_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        "launch",
        "gke",
        "smoke",
        "--topology",
        "v5e:4x4",
        "--image",
        "i",
        "--bucket",
        "gs://b/here/",
        "--",
        "--training.global-batch-size",
        "16",
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "kind: JobSet" in text and "kubectl" in text and '"--training.global-batch-size"' in text
    assert '"gs://b/here/runs/smoke"' in text and '"gs://b/here/stores"' in text
    assert list(tmp_path.iterdir()) == []
    Path("mine.py").touch()
    assert main([*arguments[:3], "--plugin", "mine.py", "--trust", "mine.py", *arguments[3:]]) == 0
    text = capsys.readouterr().out
    assert re.search(r"--plugin\W+mine.py\W+--trust\W+mine.py\W+--training.global-batch-size", text)
    Path("mine.py").unlink()
    assert main([*arguments[:3], "--output", "here", *arguments[3:]]) == 0
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["commands.sh", "jobset.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["slurm", "smoke", "--gpus-per-node", "8", "--", "--training.batch-sise", "1"],
            "--training.global-batch-size",
        ),
        (["slurm", "smoke", "--gpus-per-nod", "8"], "--gpus-per-node"),
        (["slurm", "smoke"], "--gpus-per-node"),
        (["slurm", "smoke", "--topology", "h100:16", "--nodes", "3"], "expected 2, or only one of both"),
        (["gke", "smoke", "--image", "i", *_BUCKET], "--topology"),
        (["gke", "smoke", "--image", "i", "--topology", "cpu:4", *_BUCKET], "TPUs or GPUs"),
        (["skypilot", "smoke", "--topology", "cpu:4", *_BUCKET], "TPUs or GPUs"),
        (["slurm", "smoke", "--topology", "v5e:4x4"], "h100:16"),
        (["slurm", "smoke", "--gpus-per-node", "8", "--sbatch", "qos=a b"], "without spaces"),
    ],
)
def test_errors_of_train_and_target_are_found_at_launch(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["launch", *arguments]) == 2
    assert message in capsys.readouterr().err


_PLACES = {
    ("tpu-vm", "--zone", "z"): "--bucket.*--workdir URL, or a shared volume by --nfs",
    ("gke", "--image", "i"): "--bucket.*--workdir URL, or a shared volume by --claim",
    ("skypilot",): "--bucket.*--workdir URL",
}


@pytest.mark.parametrize(("target", "message"), _PLACES.items(), ids=lambda part: part[0] if part else "")
def test_machines_without_a_shared_disk_get_a_bucket(target: tuple[str, ...], message: str, capsys: Any) -> None:
    name, *options = target
    arguments = ["launch", name, "smoke", "--topology", "v5e:4x4", *options]
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    overrides = ["--data.seed", "3", "--training.global-batch-size", "16"]
    assert main([*arguments, "--bucket", "gs://b/p", "--", *overrides]) == 0
    text = capsys.readouterr().out
    assert "gs://b/p/runs/smoke" in text and "roles/storage.objectUser on gs://b" in text and "mnt" not in text
    assert "t5x-like prepare smoke --data.seed 3 --data.store-dir gs://b/p/stores" in text
    # Whoever names the places gets these.
    assert main([*arguments, "--workdir", "s3://other/run", "--", "--data.store-dir", "s3://other/stores"]) == 0
    text = capsys.readouterr().out
    assert "s3://other/run" in text and "the rights to get, put, delete and list on s3://other" in text
    assert "t5x-like prepare" not in text
    assert main([*arguments, "--bucket", "az://b"]) == 2
    assert "az://b" in capsys.readouterr().err


def test_missing_program_is_refused_before_execution(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "slurm", "smoke", "--gpus-per-node", "1", "--execute"]) == 2
    assert "no sbatch" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_execution_stops_at_the_first_failure(tmp_path: Path) -> None:
    done = tmp_path / "done"
    steps = (
        Step("a", ("sh", "-c", f"echo a >>{done}")),
        Step("b", ("sh", "-c", f"echo $(( $(wc -l <{done}) ))"), until="1"),
        Step("later", ("sh", "-c", f"echo later >>{done}"), "follow"),
        Step("c", ("sh", "-c", "exit 7")),
        Step("d", ("sh", "-c", f"echo d >>{done}")),
    )
    reported: list[str] = []
    assert execute(Rendering(tmp_path / "files", {"x": "y"}, steps), reported.append) == 7
    assert done.read_text() == "a\n" and (tmp_path / "files" / "x").read_text() == "y"
    assert [line.partition(":")[0] for line in reported] == ["a", "b", "c", "exit code 7"]


def test_command_imports_nothing_from_the_folder_that_it_starts_in(tmp_path: Path) -> None:
    """A run directory of others may hold a module with the name of one that is imported."""
    for name in ("argparse", "jax", "t5x_like"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this was imported')")
    command = Job(name="n", recipe=str(REPOSITORY / "configs/runs/smoke.py"), workdir="w").train(sys.executable)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [*command, "--print-config"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert '"schema_version"' in result.stdout
