"""Command line: the modules that it imports, its messages and its exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import pytest
from helpers.config_examples import REPOSITORY, changed, example

import t5x_like
from t5x_like.cli.main import main
from t5x_like.config.serialization import from_json, to_json
from t5x_like.errors import EXIT_CODES, DataError, SafetyError
from t5x_like.utils.sanitize import say

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
ECC = "INTERNAL: CUDA error: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered"
COMMANDS = ("train", "prepare", "inspect", "eval", "generate")

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a valid config.json in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(to_json(example()))
    return "config.json"


def fake(monkeypatch: pytest.MonkeyPatch, module: str, function: str, result: Any = 0) -> Calls:
    """Replace the one function that a command calls by a recorder, which returns or raises `result`."""
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
    """Run code in a fresh interpreter; return the result and its CPU seconds, which other processes do not affect."""

    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = cpu()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    return result, cpu() - before


RUN_AND_LIST = f"""
import sys
from t5x_like.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as left:
    code = left.code
print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules], code)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_is_quick_and_imports_no_heavy_libraries(arguments: list[str]) -> None:
    result, seconds = python(RUN_AND_LIST, *arguments)
    assert result.stdout.splitlines()[-1] == "HEAVY [] 0", result.stderr
    assert ("usage: t5x-like" in result.stdout) == ("--help" in arguments)
    assert seconds < 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--print-config", "--training.global-batch-size", "64"], 0),
        (["--training.batch-sise", "64"], 2),
        (["--training.global-batch-size", "many"], 2),
        (["--training.global-batch-size", "0"], 2),
        (["--help"], 0),
    ],
)
def test_configurations_are_read_and_refused_without_jax(arguments: list[str], code: int) -> None:
    result, _ = python(RUN_AND_LIST, "train", str(REPOSITORY / "configs/runs/smoke.py"), *arguments)
    assert result.stdout.splitlines()[-1] == f"HEAVY [] {code}", result.stderr
    assert "Traceback" not in result.stderr


def test_importing_the_trainer_imports_no_tensorflow() -> None:
    code = "import sys, t5x_like.trainer.train; print({'tensorflow', 'seqio', 'torch'} & set(sys.modules) or [])"
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
    calls = fake(monkeypatch, "t5x_like.trainer.train", "train", result=42)
    overrides = ["--training.global-batch-size", "16"]
    assert main(["train", config, *overrides]) == 42
    assert main(["train", *overrides, "--workdir", "elsewhere", config]) == 2, "the recipe comes before the overrides"
    allowed = ["--allow-change", "training.global_batch_size"]
    options = ["--workdir", "elsewhere", *allowed, "--plan", "plan.json", "--allow-start-over"]
    assert main(["train", *options, config, *overrides]) == 42
    run = changed(example(), "training.global_batch_size", 16)
    assert [arguments for arguments, _ in calls] == [
        (run, Path("runs/example"), [], None),
        (run, Path("elsewhere"), ["training.global_batch_size"], Path("plan.json")),
    ]
    assert [options["start_over"] for _, options in calls] == [False, True]


def test_prepare_and_inspect(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = fake(monkeypatch, "t5x_like.data.store.prepare", "prepare")
    inspected = fake(monkeypatch, "t5x_like.data.inspection.console_view", "inspect")
    assert main(["prepare", config, "--workers", "2", "--data.tokenizer.num-sentinels", "40"]) == 0
    written = fake(monkeypatch, "t5x_like.reports.data_report", "write_statistics", result=Path("page.html"))
    assert main(["inspect", config, "--rows", "3", "--first-row", "7"]) == 0
    assert main(["inspect", config, "--stats", "--sample-rows", "100"]) == 0
    assert main(["inspect", config, "--stats", "--output", "page.html", "--first-row", "5"]) == 0
    run = changed(example(), "data.tokenizer.num_sentinels", 40)
    assert prepared == [((run.data,), {"report": say, "workers": 2, "make_shards": None})]
    assert inspected == [((example(),), {"rows": 3, "first_row": 7})]
    assert written == [
        ((example(), Path("runs/example.statistics.html")), {"rows": 100, "first_row": 0}),
        ((example(), Path("page.html")), {"rows": 4096, "first_row": 5}),
    ]


def test_eval_and_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = fake(monkeypatch, "t5x_like.evaluation.evaluate_runs", "evaluate_checkpoints")
    generated = fake(monkeypatch, "t5x_like.decoding.generate_files", "generate_completions")
    options = ["--num-batches", "2", "--task", "t", "--split", "s"]
    assert main(["eval", "runs/x:5,7", "hf", *options]) == 0
    ((references, asked), keywords) = evaluated[0]
    keywords.pop("write_report")
    assert keywords == {"like": None, "output": None}
    assert [(one.path, one.steps) for one in references] == [(Path("runs/x"), (5, 7)), (Path("hf"), ())]
    assert (asked.num_batches, asked.held_out, asked.only_new) == (2, True, False)
    assert [(task.mixture_or_task, task.split) for task in asked.tasks] == [("t", "s")]
    followed = fake(monkeypatch, "t5x_like.evaluation.evaluate_runs", "follow_run")
    assert main(["eval", "runs/x", "--follow", "--timeout", "3"]) == 0
    assert followed[0][0][0] == Path("runs/x") and followed[0][1]["timeout"] == 3.0
    assert main(["generate", "runs/x:3", "--prompt", "-- a b", "--mode", "S", "--top-p", "0.9"]) == 0
    ((positional, keywords),) = generated
    run_dir, settings = positional
    assert (run_dir, keywords["prompt"], keywords["step"]) == (Path("runs/x"), "-- a b", 3)
    assert (settings.mode, settings.sampling.top_p) == ("S", 0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["tran"], "invalid choice: 'tran'"),
        (["train"], "RECIPE"),
        (["eval", "runs/x", "--num-batch", "3"], "perhaps you meant --num-batches"),
        (["eval", "runs/x", "--num-batches", "0"], "found '0'"),
        (["eval"], "found no MODEL"),
        (["eval", "runs/x", "runs/y", "--follow"], "--follow takes one run"),
        (["eval", "--predictions", "x.jsonl"], "--predictions takes --metrics"),
        (["eval", "runs/x", "--metrics", "squad"], "options of --data FILE and of --predictions FILE"),
        (["eval", "runs/x", "--timeout", "3"], "--timeout is an option of --follow"),
        (["eval", "runs/x", "--pairs", "f.jsonl", "--split", "test"], "--pairs FILE takes no --split"),
        (["eval", "runs/x", "--pairs", "f.jsonl", "--predictions", "g.jsonl"], "--pairs FILE takes no --predictions"),
        (["eval", "runs/x", "--pairs-score", "log_likelihood"], "--pairs-score is an option of --pairs FILE"),
        (["generate", "runs/x:3,4"], "found 2 steps in 'runs/x:3,4', expected one"),
        (["eval", "runs/x:3", "--all"], "--all evaluates all steps"),
        (["eval", "runs/x", "--module", "m"], "found no --task"),
        (["inspect", "smoke", "--output", "page.html"], "options of --stats"),
        (["inspect", "smoke", "--stats", "--rows", "3"], "with --stats use --sample-rows"),
        (["generate", "runs/x", "--length-penalty", "1"], "give --beam-size"),
        (["generate", "runs/x", "--mode", "Q"], "'R', 'S', 'X'"),
        (["generate", "runs/x", "--prompt", "a", "--input", "b"], "not allowed with"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "nowhere.py: found no such recipe"),
        (["config.json", "--workdri", "x"], "perhaps --workdir"),
        (["config.json", "optim.lr=1"], "perhaps --training.schedule.learning-rate"),
        (["config.json", "--training.global-batch-size", "0", "--data.seed", "-1"], "found 2 problems"),
    ],
)
def test_invalid_configurations_exit_with_2(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    calls = fake(monkeypatch, "t5x_like.trainer.train", "train")
    assert main(["train", *arguments]) == 2
    assert not calls
    error = capsys.readouterr().err
    assert error.startswith("t5x-like: ") and message in error and "Traceback" not in error


def test_module_of_a_task_is_looked_up_before_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The current folder counts, although the console script does not have it on its import path."""
    calls = fake(monkeypatch, "t5x_like.evaluation.evaluate_runs", "evaluate_checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    arguments = ["eval", "runs/x", "--task", "t", "--module", "tasks_of_this_folder.all"]
    assert main(arguments) == 2 and not calls
    assert "--module: found 'tasks_of_this_folder.all', and no such module" in capsys.readouterr().err
    (tmp_path / "tasks_of_this_folder.py").touch()
    assert main(arguments) == 0 and len(calls) == 1


def test_trust_without_effect_is_reported(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, "t5x_like.trainer.train", "train")
    assert main(["train", config, "--trust", "nobody.py"]) == 0
    assert "--trust nobody.py: found no configuration that names it" in capsys.readouterr().err


def test_exit_codes_are_in_the_documentation() -> None:
    table = re.search(r"^\| exit code .*?\n\n", (REPOSITORY / "docs/run-directory.md").read_text(), re.M | re.S)
    assert table is not None
    codes = re.findall(r"\d+", " ".join(line.split("|")[1] for line in table[0].strip().splitlines()))
    assert sorted(map(int, codes)) == sorted(entry.code for entry in EXIT_CODES)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (DataError("no text"), 2, "t5x-like: no text"),
        (SafetyError("another run"), 3, "t5x-like: another run"),
        (KeyboardInterrupt(), 130, "t5x-like: interrupted"),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            3,
            f"t5x-like: no space is left on a disk ([Errno {errno.EDQUOT}] Disk quota exceeded). What was saved before "
            "is intact.",
        ),
        (jax.errors.JaxRuntimeError(ECC), 42, f"t5x-like: a device failed ({ECC}). The same command resumes."),
    ],
)
def test_errors_of_the_user_become_exit_codes(
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    fake(monkeypatch, "t5x_like.trainer.train", "train", result=raised)
    assert main(["train", config]) == code
    assert capsys.readouterr().err == f"{message}\n"
    (record,) = Path("runs").glob("*/exit.json")
    assert json.loads(record.read_text())["code"] == code


def test_unexpected_error_prints_a_traceback_and_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(to_json(example()))
    code = """
import sys, types
stand_in = types.ModuleType("t5x_like.trainer.train")
def train(*arguments, **options): raise ZeroDivisionError("a defect")
stand_in.train = train
sys.modules["t5x_like.trainer.train"] = stand_in
import t5x_like.cli.main
sys.exit(t5x_like.cli.main.main())
"""
    result, _ = python(code, "train", str(tmp_path / "config.json"), "--workdir", str(tmp_path / "run"))
    assert result.returncode == 1 and "Traceback" in result.stderr and "a defect" in result.stderr
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 1


# A command that prints by rich, which makes an exit of its own of a closed pipe.
PRINTS_BY_RICH = """
import sys
from rich.console import Console
from t5x_like.cli import main as cli
cli.train._run = lambda *_: Console().print("x") or 0
sys.exit(cli.main())
"""


@pytest.mark.parametrize("program", [["-m", "t5x_like"], ["-c", PRINTS_BY_RICH]], ids=["print", "rich"])
def test_closed_pipe_is_not_an_unexpected_error(program: list[str]) -> None:
    arguments = ["train", "configs/runs/smoke.py"] + (["--help"] if program[0] == "-m" else [])
    program = [sys.executable, *program, *arguments]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        error = process.stderr.read().decode()
    assert process.returncode == 141 and "Traceback" not in error


def test_reader_of_both_outputs_that_ends() -> None:
    command = [sys.executable, "-m", "t5x_like", "train", "configs/runs/smoke.py", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=REPOSITORY) as process:
        assert process.stdout
        process.stdout.close()
    assert process.returncode == 141


@pytest.mark.parametrize("kind", ["missing", "file", "run", "imported", "without weights"])
def test_from_without_a_recipe_names_what_it_found(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    match kind:
        case "file":
            Path("base").touch()
        case "run":
            Path("base", "checkpoints").mkdir(parents=True)
        case "imported":
            Path("base").mkdir()
            Path("base", "model.json").touch()
        case "without weights":
            Path("base").mkdir()
            Path("base", "config.json").write_text('{"model_type": "gpt2"}')
    assert main(["train", "--from", "base", "--workdir", "run"]) == 2
    error = capsys.readouterr().err
    expected = {
        "missing": "base: found no such directory, expected the directory of a Hugging Face model",
        "file": "base: found a file, expected the directory of a Hugging Face model",
        "run": "--from: found base, a run, expected a Hugging Face directory",
        "imported": "--from: found base, an imported model, expected a Hugging Face directory",
        "without weights": "base: neither model.safetensors nor",
    }
    assert expected[kind] in error


def test_simulated_devices(config: str) -> None:
    code = """
import sys, types
stand_in = types.ModuleType("t5x_like.trainer.train")
def train(*arguments, **options):
    import jax
    print(len(jax.devices()), jax.devices()[0].platform)
    return 0
stand_in.train = train
sys.modules["t5x_like.trainer.train"] = stand_in
import t5x_like.cli.main
sys.exit(t5x_like.cli.main.main())
"""
    result, _ = python(code, "train", config, "--devices", "3")
    assert (result.returncode, result.stdout) == (0, "3 cpu\n"), result.stderr


def test_thread_that_hangs_does_not_keep_a_failed_process() -> None:
    script = """
import threading
from t5x_like.cli import main
def fail():
    threading.Thread(target=threading.Event().wait, args=(60,)).start()
    return 42
main.main, main.EXIT_SECONDS = fail, 0.2
main.entry()
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=50).returncode == 42
