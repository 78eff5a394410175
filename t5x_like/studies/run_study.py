"""`t5x-like study` and `t5x-like sweep`: prepare, train, evaluate, and report what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from t5x_like.data.store.prepare import prepare
from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.storage import locations
from t5x_like.storage.locations import Location
from t5x_like.studies.page import render
from t5x_like.studies.results import Results, collect, verdict
from t5x_like.studies.runs import finished_result, require_unchanged, train_runs
from t5x_like.studies.study import Study, StudyRun
from t5x_like.studies.sweep import around
from t5x_like.utils import formatting
from t5x_like.utils.console import Console
from t5x_like.utils.sanitize import say

PAGE = "study.html"


def prepare_data(study: Study, runs: Sequence[StudyRun], folder: Path) -> None:
    """Write the files of a study and prepare the stores of its runs, each once."""
    if study.write_files is not None:
        folder.mkdir(parents=True, exist_ok=True)
        study.write_files(folder)
    done = []
    for run in runs:
        key = [(share.corpus, run.run.data.tokenizer, run.run.data.store_dir) for share in run.run.data.sources]
        if key not in done:
            done.append(key)
            prepare(run.run.data, report=say)


def train(
    runs: Sequence[StudyRun], workdir: Location, *, jobs: int, further: Sequence[str]
) -> tuple[int, list[StudyRun]]:
    """Train and evaluate what is left: see `train_runs`.

    Raises:
      ConfigError: a run exists with another configuration.
    """
    require_unchanged(runs, workdir)
    return train_runs(runs, workdir, jobs=jobs, further=further)


def results_of(study: Study, runs: Sequence[StudyRun], workdir: Location) -> Results:
    """Return the results of those runs that are finished and evaluated.

    Raises:
      ConfigError: none is, or they do not all have the score.
    """
    found = [(run, checkpoint) for run in runs if (checkpoint := finished_result(workdir, run)) is not None]
    if not found:
        raise ConfigError([ConfigProblem(str(workdir), "no run with results", "runs that are finished and evaluated")])
    return collect(study, found)


def report(study: Study, results: Results, console: Console) -> None:
    """Print the score of each arm and the verdict on each prediction."""
    title = f"{results.measure} by arm"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("arm", overflow="fold")
    for name in ("value", "95 %", "seeds", "minus\nthe first", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in study.arms:
        score, difference = results.score(arm.name), results.compared(arm.name, study.arms[0].name)
        if score is None:
            continue
        row = [arm.name, formatting.number(score.value), around(score.interval), str(len(score.by_seed))]
        if arm is study.arms[0] or difference is None:
            table.add_row(*row, "", "")
        else:
            table.add_row(*row, f"{difference.value:+.4f}", around(difference.interval))
    console.print(table)
    for prediction in study.predictions:
        found = verdict(prediction, results.predicted(prediction))
        say(f"{found or 'no verdict'}: {prediction.claim} ({prediction.source})")


def write_page(
    title: str, study: Study, runs: Sequence[StudyRun], results: Results, workdir: Location, command: str
) -> Location:
    """Write the page into the directory of the study and return its path."""
    path = workdir / PAGE
    try:
        locations.write_bytes(path, render(title, study, runs, results, command).encode())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path
