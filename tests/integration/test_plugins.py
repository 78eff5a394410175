"""The extension points, by the examples of docs/plugins.md: train, resume, evaluate and generate with them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from t5x_like import plugins
from t5x_like.cli.main import main
from t5x_like.errors import EXIT_OK, EXIT_REFUSED

PAGE = Path(__file__).parents[2] / "docs/plugins.md"
STEPS = "--training.num-train-steps"


def examples() -> dict[str, str]:
    """Return the Python blocks of the page by the file name in their first line."""
    blocks = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    assert len(blocks) == PAGE.read_text().count("```python"), "every block begins with the name of its file"
    return dict(blocks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write the examples as files, and a run of 4 steps in `run`."""
    directory = tmp_path_factory.mktemp("plugins")
    for name, text in examples().items():
        (directory / name).write_text(text)
    before = set(sys.modules)
    assert main(["prepare", str(directory / "recipe.py")]) == EXIT_OK
    assert main(["train", str(directory / "recipe.py"), "--workdir", str(directory / "run"), STEPS, "4"]) == EXIT_OK
    yield directory
    for name in set(sys.modules) - before:
        if not name.startswith("t5x_like"):
            sys.modules.pop(name, None)
    for name in examples():
        plugins._loaded.pop(name, None)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_plugins_resumes_to_the_numbers_of_an_undisturbed_one(folder: Path) -> None:
    recipe, straight = str(folder / "recipe.py"), folder / "straight"
    assert main(["train", recipe, "--workdir", str(folder / "run")]) == EXIT_OK
    assert main(["train", recipe, "--workdir", str(straight)]) == EXIT_OK
    names = ("step", "loss", "grad_norm", "learning_rate", "loss/reversed_lm")
    resumed, expected = metrics(folder / "run"), metrics(straight)
    assert [[record[name] for name in names] for record in resumed] == [
        [record[name] for name in names] for record in expected
    ]
    assert (folder / "run/metrics.csv").read_text() == (straight / "metrics.csv").read_text()
    assert [line.split(",")[0] for line in (straight / "metrics.csv").read_text().splitlines()] == [
        "step", "2", "4", "6", "8",
    ]  # fmt: skip


def test_callbacks_see_steps_evaluations_and_checkpoints(folder: Path) -> None:
    best = json.loads((folder / "run/best.json").read_text())
    last = metrics(folder / "run")[-1]
    assert best["steps"] == int(best["checkpoint"]) == last["step"]
    assert best["loss"] == last["loss"]
    assert best["score"] < float("inf")


def test_a_run_with_plugins_is_evaluated_and_generates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(folder / "run")]) == EXIT_OK
    assert "reversed_lm" in capsys.readouterr().out
    arguments = ["generate", str(folder / "run"), "--prompt", "abc", "--max-new-tokens", "3"]
    assert main(arguments) == EXIT_OK
    assert capsys.readouterr().out.strip()


def test_another_process_imports_the_plugins_of_a_run_only_if_they_are_trusted(folder: Path) -> None:
    """The run directory is copied, the files beside the recipe are not there, and imports leave a mark."""
    moved = folder / "moved"
    shutil.copytree(folder / "run", moved / "run")
    (moved / "reversed_lm.py").write_text("open('imported', 'w')")
    command = [sys.executable, "-m", "t5x_like", "generate", "run", "--prompt", "abc", "--max-new-tokens", "2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def call(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options], cwd=moved, env=environment, capture_output=True, text=True)

    refused = call()
    assert refused.returncode == EXIT_REFUSED, refused.stderr
    options = re.findall(r"--trust (\w+\.py)", refused.stderr)
    assert options == json.loads((moved / "run/config.json").read_text())["plugins"] and len(options) == 6
    trusted = call(*(part for name in options for part in ("--trust", name)))
    assert trusted.returncode == EXIT_OK, trusted.stderr
    assert not (moved / "imported").exists(), "the copy in the run directory is imported, not a file that lies around"


@pytest.mark.slow
def test_an_optimizer_class_of_a_plugin_trains(folder: Path) -> None:
    text = (folder / "recipe.py").read_text()
    optimizer = 'OptaxOptimizer(factory="sign_momentum", kwargs={"decay": 0.8})'
    assert optimizer in text
    text = text.replace(optimizer, "ScaledSGD(table_factor=0.5)").replace('"sign_momentum.py"', '"scaled_sgd.py"')
    (folder / "scaled.py").write_text(
        text.replace("from reversed_lm", "from scaled_sgd import ScaledSGD\nfrom reversed_lm")
    )
    arguments = ["train", str(folder / "scaled.py"), "--workdir", str(folder / "scaled"), STEPS, "2"]
    assert main([*arguments, "--training.optimizer.table-factor", "0.25"]) == EXIT_OK
    config = json.loads((folder / "scaled/config.json").read_text())
    assert config["training"]["optimizer"] == {"kind": "scaled_sgd", "table_factor": 0.25}


def test_a_model_of_a_registered_family_is_exported_and_imported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported, imported = folder / "exported", folder / "imported"
    options = ["--family", "tiny_llama"]
    assert main(["convert", "--to", "hf", str(folder / "run"), str(exported), *options]) == EXIT_OK
    assert json.loads((exported / "config.json").read_text())["model_type"] == "tiny_llama"
    options = ["--plugin", str(folder / "tiny_llama.py")]
    assert main(["convert", "--from", "hf", str(exported), str(imported), *options]) == EXIT_OK
    assert f"{imported}: tiny_llama, 19,552 parameters" in capsys.readouterr().out


def test_a_registered_metric_scores_predictions(folder: Path, tmp_path: Path) -> None:
    rows = [{"target": "a b", "prediction": "b c"}, {"target": "d", "prediction": "d"}]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "eval",
        "--predictions",
        str(path),
        "--metrics",
        "shared_words",
        "--output",
        str(tmp_path / "out.json"),
    ]
    arguments += ["--plugin", str(folder / "shared_words.py"), "--output", str(tmp_path / "out.json")]
    assert main(arguments) == EXIT_OK
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["metrics"] == {"shared_words/shared_words": 75.0}


def test_eval_does_not_import_a_module_that_only_config_json_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run/config.json"
    document = json.loads(path.read_text())
    task = {"mixture_or_task": "x", "module": "module_beside_a_downloaded_run", "split": "validation"}
    path.write_text(json.dumps(document | {"evaluation": document["evaluation"] | {"tasks": [task]}}))
    (tmp_path / "module_beside_a_downloaded_run.py").write_text("open('imported', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["eval", "run", "--no-held-out"]) == EXIT_REFUSED
    assert "--trust module_beside_a_downloaded_run" in capsys.readouterr().err
    assert not (tmp_path / "imported").exists()
