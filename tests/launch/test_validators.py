"""What is rendered for one recipe, before the validators of those who will read it; each is shown to refuse a mistake.

`make test-launch` installs them in an environment of their own, which LAUNCH_VALIDATORS names; gcloud is used where it
is installed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from examples import EXAMPLES, FOLDER, REPOSITORY

from t5x_like.config.errors import RESTART_CODES

pytestmark = pytest.mark.launch

HERE = Path(__file__).parent
KEPT = REPOSITORY / FOLDER
BIN = Path(os.environ["LAUNCH_VALIDATORS"]) / "bin" if "LAUNCH_VALIDATORS" in os.environ else None
SCRIPTS = sorted(path for path in KEPT.glob("*/*") if path.suffix in (".sh", ".sbatch"))
JOBSETS = sorted(KEPT.glob("*/jobset.yaml"))
TASKS = sorted(KEPT.glob("*/task.yaml"))


def tool(program: str, *arguments: str | Path, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a validator's program."""
    if BIN is None:
        pytest.skip("LAUNCH_VALIDATORS names no environment; `make test-launch` makes one")
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    environment.pop("PYTHONPATH", None)
    if home is not None:
        environment["HOME"] = str(home)
    argv = [str(BIN / program), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, env=environment)


def accepted(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def refused(result: subprocess.CompletedProcess[str], says: str) -> None:
    assert result.returncode != 0 and says in result.stdout + result.stderr, result.stdout + result.stderr


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a dotted path."""
    copy: dict[str, Any] = json.loads(json.dumps(document))
    *way, last = path.split(".")
    place: Any = copy
    for name in way:
        place = place[int(name)] if name.isdecimal() else place[name]
    place[last] = value
    return copy


# Scripts.


def test_there_is_something_to_validate() -> None:
    assert len(SCRIPTS) == len(EXAMPLES) + 5 and len(JOBSETS) == 3 and len(TASKS) == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: "/".join(path.parts[-2:]))
def test_shellcheck(script: Path) -> None:
    shell = ["--shell=bash"] if script.name == "commands.sh" else []
    accepted(tool("shellcheck", "--severity=style", *shell, script))


def test_shellcheck_refuses_what_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "x.sh").write_text("#!/bin/bash\nrm $1\n")
    refused(tool("shellcheck", tmp_path / "x.sh"), "SC2086")


def test_the_container_file() -> None:
    accepted(tool("hadolint", REPOSITORY / "launch/Containerfile"))


def test_hadolint_refuses_a_shell_word_as_user(tmp_path: Path) -> None:
    (tmp_path / "Containerfile").write_text("FROM debian:latest\nRUN cd /tmp && sudo true\n")
    refused(tool("hadolint", tmp_path / "Containerfile"), "DL3004")


# Kubernetes.


def test_jobsets_are_in_the_schema() -> None:
    accepted(tool("python", HERE / "check_jobset.py", *JOBSETS))


JOB = "spec.replicatedJobs.0.template.spec"
MISTAKES = {
    "spec.failurePolicies": {},
    "spec.failurePolicy.maxRestarts": "ten",
    "spec.failurePolicy.rules.0.onJobFailureReason": [],
    f"{JOB}.podFailurePolicy.rules.1.onExitCodes.value": [1],
    f"{JOB}.template.spec.nodeSelectors": {},
    f"{JOB}.template.spec.containers.0.securityContext.priviledged": True,
    f"{JOB}.template.spec.terminationGracePeriodSeconds": None,
}


def test_the_schema_refuses_mistakes(tmp_path: Path) -> None:
    document = yaml.safe_load(JOBSETS[0].read_text())
    for where, value in MISTAKES.items():
        (tmp_path / f"{where}.yaml").write_text(yaml.safe_dump(changed(document, where, value)))
    result = tool("python", HERE / "check_jobset.py", *(tmp_path / f"{where}.yaml" for where in MISTAKES))
    for where in MISTAKES:
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(f"{tmp_path / where}.yaml"))
        assert where.rpartition(".")[2] in line
    assert result.returncode == 1


def job_of(path: Path) -> dict[str, Any]:
    """The Job that the JobSet's controller would make."""
    (replicated,) = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.parent.name)
def test_jobs_of_jobsets_are_kubernetes_own(path: Path, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(job_of(path)))
    accepted(tool("kubernetes-validate", "--strict", tmp_path / "x.yaml"))
    mistaken = changed(job_of(path), "spec.template.spec.containers.0.volumeMount", [])
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(mistaken))
    refused(tool("kubernetes-validate", "--strict", tmp_path / "x.yaml"), "volumeMount")


def xpk(tmp_path: Path, tpu_type: str, num_slices: int) -> dict[str, Any]:
    """The JobSet that Google's tool makes for the same slices."""
    settings = tmp_path / ".config/xpk/config.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text('version: v1\nconfigs:\n  send-telemetry: "false"\n')
    manifest = tmp_path / "xpk.yaml"
    options = {
        "workload": "ul2", "cluster": "c", "project": "p", "zone": "us-east5-a", "tpu-type": tpu_type,
        "num-slices": num_slices, "command": "true", "docker-image": "i", "max-restarts": 10,
        "termination-grace-period-seconds": 120, "output-manifest-file": manifest,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    accepted(tool("xpk", "workload", "create", *flags, "--dry-run", "--skip-validation", home=tmp_path))
    made: dict[str, Any] = yaml.safe_load(manifest.read_text())
    return made


@pytest.mark.parametrize(
    ("example", "tpu_type", "num_slices"), [("gke", "v5p-128", 1), ("gke-multislice", "v5litepod-256", 2)]
)
def test_jobsets_are_as_xpk_makes_them(example: str, tpu_type: str, num_slices: int, tmp_path: Path) -> None:
    theirs, ours = xpk(tmp_path, tpu_type, num_slices), yaml.safe_load((KEPT / example / "jobset.yaml").read_text())
    queue, topology = "kueue.x-k8s.io/queue-name", "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert ours["metadata"]["labels"][queue] == theirs["metadata"]["labels"][queue]
    assert ours["metadata"]["annotations"][topology] == theirs["metadata"]["annotations"][topology]
    for name in ("maxRestarts",):
        assert ours["spec"]["failurePolicy"][name] == theirs["spec"]["failurePolicy"][name]
    assert ours["spec"]["ttlSecondsAfterFinished"] == theirs["spec"]["ttlSecondsAfterFinished"]
    (our_job,), (their_job,) = ours["spec"]["replicatedJobs"], theirs["spec"]["replicatedJobs"]
    assert (our_job["name"], our_job["replicas"]) == (their_job["name"], their_job["replicas"])
    ours, theirs = our_job["template"]["spec"], their_job["template"]["spec"]
    for name in ("parallelism", "completions", "backoffLimit"):
        assert ours[name] == theirs[name], name
    our_pod, their_pod = ours["template"]["spec"], theirs["template"]["spec"]
    for name in (
        "nodeSelector",
        "restartPolicy",
        "hostNetwork",
        "dnsPolicy",
        "terminationGracePeriodSeconds",
        "tolerations",
    ):
        assert our_pod[name] == their_pod[name], name
    (our_container,), (their_container,) = our_pod["containers"], their_pod["containers"]
    assert our_container["resources"] == their_container["resources"]
    assert {mount["mountPath"] for mount in their_container["volumeMounts"]} == {"/dev/shm"}
    assert "/dev/shm" in {mount["mountPath"] for mount in our_container["volumeMounts"]}
    # xpk restarts after more codes than ours have, and after all of ours.
    (rule,) = theirs["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["operator"] == "NotIn" and set(RESTART_CODES) <= set(rule["onExitCodes"]["values"])
    assert not {1, 2, 3} & set(rule["onExitCodes"]["values"])


# SkyPilot.


def test_skypilot_reads_the_tasks(tmp_path: Path) -> None:
    mistaken = tmp_path / "task.yaml"
    mistaken.write_text(yaml.safe_dump(changed(yaml.safe_load(TASKS[0].read_text()), "resources.use_spott", True)))
    lines = accepted(tool("python", HERE / "check_tasks.py", *TASKS, mistaken, home=tmp_path)).splitlines()
    gpu, tpu, wrong = (json.loads(line) for line in lines if line.startswith("{"))
    assert (gpu["num_nodes"], gpu["accelerators"], gpu["use_spot"]) == (8, {"H100": 8}, True)
    assert gpu["job_recovery"]["recover_on_exit_codes"] == list(RESTART_CODES)
    assert gpu["secrets"] == ["HF_TOKEN"] and "HF_TOKEN" not in gpu["envs"]
    assert "t5x_like train" in gpu["run"]
    assert (tpu["num_nodes"], tpu["accelerators"]) == (1, {"tpu-v5p-128": 1})
    assert "use_spot" in wrong["refused"]


# gcloud.


def gcloud_commands() -> list[str]:
    """All gcloud commands of the examples, a line each."""
    commands = []
    for page in sorted(KEPT.glob("tpu-vm*/commands.sh")):
        for line in page.read_text().replace("\\\n", "").splitlines():
            words = shlex.split(
                line.partition("$(")[2].partition(')"')[0] if line.startswith("until") else line, comments=True
            )
            if words[:1] == ["gcloud"]:
                commands.append(shlex.join(words))
    return commands


def lint(commands: list[str], folder: Path) -> dict[str, str | None]:
    """What gcloud has against each command; None where it knows it with these flags. It asks nobody for that."""
    (folder / "commands.json").write_text(json.dumps([{"command_string": command} for command in commands]))
    argv = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={folder / 'commands.json'}"]
    result = subprocess.run(argv, capture_output=True, text=True)
    answers = json.loads(result.stdout)
    assert len(answers) == len(commands), result.stdout
    return {answer["command_string"]: None if answer["success"] else answer["error_message"] for answer in answers}


def test_gcloud_knows_the_commands(tmp_path: Path) -> None:
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed; the examples show what was accepted where it is")
    commands = gcloud_commands()
    assert len(commands) >= 17
    mistaken = f"{commands[0]} --spott"
    answers = lint([*commands, mistaken], tmp_path)
    assert "--spot" in (answers.pop(mistaken) or "")
    assert not {command: says for command, says in answers.items() if says is not None}
