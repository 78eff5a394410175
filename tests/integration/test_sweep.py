"""`t5x-like sweep`: it trains only what is new, orders the runs, and ends where a run ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.small_run import small_run

from t5x_like.cli.main import main
from t5x_like.config import CausalLM
from t5x_like.config.serialization import to_json
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_USAGE
from t5x_like.studies import runs

pytestmark = pytest.mark.slow
RATE = "--training.schedule.learning-rate"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run the commands of a sweep in this process, which is faster than one process each, and record them."""
    found: list[list[str]] = []

    def run(arguments: Sequence[str]) -> int:
        found.append(list(arguments))
        return main(arguments)

    monkeypatch.setattr(runs, "run_command", run)
    return found


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    run = small_run(
        tmp_path,
        "causal_lm",
        [CausalLM(name="text")],
        lengths=(0, 64),
        training={"num_train_steps": 30},
    )
    prepare(run.data, report=lambda line: None)
    (tmp_path / "recipe.json").write_text(to_json(run))
    return str(tmp_path / "recipe.json")


def test_a_sweep_orders_its_arms_and_adds_only_new_ones(
    recipe: str, tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "sweep"
    words = ["sweep", recipe, "--workdir", str(workdir), RATE, "1e-6", "0.01"]
    assert main([*words, "--plan"]) == EXIT_OK
    assert commands == [] and not workdir.exists()
    assert "2 runs of 2 arms" in capsys.readouterr().out
    assert main(words) == EXIT_OK
    out = capsys.readouterr().out
    assert "best: learning-rate_0.01, bits_per_byte" in out
    # A model that has not moved is far behind: no seed or text decides it.
    assert "not significantly worse" not in out and "worse" in out
    assert [command[0] for command in commands] == ["train", "train", "eval"]
    page = (workdir / "study.html").read_text()
    assert "learning-rate_0.01" in page and "learning-rate_1e-6" in page
    commands.clear()
    assert main([*words, "--metric", "loss/S"]) == EXIT_USAGE
    assert "loss/S, which not all runs have, expected one of loss/text" in capsys.readouterr().err
    # What is finished is recognized by its files.
    assert commands == []
    saved = (workdir / "learning-rate_0.01/checkpoints").stat().st_mtime_ns
    commands.clear()
    assert main([*words, "0.003"]) == EXIT_OK
    assert (workdir / "learning-rate_0.01/checkpoints").stat().st_mtime_ns == saved
    assert [command[1:] for command in commands if command[0] == "eval"] == [[str(workdir / "learning-rate_0.003")]]
    assert "of 3 arms" in capsys.readouterr().out


def test_a_sweep_ends_with_the_exit_code_of_an_arm(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = iter([EXIT_OK, EXIT_RESUMABLE])
    monkeypatch.setattr(runs, "run_command", lambda arguments: next(codes))
    words = ["sweep", recipe, "--workdir", str(tmp_path / "sweep"), RATE, "0.1", "0.2", "0.3"]
    assert main(words) == EXIT_RESUMABLE
    with pytest.raises(StopIteration):
        next(codes)
