"""The rendered examples pass the validators of the programs that read them; each validator is shown to refuse an error.

`make test-launch` installs the validators in a separate environment, given by LAUNCH_VALIDATORS; gcloud is used if it
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
from helpers.launch_examples import EXAMPLES, FOLDER, REPOSITORY

from t5x_like.errors import RESTART_CODES

pytestmark = pytest.mark.launch

HELPERS = Path(__file__).parents[1] / "helpers"
RENDERED = REPOSITORY / FOLDER
BIN = Path(os.environ["LAUNCH_VALIDATORS"]) / "bin" if "LAUNCH_VALIDATORS" in os.environ else None
SCRIPTS = sorted(path for path in RENDERED.glob("*/*") if path.suffix in (".sh", ".sbatch"))
JOBSETS = sorted(RENDERED.glob("*/jobset.yaml"))
TASKS = sorted(RENDERED.glob("*/task.yaml"))


def tool(program: str, *arguments: str | Path, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a validator."""
    if BIN is None:
        pytest.skip("LAUNCH_VALIDATORS is not set; `make test-launch` creates the environment")
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    environment.pop("PYTHONPATH", None)
    if home is not None:
        environment["HOME"] = str(home)
    argv = [str(BIN / program), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, env=environment)


def accepted(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode != 0 and message in result.stdout + result.stderr, result.stdout + result.stderr


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy with another value at a dotted path."""
    copy: dict[str, Any] = json.loads(json.dumps(document))
    *parents, last = path.split(".")
    node: Any = copy
    for name in parents:
        node = node[int(name)] if name.isdecimal() else node[name]
    node[last] = value
    return copy


# Scripts.


def test_all_examples_are_validated() -> None:
    assert len(SCRIPTS) == len(EXAMPLES) + 5 and len(JOBSETS) == 3 and len(TASKS) == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: "/".join(path.parts[-2:]))
def test_scripts_pass_shellcheck(script: Path) -> None:
    shell = ["--shell=bash"] if script.name == "commands.sh" else []
    accepted(tool("shellcheck", "--severity=style", *shell, script))


def test_shellcheck_refuses_unquoted_words(tmp_path: Path) -> None:
    (tmp_path / "x.sh").write_text("#!/bin/bash\nrm $1\n")
    refused(tool("shellcheck", tmp_path / "x.sh"), "SC2086")


def test_container_file_passes_hadolint() -> None:
    accepted(tool("hadolint", REPOSITORY / "launch/Containerfile"))


def test_hadolint_refuses_sudo(tmp_path: Path) -> None:
    (tmp_path / "Containerfile").write_text("FROM debian:latest\nRUN cd /tmp && sudo true\n")
    refused(tool("hadolint", tmp_path / "Containerfile"), "DL3004")


# Kubernetes.


def test_jobsets_match_the_schema() -> None:
    accepted(tool("python", HELPERS / "check_jobset.py", *JOBSETS))


JOB = "spec.replicatedJobs.0.template.spec"
ERRORS = {
    "spec.failurePolicies": {},
    "spec.failurePolicy.maxRestarts": "ten",
    "spec.failurePolicy.rules.0.onJobFailureReason": [],
    f"{JOB}.podFailurePolicy.rules.1.onExitCodes.value": [1],
    f"{JOB}.template.spec.nodeSelectors": {},
    f"{JOB}.template.spec.containers.0.securityContext.priviledged": True,
    f"{JOB}.template.spec.terminationGracePeriodSeconds": None,
}


def test_schema_refuses_errors(tmp_path: Path) -> None:
    document = yaml.safe_load(JOBSETS[0].read_text())
    for where, value in ERRORS.items():
        (tmp_path / f"{where}.yaml").write_text(yaml.safe_dump(changed(document, where, value)))
    result = tool("python", HELPERS / "check_jobset.py", *(tmp_path / f"{where}.yaml" for where in ERRORS))
    for where in ERRORS:
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(f"{tmp_path / where}.yaml"))
        assert where.rpartition(".")[2] in line
    assert result.returncode == 1


def job_of(path: Path) -> dict[str, Any]:
    """Return the Job that the JobSet controller would create."""
    (replicated,) = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.parent.name)
def test_jobs_of_jobsets_pass_kubernetes_validation(path: Path, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(job_of(path)))
    accepted(tool("kubernetes-validate", "--strict", tmp_path / "x.yaml"))
    mistaken = changed(job_of(path), "spec.template.spec.containers.0.volumeMount", [])
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(mistaken))
    refused(tool("kubernetes-validate", "--strict", tmp_path / "x.yaml"), "volumeMount")


def xpk(tmp_path: Path, tpu_type: str, num_slices: int) -> dict[str, Any]:
    """Return xpk's JobSet for the same slices."""
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
    jobset: dict[str, Any] = yaml.safe_load(manifest.read_text())
    return jobset


@pytest.mark.parametrize(
    ("example", "tpu_type", "num_slices"), [("gke", "v5p-128", 1), ("gke-multislice", "v5litepod-256", 2)]
)
def test_jobsets_equal_those_of_xpk(example: str, tpu_type: str, num_slices: int, tmp_path: Path) -> None:
    expected, rendered = (
        xpk(tmp_path, tpu_type, num_slices),
        yaml.safe_load((RENDERED / example / "jobset.yaml").read_text()),
    )
    queue, topology = "kueue.x-k8s.io/queue-name", "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert rendered["metadata"]["labels"][queue] == expected["metadata"]["labels"][queue]
    assert rendered["metadata"]["annotations"][topology] == expected["metadata"]["annotations"][topology]
    for name in ("maxRestarts",):
        assert rendered["spec"]["failurePolicy"][name] == expected["spec"]["failurePolicy"][name]
    assert rendered["spec"]["ttlSecondsAfterFinished"] == expected["spec"]["ttlSecondsAfterFinished"]
    (job,), (expected_job,) = rendered["spec"]["replicatedJobs"], expected["spec"]["replicatedJobs"]
    assert (job["name"], job["replicas"]) == (expected_job["name"], expected_job["replicas"])
    rendered, expected = job["template"]["spec"], expected_job["template"]["spec"]
    for name in ("parallelism", "completions", "backoffLimit"):
        assert rendered[name] == expected[name], name
    pod, expected_pod = rendered["template"]["spec"], expected["template"]["spec"]
    for name in (
        "nodeSelector",
        "restartPolicy",
        "hostNetwork",
        "dnsPolicy",
        "terminationGracePeriodSeconds",
        "tolerations",
    ):
        assert pod[name] == expected_pod[name], name
    (container,), (expected_container,) = pod["containers"], expected_pod["containers"]
    assert container["resources"] == expected_container["resources"]
    assert {mount["mountPath"] for mount in expected_container["volumeMounts"]} == {"/dev/shm"}
    assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    # xpk restarts after all of these codes, and after others.
    (rule,) = expected["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["operator"] == "NotIn" and set(RESTART_CODES) <= set(rule["onExitCodes"]["values"])
    assert not {1, 2, 3} & set(rule["onExitCodes"]["values"])


# SkyPilot.


def test_skypilot_parses_the_tasks(tmp_path: Path) -> None:
    mistaken = tmp_path / "task.yaml"
    mistaken.write_text(yaml.safe_dump(changed(yaml.safe_load(TASKS[0].read_text()), "resources.use_spott", True)))
    lines = accepted(tool("python", HELPERS / "check_tasks.py", *TASKS, mistaken, home=tmp_path)).splitlines()
    gpu, tpu, wrong = (json.loads(line) for line in lines if line.startswith("{"))
    assert (gpu["num_nodes"], gpu["accelerators"], gpu["use_spot"]) == (8, {"H100": 8}, True)
    assert gpu["job_recovery"]["recover_on_exit_codes"] == list(RESTART_CODES)
    assert gpu["secrets"] == ["HF_TOKEN"] and "HF_TOKEN" not in gpu["envs"]
    assert "t5x_like train" in gpu["run"]
    assert (tpu["num_nodes"], tpu["accelerators"]) == (1, {"tpu-v5p-128": 1})
    assert "use_spot" in wrong["refused"]


# gcloud.


def gcloud_commands() -> list[str]:
    """Return all gcloud commands of the examples."""
    commands = []
    for page in sorted(RENDERED.glob("tpu-vm*/commands.sh")):
        for line in page.read_text().replace("\\\n", "").splitlines():
            words = shlex.split(
                line.partition("$(")[2].partition(')"')[0] if line.startswith("until") else line, comments=True
            )
            if words[:1] == ["gcloud"]:
                commands.append(shlex.join(words))
    return commands


def lint(commands: list[str], folder: Path) -> dict[str, str | None]:
    """Return gcloud's error for each command; None if the command and its flags are valid. This needs no network."""
    (folder / "commands.json").write_text(json.dumps([{"command_string": command} for command in commands]))
    argv = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={folder / 'commands.json'}"]
    result = subprocess.run(argv, capture_output=True, text=True)
    answers = json.loads(result.stdout)
    assert len(answers) == len(commands), result.stdout
    return {answer["command_string"]: None if answer["success"] else answer["error_message"] for answer in answers}


def test_gcloud_accepts_the_commands(tmp_path: Path) -> None:
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    commands = gcloud_commands()
    assert len(commands) >= 17
    mistaken = f"{commands[0]} --spott"
    answers = lint([*commands, mistaken], tmp_path)
    assert "--spot" in (answers.pop(mistaken) or "")
    assert not {command: error for command, error in answers.items() if error is not None}
