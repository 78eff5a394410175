"""How a search is told: a line for each trial as it ends, and the best."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from t5x_like.planning.compiled_report import readable
from t5x_like.planning.roofline import roofline
from t5x_like.planning.search import Trial


def print_trial(trial: Trial, console: Console) -> None:
    what = f"batch {trial.batch_size}, remat {trial.remat}: "
    if trial.compiled is None:
        said = f"not a run: {trial.refused}"
    elif not trial.fits:
        said = f"does not fit, by {readable(-trial.compiled.room_bytes)}"
    else:
        bound = roofline(trial.compiled).bound
        said = (
            f"fits, peak {readable(trial.compiled.peak_bytes)}, roofline {trial.tokens_per_second:,.0f} tokens per "
            f"second (bound by {bound})"
        )
    console.print(what + said, markup=False, highlight=False)


def print_winner(trial: Trial | None, console: Console) -> None:
    if trial is None:
        console.print("Nothing fits: more devices, or shorter rows.", highlight=False)
        return
    console.print(
        f"Best by the roofline: --training.batch-size {trial.batch_size} --model.remat {trial.remat}", highlight=False
    )


def described(trial: Trial) -> dict[str, Any]:
    """For a file."""
    peak = None if trial.compiled is None else trial.compiled.peak_bytes
    return {
        "batch_size": trial.batch_size,
        "remat": trial.remat,
        "fits": trial.fits,
        "peak_bytes": peak,
        "refused": trial.refused,
        "tokens_per_second": trial.tokens_per_second,
    }
