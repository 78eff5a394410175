"""The command line: what it imports, what it says, and how it leaves."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from config_examples import REPOSITORY, changed, example

import t5x_like
from t5x_like.cli import main
from t5x_like.config import DataError, RefusedError
from t5x_like.config.serialization import from_json, to_json

HEAVY = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax",
    "tensorflow",
    "seqio",
    "tensorstore",
    "matplotlib",
    "pyarrow",
    "numpy",
)
COMMANDS = ("train", "prepare", "inspect", "eval", "generate")

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A sound config.json in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(to_json(example()))
    return "config.json"


def fake(monkeypatch: pytest.MonkeyPatch, module: str, function: str, result: Any = 0) -> Calls:
    """Puts a recorder in the place of the one function that a command calls; it returns or raises `result`."""
    calls: Calls = []

    def record(*args: Any, **keywords: Any) -> Any:
        calls.append((args, keywords))
        if isinstance(result, BaseException):
            raise result
        return result

    stand_in = types.ModuleType(module)
    setattr(stand_in, function, record)
    monkeypatch.setitem(sys.modules, module, stand_in)
    return calls


def python(code: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs code in a fresh interpreter; also the CPU seconds it took, which other processes do not disturb."""

    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = cpu()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    return result, cpu() - before


RUN_AND_LIST = f"""
import sys
from t5x_like.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as left:
    code = left.code
print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules], code)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_is_quick_and_imports_nothing_heavy(arguments: list[str]) -> None:
    result, seconds = python(RUN_AND_LIST, *arguments)
    assert result.stdout.splitlines()[-1] == "HEAVY [] 0", result.stderr
    assert ("usage: t5x-like" in result.stdout) == ("--help" in arguments)
    assert seconds < 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--print-config", "--training.batch-size", "64"], 0),
        (["--training.batch-sise", "64"], 2),
        (["--training.batch-size", "many"], 2),
        (["--training.batch-size", "0"], 2),
        (["--help"], 0),
    ],
)
def test_configurations_are_read_and_refused_without_jax(arguments: list[str], code: int) -> None:
    result, _ = python(RUN_AND_LIST, "train", str(REPOSITORY / "configs/runs/smoke.py"), *arguments)
    assert result.stdout.splitlines()[-1] == f"HEAVY [] {code}", result.stderr
    assert "Traceback" not in result.stderr


def test_importing_the_trainer_imports_no_tensorflow() -> None:
    code = f"import sys, t5x_like.trainer; print([n for n in sys.modules if n in {('tensorflow', 'seqio', 'torch')!r}])"
    result, _ = python(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"t5x-like {t5x_like.__version__}\n"


def test_help_of_a_recipe_lists_its_fields(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", config, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "--workdir" in text and "--data.mixture.6.max-target-fraction" in text


def test_print_config_is_a_recipe(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", config, "--print-config", "--data.mixture.0.rate", "2"]) == 0
    expected = changed(example(), "data.mixture.0.rate", 2.0)
    assert from_json(capsys.readouterr().out, source="stdout") == expected


def test_train(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(monkeypatch, "t5x_like.trainer", "train", result=42)
    overrides = ["--training.batch-size", "16"]
    assert main(["train", config, *overrides]) == 42
    assert main(["train", *overrides, "--workdir", "elsewhere", config]) == 2, "the recipe comes before the overrides"
    allowed = ["--allow-change", "training.batch_size"]
    options = ["--workdir", "elsewhere", *allowed, "--plan", "plan.json"]
    assert main(["train", *options, config, *overrides]) == 42
    run = changed(example(), "training.batch_size", 16)
    assert calls == [
        ((run, Path("runs/example"), [], None), {}),
        ((run, Path("elsewhere"), ["training.batch_size"], Path("plan.json")), {}),
    ]


def test_prepare_and_inspect(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = fake(monkeypatch, "t5x_like.data.prepare", "prepare")
    inspected = fake(monkeypatch, "t5x_like.data.describe", "inspect")
    assert main(["prepare", config, "--workers", "2", "--data.tokenizer.num-sentinels", "40"]) == 0
    written = fake(monkeypatch, "t5x_like.inspection.page", "write_statistics", result=Path("page.html"))
    assert main(["inspect", config, "--rows", "3", "--first-row", "7"]) == 0
    assert main(["inspect", config, "--stats", "--sample-rows", "100"]) == 0
    assert main(["inspect", config, "--stats", "--output", "page.html", "--first-row", "5"]) == 0
    run = changed(example(), "data.tokenizer.num_sentinels", 40)
    assert prepared == [((run.data,), {"report": print, "workers": 2, "make_parts": None})]
    assert inspected == [((example(),), {"rows": 3, "first_row": 7})]
    assert written == [
        ((example(), Path("runs/example.statistics.html")), {"rows": 100, "first_row": 0}),
        ((example(), Path("page.html")), {"rows": 4096, "first_row": 5}),
    ]


def test_eval_and_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = fake(monkeypatch, "t5x_like.evaluation.command", "evaluate_command")
    generated = fake(monkeypatch, "t5x_like.decoding.command", "generate_command")
    options = ["--step", "3", "7", "--num-batches", "2", "--task", "t", "--split", "s"]
    assert main(["eval", "runs/x:5", "hf", *options]) == 0
    ((references, asked), keywords) = evaluated[0]
    assert keywords == {"like": None, "output": None}
    assert [(one.path, one.steps) for one in references] == [(Path("runs/x"), (5,)), (Path("hf"), ())]
    assert (asked.steps, asked.num_batches, asked.held_out, asked.only_new) == ((3, 7), 2, True, False)
    assert [(task.mixture_or_task, task.split) for task in asked.tasks] == [("t", "s")]
    followed = fake(monkeypatch, "t5x_like.evaluation.command", "follow_command")
    assert main(["eval", "runs/x", "--follow", "--timeout", "3"]) == 0
    assert followed[0][0][0] == Path("runs/x") and followed[0][1] == {"timeout": 3.0}
    assert main(["generate", "runs/x", "--prompt", "-- a b", "--mode", "S", "--top-p", "0.9"]) == 0
    ((positional, keywords),) = generated
    run_dir, settings = positional
    assert (run_dir, keywords["prompt"], keywords["step"]) == (Path("runs/x"), "-- a b", None)
    assert (settings.mode, settings.sampling.top_p) == ("S", 0.9)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["tran"], "invalid choice: 'tran'"),
        (["train"], "RECIPE"),
        (["eval", "runs/x", "--num-batch", "3"], "perhaps you meant --num-batches"),
        (["eval", "runs/x", "--num-batches", "0"], "found '0'"),
        (["eval"], "found no CHECKPOINT"),
        (["eval", "runs/x", "runs/y", "--follow"], "--follow takes one run"),
        (["eval", "--predictions", "x.jsonl"], "--predictions takes --metrics"),
        (["eval", "runs/x", "--metrics", "squad"], "of --predictions FILE"),
        (["eval", "runs/x", "--timeout", "3"], "--timeout is of --follow"),
        (["generate", "runs/x", "--length-penalty", "1"], "give --beam-size"),
        (["generate", "runs/x", "--mode", "Q"], "'R', 'S', 'X'"),
        (["generate", "runs/x", "--prompt", "a", "--input", "b"], "not allowed with"),
    ],
)
def test_wrong_usage_leaves_with_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.py"], "nowhere.py: found no such recipe"),
        (["config.json", "--workdri", "x"], "perhaps --workdir"),
        (["config.json", "optim.lr=1"], "perhaps --training.schedule.learning-rate"),
        (["config.json", "--training.batch-size", "0", "--data.seed", "-1"], "the configuration has 2 problems"),
    ],
)
def test_problems_leave_with_2(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    calls = fake(monkeypatch, "t5x_like.trainer", "train")
    assert main(["train", *arguments]) == 2
    assert not calls
    error = capsys.readouterr().err
    assert error.startswith("t5x-like: ") and says in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (DataError("no text"), 2, "t5x-like: no text"),
        (RefusedError("another run"), 3, "t5x-like: another run"),
        (KeyboardInterrupt(), 130, "t5x-like: interrupted"),
    ],
)
def test_errors_of_the_user_become_exit_codes(
    config: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    says: str,
) -> None:
    fake(monkeypatch, "t5x_like.trainer", "train", result=raised)
    assert main(["train", config]) == code
    assert capsys.readouterr().err == f"{says}\n"


def test_a_defect_of_ours_is_a_traceback_and_1(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(to_json(example()))
    code = """
import sys, types
stand_in = types.ModuleType("t5x_like.trainer")
def train(run, workdir, allowed_changes, plan): raise ZeroDivisionError("a defect")
stand_in.train = train
sys.modules["t5x_like.trainer"] = stand_in
import t5x_like.cli
sys.exit(t5x_like.cli.main())
"""
    result, _ = python(code, "train", str(tmp_path / "config.json"))
    assert result.returncode == 1 and "Traceback" in result.stderr and "a defect" in result.stderr


# A command that prints by rich, which makes an exit of its own of a closed pipe.
PRINTS_BY_RICH = """
import sys
from rich.console import Console
from t5x_like import cli
cli.train._run = lambda *_: Console().print("x") or 0
sys.exit(cli.main())
"""


@pytest.mark.parametrize("program", [["-m", "t5x_like"], ["-c", PRINTS_BY_RICH]], ids=["print", "rich"])
def test_a_closed_pipe_is_no_defect(program: list[str]) -> None:
    arguments = ["train", "configs/runs/smoke.py"] + (["--help"] if program[0] == "-m" else [])
    program = [sys.executable, *program, *arguments]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        error = process.stderr.read().decode()
    assert process.returncode == 141 and "Traceback" not in error


def test_simulated_devices(config: str) -> None:
    code = """
import sys, types
stand_in = types.ModuleType("t5x_like.trainer")
def train(run, workdir, allowed_changes, plan):
    import jax
    print(len(jax.devices()), jax.devices()[0].platform)
    return 0
stand_in.train = train
sys.modules["t5x_like.trainer"] = stand_in
import t5x_like.cli
sys.exit(t5x_like.cli.main())
"""
    result, _ = python(code, "train", config, "--devices", "3")
    assert (result.returncode, result.stdout) == (0, "3 cpu\n"), result.stderr
