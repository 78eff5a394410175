"""Tables of evaluations in a terminal of 80 characters."""

from __future__ import annotations

from rich.console import Console

from t5x_like.evaluation.console_tables import comparison_table


def test_every_value_of_many_checkpoints_is_shown_in_80_characters() -> None:
    results = [
        (f"runs/question_place-study/causal.seed-{seed}", {"step": 1_000 + seed, "tasks": {"qa": {"em": 40 + seed}}})
        for seed in range(12)
    ]
    console = Console(width=80)
    with console.capture() as shown:
        console.print(comparison_table(results))
    lines = shown.get().splitlines()
    for name, result in results:
        (row,) = [line for line in lines if f"{name} " in line]
        assert f"{result['step']:,}" in row and f"{result['tasks']['qa']['em']:.4f}" in row
    assert sum("qa/em" in line for line in lines) == 1
