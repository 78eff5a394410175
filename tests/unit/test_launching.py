"""What launchers render: one table of exit codes, one resolver, and no secrets. Quoting has a file of its own."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_examples import REPOSITORY

from t5x_like.cli import main
from t5x_like.commands import train
from t5x_like.commands.arguments import process_flags
from t5x_like.config import ConfigError
from t5x_like.config.errors import EXIT_CODES, RESTART_CODES
from t5x_like.launching import clouds, gke, skypilot, slurm, tpu_vm
from t5x_like.launching.execute import execute
from t5x_like.launching.job import Job, resource_name
from t5x_like.launching.rendering import Rendering, Step, to_text
from t5x_like.launching.supervise import Supervisor
from t5x_like.partitioning.launchers import resolve
from t5x_like.planning.topologies import ACCELERATORS, Topology, parse_topology

JOB = Job(name="ul2_20b", recipe="ul2", workdir="/runs/ul2")
V5E, H100 = parse_topology("v5e:16x16", num_slices=2), parse_topology("h100:16")
GKE = gke.Gke(job=JOB, topology=V5E, image="image")


def renderings(job: Job = JOB, directory: Path = Path("launch")) -> dict[str, Rendering]:
    return {
        "tpu-vm": tpu_vm.render(tpu_vm.TpuVm(job, V5E, zone="z", directory=directory)),
        "gke": gke.render(gke.Gke(job, V5E, image="image", directory=directory)),
        "gke of GPUs": gke.render(gke.Gke(job, H100, image="image", directory=directory)),
        "slurm": slurm.render(slurm.Slurm(job, nodes=2, directory=directory)),
        "skypilot": skypilot.render(skypilot.SkyPilot(job, H100, directory=directory)),
    }


# One table of exit codes.


def test_the_table_has_each_code_once() -> None:
    codes = [entry.code for entry in EXIT_CODES]
    assert len(set(codes)) == len(codes)
    assert RESTART_CODES == (42, 134, 137, 143)


def run_batch_script(folder: Path, script: str, code: int, restarts: int = 0) -> tuple[int, bool]:
    """The exit code of the batch script whose processes end with `code`, and whether it asked for itself again."""
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
def test_slurm_restarts_as_the_table_says(tmp_path: Path, code: int) -> None:
    script = slurm.batch_script(slurm.Slurm(JOB))
    assert run_batch_script(tmp_path, script, code) == (code, code in RESTART_CODES)
    assert run_batch_script(tmp_path, script, code, restarts=JOB.max_restarts) == (code, False)


def jobset_action(document: dict[str, Any], code: int, *, evicted: bool) -> str:
    """What the controllers of Job and JobSet do when a pod ends so, by their documented rules."""
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
def test_a_jobset_restarts_as_the_table_says(code: int) -> None:
    document = gke.jobset(GKE)
    expected = "RestartJobSet" if code in RESTART_CODES else "FailJobSet"
    assert jobset_action(document, code, evicted=False) == expected
    assert jobset_action(document, code, evicted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert document["spec"]["failurePolicy"]["maxRestarts"] == JOB.max_restarts


def test_skypilot_recovers_as_the_table_says() -> None:
    recovery = skypilot.task(skypilot.SkyPilot(JOB, H100))["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": list(RESTART_CODES)}


def test_a_further_code_reaches_every_target() -> None:
    job = Job(name="n", recipe="r", workdir="w", restart_codes=(42, 99), max_restarts=77)
    for target, rendering in renderings(job).items():
        text = to_text(rendering)
        assert "99" in text and "134" not in text, target
        assert "77" in text or target == "skypilot", "SkyPilot recovers without a limit"


# The supervisor of TPU VMs.


def supervised(tmp_path: Path, codes: list[int], max_restarts: int) -> tuple[int, int]:
    """The supervisor's exit code, and how often it ran a command that ends with these codes in turn."""
    count = tmp_path / "count"
    count.write_text("")
    script = f'printf x >>{count}; n=$(wc -c <{count}); set -- {" ".join(map(str, codes))}; shift $((n - 1)); exit "$1"'
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = Supervisor(["sh", "-c", script], max_restarts=max_restarts, restart_codes=RESTART_CODES, seconds=0).run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code, len(count.read_text())


def test_the_supervisor_restarts_as_the_table_says(tmp_path: Path) -> None:
    assert supervised(tmp_path, [42, 134, 137, 143, 0], 10) == (0, 5)
    assert supervised(tmp_path, [42, 1, 0], 10) == (1, 2)
    assert supervised(tmp_path, [42, 42, 42, 0], 2) == (42, 3)


def test_the_supervisor_hands_on_signals_and_refuses_a_second(tmp_path: Path) -> None:
    pid_file, started = tmp_path / "pid", tmp_path / "started"
    child = f"trap 'exit 42' TERM; touch {started}; while :; do sleep 0.05; done"
    argv = [sys.executable, "-m", "t5x_like.launching.supervise", "--pid-file", str(pid_file), "--", "sh", "-c", child]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not started.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        second = subprocess.run(argv, env=environment, capture_output=True, text=True)
        assert second.returncode == 3 and "still runs" in second.stderr
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 42, "who stops it does not want it started again"
    assert error == "supervise: exit code 42\n"


# One resolver of start-up.


def flags_of(command: list[str]) -> Any:
    parser = argparse.ArgumentParser()
    train.register(parser.add_subparsers())
    return process_flags(parser.parse_known_args(command[command.index("train") :])[0])


def command_of(script: str) -> list[str]:
    """The words behind the last `exec` or `srun`, as a shell reads them."""
    body = script[max(script.rfind("\nexec "), script.rfind("\nsrun ")) :].partition("||")[0]
    printed = subprocess.run(["bash", "-c", f"set -- {body.strip()}; printf '%s\\0' \"$@\""], capture_output=True)
    return printed.stdout.decode().split("\0")[:-1]


def test_slurm_processes_are_found_by_the_resolver() -> None:
    spec = slurm.Slurm(JOB, nodes=2, gpus_per_node=8)
    flags = flags_of(command_of(slurm.batch_script(spec)))
    assert flags.expect_processes == flags.expect_devices == spec.num_processes == 16
    for task in range(16):
        environment = {
            "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "16", "SLURM_PROCID": str(task),
            "SLURM_LOCALID": str(task % 8), "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
            "SLURM_NODEID": str(task // 8), "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
        }  # fmt: skip
        found = resolve(flags, environment)
        assert (found.launcher, found.process_count, found.process_index) == ("slurm", 16, task)
        assert found.local_device_ids == (task % 8,)


def test_skypilot_processes_are_found_by_the_resolver() -> None:
    flags = flags_of(command_of(skypilot.task(skypilot.SkyPilot(JOB, H100))["run"]))
    assert (flags.expect_processes, flags.expect_devices) == (2, 16)
    for rank in range(2):
        environment = {
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": str(rank),
        }
        found = resolve(flags, environment)
        assert (found.launcher, found.process_count, found.process_index) == ("skypilot", 2, rank)
        assert found.coordinator is not None and found.coordinator.startswith("10.0.0.1:")
    tpu = skypilot.task(skypilot.SkyPilot(JOB, parse_topology("v5e:4x4")))
    assert resolve(flags_of(command_of(tpu["run"])), environment, on_tpu_vm=True).launcher == "gcetpu"
    assert (tpu["num_nodes"], tpu["resources"]["accelerators"]) == (1, "tpu-v5litepod-16")


def test_pods_with_gpus_are_found_by_the_resolver() -> None:
    document = gke.jobset(gke.Gke(JOB, H100, image="image"))
    (container,) = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    flags = flags_of(container["command"])
    assert (flags.expect_processes, flags.expect_devices) == (2, 16)
    fixed = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    (index,) = (entry for entry in container["env"] if "valueFrom" in entry)
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]
    found = resolve(flags, {**fixed, index["name"]: "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert (found.launcher, found.process_count, found.process_index) == ("jax", 2, 1)
    assert found.coordinator == "ul2-20b-slice-job-0-0.ul2-20b:8476", "the first pod's name in the JobSet's network"


def test_tpu_processes_are_found_by_the_resolver() -> None:
    flags = flags_of(command_of(tpu_vm.run_script(tpu_vm.TpuVm(JOB, V5E, zone="z"))))
    assert resolve(flags, {}, on_tpu_vm=True).launcher == "gcetpu"
    assert (flags.expect_processes, flags.expect_devices) == (128, 512)
    (container,) = gke.jobset(GKE)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    of_pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_WORKER_HOSTNAMES": "a,b"}
    assert resolve(flags_of(container["command"]), of_pod, on_tpu_vm=True).launcher == "gketpu"


# Machines.


@pytest.mark.parametrize(
    "accelerator", [kind for kind in ACCELERATORS if "nvl" not in kind.name and "pcie" not in kind.name]
)
def test_every_machine_has_its_names(accelerator: Any) -> None:
    topology = parse_topology({2: "{}:4x4", 3: "{}:4x4x4", 0: "{}:8"}[accelerator.axes].format(accelerator.name))
    assert clouds.cloud_names(topology).gke
    assert clouds.chips_per_host(topology) * topology.num_hosts == topology.num_chips


@pytest.mark.parametrize(
    ("topology", "name"),
    [("v5e:16x16", "v5litepod-256"), ("v5p:4x4x4", "v5p-128"), ("v4:2x2x2", "v4-16"), ("v6e:8x8", "v6e-64")],
)
def test_accelerator_types(topology: str, name: str) -> None:
    assert clouds.accelerator_type(parse_topology(topology)) == name


def test_a_shape_that_a_name_does_not_mean_is_refused() -> None:
    with pytest.raises(ConfigError, match="v5p:8x8x8"):
        clouds.accelerator_type(Topology(parse_topology("v5p:4x4x8").accelerator, (4, 4, 32)))
    with pytest.raises(ConfigError, match="TPU VMs"):
        tpu_vm.render(tpu_vm.TpuVm(JOB, parse_topology("tpu7x:4x4x4"), zone="z"))
    with pytest.raises(ConfigError, match="skypilot"):
        skypilot.render(skypilot.SkyPilot(JOB, V5E))


@pytest.mark.parametrize("name", ["ul2_20b", "a b", "1", "-", "", "é" * 90, "x" * 90, "UL2", "a;b", "run-1", "a\nb"])
def test_names_of_resources(name: str) -> None:
    found = resource_name(name)
    assert len(found) <= 40 and found[0].isalpha() and found[-1].isalnum()
    assert all(
        letter.isascii() and (letter.isalnum() or letter == "-") and letter == letter.lower() for letter in found
    )
    assert (found == name) == (name == "run-1")


def test_names_that_differ_stay_apart() -> None:
    names = ["a b", "a;b", "a\nb", "a--b", "x" * 80, "x" * 81]
    assert len({resource_name(name) for name in names}) == len(names)


def test_the_source_is_packed_without_what_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["pyproject.toml", "t5x_like/cli.py", "configs/runs/mine.py", "t5x_like/data/runs/x", "t5x_like/build.py"]
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


def test_values_of_secrets_are_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_tokens_in_the_open_are_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="--secret"):
        Job(name="n", recipe="r", workdir="w", env={"TOKEN": token})
    with pytest.raises(ConfigError, match="--secret"):
        Job(name="n", recipe="r", workdir="w", arguments=("--x", token))


@pytest.mark.parametrize(
    "wrong",
    [{"env": {"A=B": "x"}}, {"secrets": ("A B",)}, {"env": {"A": "x"}, "secrets": ("A",)}, {"arguments": ("a\0b",)},
     {"restart_codes": (0,)}, {"max_restarts": -1}, {"workdir": "\udcff"}],
)  # fmt: skip
def test_jobs_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Job(**{"name": "n", "recipe": "r", "workdir": "w", **wrong})


# The command.


def test_printing_is_all_that_launch_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["launch", "gke", "smoke", "--topology", "v5e:4x4", "--image", "i", "--", "--training.batch-size", "16"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "kind: JobSet" in text and "kubectl" in text and '"--training.batch-size"' in text
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments[:3], "--output", "here", *arguments[3:]]) == 0
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["commands.sh", "jobset.yaml"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["slurm", "smoke", "--gpus-per-node", "8", "--", "--training.batch-sise", "1"], "--training.batch-size"),
        (["slurm", "smoke", "--gpus-per-nod", "8"], "--gpus-per-node"),
        (["slurm", "smoke"], "--gpus-per-node"),
        (["slurm", "smoke", "--topology", "h100:16", "--nodes", "3"], "expected 2, or one of both"),
        (["gke", "smoke", "--image", "i"], "--topology"),
        (["gke", "smoke", "--image", "i", "--topology", "cpu:4"], "TPUs or GPUs"),
        (["skypilot", "smoke", "--topology", "cpu:4"], "TPUs or GPUs"),
        (["slurm", "smoke", "--topology", "v5e:4x4"], "h100:16"),
        (["slurm", "smoke", "--gpus-per-node", "8", "--sbatch", "qos=a b"], "without spaces"),
    ],
)
def test_what_train_or_a_target_would_refuse_is_refused_here(arguments: list[str], says: str, capsys: Any) -> None:
    assert main(["launch", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_without_its_program_nothing_is_executed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
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
    said: list[str] = []
    assert execute(Rendering(tmp_path / "files", {"x": "y"}, steps), said.append) == 7
    assert done.read_text() == "a\n" and (tmp_path / "files" / "x").read_text() == "y"
    assert [line.partition(":")[0] for line in said] == ["a", "b", "c", "exit code 7"]
