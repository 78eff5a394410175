"""Quoting: shells and YAML readers return every text unchanged, tested by running the shells."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t5x_like.hardware.topologies import parse_topology
from t5x_like.launching import gke, skypilot, slurm, tpu_vm
from t5x_like.launching.executor import write
from t5x_like.launching.job import Job
from t5x_like.launching.rendering import Rendering, commands_text
from t5x_like.launching.text import to_yaml

DIFFICULT_TEXTS = (
    "", " ", "a b", "'", '"', "it's", '"quoted"', "a;b", "$(touch here)", "`touch here`", "${HOME}", "$$", "$(A)",
    "$$(A)", "a\nb", "\n", "a\\", "\\n", "*", "?", "~", "!x", "# no comment", "a\tb", "\r", "é", "日本語", "🙂",
    "\u2028", "\x7f", "\x1b[31m", "&& exit 3", "| cat", "> file", "-n", "--", "--a=b", "%x", "{{ x }}", "{a,b}", "EOF",
    "yes", "null", "1e3", "0x1F", "12:30:45", "1_000", "=", "- a", "a: b", "[", "@", "\ufeff", "\x85", "\n\x85",
)  # fmt: skip
WORDS = st.one_of(
    st.sampled_from(DIFFICULT_TEXTS),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
    st.lists(st.sampled_from(DIFFICULT_TEXTS), max_size=4).map("".join),
)
TPU, GPU = parse_topology("v5e:16x16", num_slices=2), parse_topology("h100:16")
RECORD_CALL = '#!/bin/sh\nprintf \'%s\\0\' "$0" "$@" >>"$RECORD"\nprintf \'%s\' "$TESTED" >"$RECORD.variable"\n'


class Sandbox:
    """Directory with programs that only record their calls."""

    def __init__(self, root: Path, *programs: str) -> None:
        self.root = root
        self.record = root / "record"
        for program in programs:
            path = root / program
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(RECORD_CALL)
            path.chmod(0o755)

    def run(self, script: str | Path, cwd: Path | None = None) -> list[str]:
        """Run a script and return the words of the recorded calls."""
        self.record.unlink(missing_ok=True)
        argv = ["bash", str(script)] if isinstance(script, Path) else ["bash", "-c", script]
        environment = {**os.environ, "PATH": f"{self.root}:{os.environ['PATH']}", "RECORD": str(self.record)}
        environment |= {"SLURM_JOB_ID": "1", "HOME": str(self.root)}
        result = subprocess.run(argv, cwd=cwd or self.root, env=environment, capture_output=True)
        assert result.returncode == 0, result.stderr
        return self.record.read_bytes().decode().split("\0")[:-1]

    @property
    def variable(self) -> str:
        return Path(f"{self.record}.variable").read_bytes().decode()


def check_slurm(job: Job, root: Path) -> None:
    sandbox = Sandbox(root, "srun")
    called = sandbox.run(slurm.batch_script(slurm.Slurm(job, python="py thon")))
    begin = called.index("py thon")
    assert tuple(called[begin:]) == job.train("py thon", *called[begin + 8 : called.index(job.arguments[0], begin + 8)])
    assert sandbox.variable == job.env["TESTED"]


def check_worker(job: Job, root: Path) -> None:
    sandbox = Sandbox(root, "venv/bin/python")
    (root / "source").mkdir()
    (root / "run.sh").write_text(tpu_vm.run_script(tpu_vm.TpuVm(job, TPU, zone="z")))
    called = sandbox.run(root / "run.sh")
    assert called[-len(job.arguments) :] == list(job.arguments)
    assert [job.recipe, "--workdir", job.workdir] == called[called.index("train") + 1 :][:3]
    assert sandbox.variable == job.env["TESTED"]


def check_skypilot(job: Job, root: Path) -> None:
    sandbox = Sandbox(root, ".venv/bin/python")
    document = yaml.safe_load(to_yaml(skypilot.task(skypilot.SkyPilot(job, GPU))))
    assert document["envs"] == job.env
    called = sandbox.run("export TESTED=x\n" + document["run"])
    assert called[-len(job.arguments) :] == list(job.arguments)
    assert [job.recipe, "--workdir", job.workdir] == called[called.index("train") + 1 :][:3]


def expanded(text: str, variables: dict[str, str]) -> str:
    """Expand a text as Kubernetes does: `$$` becomes `$`, and a known `$(NAME)` its value."""

    def replace(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replace, text, flags=re.DOTALL)


def check_pods(job: Job, privileged: bool) -> None:
    for topology in (TPU, GPU):
        spec = gke.Gke(job, topology, image="i", privileged=privileged)
        document = yaml.safe_load(to_yaml(gke.jobset(spec)))
        assert document == gke.jobset(spec)
        (container,) = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
        variables = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        assert expanded(variables["TESTED"], {"A": "wrong"}) == job.env["TESTED"]
        command = [expanded(word, {"A": "wrong", **variables}) for word in container["command"]]
        assert command[-len(job.arguments) :] == list(job.arguments)
        assert [job.recipe, "--workdir", job.workdir] == command[command.index("train") + 1 :][:3]
        assert document["metadata"]["annotations"]["t5x-like/run"] == job.name


def check_commands(rendering: Rendering, root: Path) -> None:
    """Run the rendered commands with bash and check that each is called with its own words."""
    programs = sorted({step.argv[0] for step in rendering.steps})
    sandbox = Sandbox(root, *programs)
    # Commands that wait for a state get it at once.
    states = [step.until for step in rendering.steps if step.until]
    for program in programs if states else ():
        path = root / program
        path.write_text(f"{path.read_text()}printf {states[0]}\n")
    called = sandbox.run(commands_text(rendering))
    expected = [word for step in rendering.steps for word in (str(root / step.argv[0]), *step.argv[1:])]
    assert called == expected


@settings(max_examples=25, deadline=None)
@example(["a b", "$(touch here)"], "run;1", "it's", "a\nb", "`x`")
@example(list(DIFFICULT_TEXTS), "\n", "$$(A)", "\\", "\n\n")
@given(st.lists(WORDS, max_size=6), WORDS, WORDS, WORDS, WORDS)
def test_job_texts_are_passed_unchanged(words: list[str], name: str, recipe: str, workdir: str, value: str) -> None:
    # The first argument marks the end of the launcher's own arguments.
    job = Job(name, recipe, workdir, arguments=("--mark of this test", *words), env={"TESTED": value})
    root = Path(tempfile.mkdtemp())
    try:
        for number, check in enumerate((check_slurm, check_worker, check_skypilot)):
            (root / str(number)).mkdir()
            check(job, root / str(number))
        check_pods(job, privileged=bool(len(words) % 2))
        assert not list(root.rglob("here")), "a text was executed"
    finally:
        shutil.rmtree(root)


@settings(max_examples=6, deadline=None)
@example("it's $(touch here);\n&", "`touch here`")
@given(WORDS, WORDS)
def test_commands_are_passed_unchanged(folder: str, value: str) -> None:
    job = Job("name of\nthe run", "r", "w", secrets=("A_SECRET",))
    directory = Path("launch") / folder
    root = Path(tempfile.mkdtemp())
    rendered = [
        tpu_vm.render(tpu_vm.TpuVm(job, TPU, zone=value, nfs=value, source=value, directory=directory)),
        gke.render(gke.Gke(job, GPU, image=value, namespace=value, secret=f"s\n{value}", directory=directory)),
        slurm.render(slurm.Slurm(job, directory=directory)),
        skypilot.render(skypilot.SkyPilot(job, GPU, source=value, directory=directory)),
    ]
    try:
        for number, rendering in enumerate(rendered):
            (root / str(number)).mkdir()
            check_commands(rendering, root / str(number))
        assert not list(root.rglob("here")), "a text was executed"
    finally:
        shutil.rmtree(root)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(WORDS, st.lists(WORDS)))
def test_yaml_returns_every_text_unchanged(document: dict[str, list[str]]) -> None:
    assert yaml.safe_load(to_yaml(document)) == document


def test_texts_that_other_yaml_readers_take_for_numbers_are_quoted() -> None:
    """YAML 1.2 readers, and the Go reader of Kubernetes, know numbers and booleans that PyYAML does not."""
    words = [
        "1e3",
        "0o17",
        "0x1F",
        "12:30:45",
        "1_000",
        "y",
        "n",
        "on",
        "Off",
        "True",
        "~",
        ".inf",
        "=",
        "<<",
        "0.1.2",
        "2e-1",
    ]
    for line in to_yaml(words).splitlines():
        assert re.fullmatch(r'- ".*"', line.strip()), line


def test_files_are_written_as_rendered(tmp_path: Path) -> None:
    text = "\r\nhé🙂\u2028 \x85\n"
    write(Rendering(tmp_path / "a b", {"x": text}, ()))
    assert (tmp_path / "a b" / "x").read_bytes().decode() == text
