"""A run trained on spans, adapted to continuing text: what its checkpoints hold, and every way to use them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.small_run import small_run

from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.cli.main import main
from t5x_like.config import (
    CheckpointConfig,
    LoraConfig,
    MonitoringConfig,
    PrefixLM,
    RunConfig,
    ScheduleConfig,
    SpanCorruption,
)
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK, EXIT_REFUSED, SafetyError
from t5x_like.interop.huggingface.checkpoint import import_directory, open_directory
from t5x_like.model_loading import open_model
from t5x_like.models.factory import abstract_model
from t5x_like.trainer.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    root = tmp_path_factory.mktemp("lora")
    run = small_run(
        root,
        "causal_lm",
        (SpanCorruption(name="R", mean_noise_span_length=3.0, noise_density=0.15, mode="R"),),
        num_sentinels=32,
        stack={"num_layers": 2},
        model={"vocab_size": 320},
        training={
            "num_train_steps": 60,
            "global_batch_size": 16,
            "schedule": ScheduleConfig(kind="constant", learning_rate=5e-3, warmup_steps=10),
        },
        name="base",
        monitoring=MonitoringConfig(writers=(), log_every_steps=10, num_decoded_samples=0),
    )
    prepare(run.data, report=lambda line: None)
    assert train(run, root / "base") == EXIT_OK
    return run, root / "base"


def adapted(run: RunConfig, directory: Path, steps: int = 40) -> RunConfig:
    """Return `run` with another objective and adapters on what `directory` has."""
    lora = LoraConfig(base=str(directory), rank=4, paths=(".*/layers/.*/kernel",))
    data = dataclasses.replace(run.data, mixture=(PrefixLM(name="S", mode="S"),))
    training = dataclasses.replace(run.training, num_train_steps=steps, lora=lora)
    checkpoints = CheckpointConfig(save_every_steps=20)
    return dataclasses.replace(run, name="adapted", data=data, training=training, checkpoints=checkpoints)


@pytest.fixture(scope="module")
def trained(base: tuple[RunConfig, Path]) -> Path:
    run, directory = base
    before = digest(directory)
    assert train(adapted(run, directory), directory.parent / "adapted") == EXIT_OK
    assert digest(directory) == before, "the base is read and never written"
    return directory.parent / "adapted"


def digest(directory: Path) -> dict[str, str]:
    files = [path for path in sorted((directory / "checkpoints").rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def saved(directory: Path, step: int) -> dict[str, str]:
    """Return type and shape of each array of a checkpoint by its path."""
    arrays: dict[str, str] = json.loads((directory / "checkpoints" / str(step) / "meta.json").read_text())["state"]
    return arrays


def numbers(directory: Path, step: int | None = None) -> dict[str, Any]:
    program = open_model(directory).program
    manager = CheckpointManager(directory / "checkpoints", CheckpointConfig(), read_only=True)
    return jax.tree.map(np.asarray, manager.restore(program.abstract_state, step)[1])


def test_loss_falls_and_checkpoints_hold_only_adapters(trained: Path, base: tuple[RunConfig, Path]) -> None:
    losses = [json.loads(line)["loss"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.1, losses
    arrays = saved(trained, 40)
    adapters = [path for path in arrays if path.startswith("params/")]
    assert adapters and all(path.rpartition("/")[2] in ("lora_a", "lora_b") for path in adapters)
    names = ("lora_a", "lora_b", "count", "step", "rng")
    assert all(path.rpartition("/")[2] in names for path in arrays), "no moment of a frozen parameter"
    sizes = {name: stored(trained if name == "adapted" else base[1], name) for name in ("base", "adapted")}
    rank, widths = 4, [(32, 32)] * 4 + [(32, 64)] * 3
    assert sizes["adapted"] == 4 * 2 * sum(rank * (ins + outs) for ins, outs in widths)
    assert sizes["adapted"] < sizes["base"] / 4


def stored(directory: Path, name: str) -> int:
    """Return the bytes of the parameters that a checkpoint lists."""
    newest = max(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal())
    shapes = [text for path, text in saved(directory, newest).items() if path.startswith("params/")]
    return sum(4 * int(np.prod([int(size) for size in text[8:-1].split(",")])) for text in shapes)


def test_interrupted_run_resumes_like_an_undisturbed_one(trained: Path, base: tuple[RunConfig, Path]) -> None:
    run, directory = base
    stopped = directory.parent / "stopped"
    assert train(adapted(run, directory, steps=20), stopped) == EXIT_OK
    assert train(adapted(run, directory, steps=40), stopped) == EXIT_OK
    jax.tree.map(np.testing.assert_array_equal, numbers(stopped), numbers(trained))


def test_eval_and_generate_merge_adapters_like_a_merged_run(trained: Path, tmp_path: Path, capsys) -> None:
    merged = tmp_path / "merged"
    assert main(["convert", "--merge", str(trained), str(merged)]) == EXIT_OK
    scores = []
    for directory in (trained, merged):
        assert main(["eval", str(directory), "--output", str(tmp_path / "scores.json")]) == EXIT_OK
        scores.append(json.loads((tmp_path / "scores.json").read_text()))
    first, second = (score["objectives"]["S"] for score in scores)
    assert first == {name: pytest.approx(value, rel=1e-5) for name, value in second.items()}
    during = json.loads((trained / "evaluation.json").read_text())
    loss = [result["objectives"]["S"]["loss"] for result in (scores[0], during)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-5), "scored while it trains, with the adapters apart"
    answers = []
    for directory in (trained, merged):
        capsys.readouterr()
        assert main(["generate", str(directory), "--prompt", "def f", "--max-new-tokens", "5"]) == EXIT_OK
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert not any("lora" in path for path in saved(merged, 40))
    assert main(["convert", "--merge", str(merged), str(tmp_path / "again")]) == 2, "it has no adapters"


def test_export_is_merged_and_keeps_the_family_of_its_base(
    trained: Path, base: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    out = tmp_path / "hf"
    assert main(["convert", "--to", "hf", str(trained), str(out)]) == EXIT_OK
    source = open_directory(out)
    _, params = open_model(trained).params()
    exported = source.params(abstract_model(source.model).params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), exported, params)

    # The base by way of the other library's files: the same numbers, so the adapters still fit.
    assert main(["convert", "--to", "hf", str(base[1]), str(tmp_path / "hf_base")]) == EXIT_OK
    config = json.loads((tmp_path / "hf_base" / "config.json").read_text()) | {"_name_or_path": "theirs"}
    (tmp_path / "hf_base" / "config.json").write_text(json.dumps(config))
    import_directory(tmp_path / "hf_base", tmp_path / "imported", report=lambda line: None)
    elsewhere = tmp_path / "elsewhere"
    move_base(trained, elsewhere, tmp_path / "imported")
    assert main(["convert", "--to", "hf", str(elsewhere), str(tmp_path / "hf_again")]) == EXIT_OK
    assert json.loads((tmp_path / "hf_again" / "config.json").read_text())["_name_or_path"] == "theirs"


def move_base(trained: Path, to: Path, base: Path) -> None:
    """Copy a run of adapters so that it looks for its base in another directory."""
    shutil.copytree(trained, to)
    config = json.loads((to / "config.json").read_text())
    config["training"]["lora"]["base"] = str(base)
    (to / "config.json").write_text(json.dumps(config))


def test_other_base_is_refused_by_every_command(
    trained: Path, base: tuple[RunConfig, Path], tmp_path: Path, capsys
) -> None:
    run, directory = base
    other = tmp_path / "other"
    shorter = dataclasses.replace(run.training, seed=1, num_train_steps=1)
    assert train(dataclasses.replace(run, training=shorter), other) == EXIT_OK
    moved = tmp_path / "moved"
    move_base(trained, moved, other)
    for arguments in (["eval", str(moved)], ["generate", str(moved), "--prompt", "x"]):
        assert main(arguments) == EXIT_REFUSED
        assert "to which the adapters belong" in capsys.readouterr().err
    for way in (["--to", "hf"], ["--merge"]):
        assert main(["convert", *way, str(moved), str(tmp_path / "out")]) == EXIT_REFUSED
        assert "to which the adapters belong" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    with pytest.raises(SafetyError, match="to which the adapters belong"):
        train(adapted(run, other, steps=60), moved)
    with pytest.raises(SafetyError, match="found no checkpoints there"):
        train(adapted(run, tmp_path / "nowhere", steps=60), moved)
    with pytest.raises(SafetyError, match="is a run of adapters itself"):
        train(adapted(run, trained, steps=60), tmp_path / "twice")

    # The same base in another directory is accepted.
    shutil.copytree(directory, tmp_path / "copied")
    assert train(adapted(run, tmp_path / "copied", steps=41), moved) == EXIT_OK
    meta = json.loads((moved / "checkpoints" / "41" / "meta.json").read_text())["meta"]
    assert meta["base"]["path"] == str(tmp_path / "copied") and meta["base"]["step"] == 60
