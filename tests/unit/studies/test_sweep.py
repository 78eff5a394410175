"""Results of a sweep: the order of its arms, which arms are significantly worse, and the page of the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.config_examples import example

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.errors import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE, ConfigError
from t5x_like.evaluation import comparison
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.studies import sweep
from t5x_like.studies.sweep_arms import Arm
from t5x_like.utils.console import Console

BITS = {"a": 2.0, "b": 1.500, "c": 1.501, "d": 1.9, "e": 1.8, "f": 1.7, "g": 1.6, "h": 1.4}
NOISE = np.random.default_rng(0).normal(0, 0.05, 200)


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> list[Arm]:
    """Arms that are evaluated on one text, but for `h`; the difference of `b` and `c` is smaller than their noise."""

    def read(reference: CheckpointRef) -> EvaluatedCheckpoint:
        name = reference.path.name
        text: dict[str, Any] = {"fingerprint": "other" if name == "h" else "one", "tokenizer": "t"}
        own = np.random.default_rng(ord(name)).normal(0, 0.01, 200)
        return EvaluatedCheckpoint(
            name=name,
            path=reference.path,
            step=10,
            config={},
            values={"bits_per_byte": BITS[name], "score": BITS[name]},
            draws={"bits_per_byte": BITS[name] + NOISE + own},
            examples={"bits_per_byte": name == "h"},
            held_out=[text],
            samples=(),
            answers={},
        )

    monkeypatch.setattr(comparison, "read_checkpoint", read)
    return [Arm(name, (), dataclasses.replace(example(), name=name)) for name in BITS]


def test_arms_are_ordered_and_only_significant_differences_have_a_verdict(arms: list[Arm]) -> None:
    found = sweep.sweep_result(arms[:-1], Path("w"))
    assert [checkpoint.path.name for checkpoint in found.checkpoints] == list("bcgfeda")
    # Each interval alone is +-0.1 wide: the paired differences tell the arms apart.
    assert [checkpoint.path.name for checkpoint in found.not_worse] == ["c"]
    assert [cell.verdict for cell in found.cells[2:]] == ["worse"] * 5
    highest_first = sweep.sweep_result(arms[:-1], Path("w"), "score")
    assert highest_first.checkpoints[0].path.name == "a"


def test_scores_of_other_text_have_no_verdict(arms: list[Arm]) -> None:
    found = sweep.sweep_result(arms, Path("w"))
    assert found.checkpoints[0].path.name == "h"
    assert found.not_worse == [] and all(cell.other_text for cell in found.cells[1:])


def test_the_page_has_the_best_that_fit(
    arms: list[Arm], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []

    def write(references: Sequence[CheckpointRef], output: Path) -> Path:
        written.extend(reference.path.name for reference in references)
        return output

    monkeypatch.setattr(sweep, "write_comparison", write)
    result = sweep.sweep_result(arms[:-1], Path("w"))
    assert sweep.report(result, Path("w"), Console(width=120)) == Path("w/comparison.html")
    assert written == list("bcgfed")
    out = capsys.readouterr().out
    assert "best: b, bits_per_byte 1.500" in out
    assert "not significantly worse on this text: c" in out and "the page shows the best 6 arms" in out


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        # The exit codes of three arms, and of their evaluation.
        ([EXIT_OK, EXIT_OK, EXIT_OK, EXIT_OK], (EXIT_OK, ["a", "b", "c"])),
        ([EXIT_OK, EXIT_REFUSED, EXIT_OK, EXIT_OK], (EXIT_REFUSED, ["a", "c"])),
        ([EXIT_REFUSED, EXIT_REFUSED, EXIT_REFUSED], (EXIT_REFUSED, [])),
        ([EXIT_OK, EXIT_RESUMABLE], (EXIT_RESUMABLE, [])),
        ([EXIT_OK, EXIT_OK, EXIT_OK, EXIT_RESUMABLE], (EXIT_RESUMABLE, [])),
    ],
)
def test_an_arm_that_diverges_is_left_out(
    arms: list[Arm], monkeypatch: pytest.MonkeyPatch, codes: list[int], expected: tuple[int, list[str]]
) -> None:
    commands: list[list[str]] = []

    def run(arguments: Sequence[str]) -> int:
        commands.append(list(arguments))
        return codes[len(commands) - 1]

    monkeypatch.setattr(sweep, "_run", run)
    monkeypatch.setattr(sweep, "_has_draws", lambda directory: False)
    code, finished = sweep.train_arms("smoke", arms[:3], Path("w"), ["--trust", "mine"])
    assert (code, [arm.name for arm in finished]) == expected
    assert len(commands) == len(codes)
    if len(codes) == 4:
        trained = [f"w/{name}" for name, arm_code in zip("abc", codes, strict=False) if arm_code == EXIT_OK]
        assert commands[-1] == ["eval", *trained, "--trust", "mine"]
    assert all(command[4:7] == ["--trust", "mine", "--"] for command in commands[:3] if command[0] == "train")


def test_a_metric_that_an_arm_lacks_is_refused(arms: list[Arm]) -> None:
    with pytest.raises(ConfigError, match="loss/S, which not all arms have, expected one of bits_per_byte, score"):
        sweep.sweep_result(arms, Path("w"), "loss/S")
