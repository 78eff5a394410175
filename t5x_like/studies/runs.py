"""Runs of a study or a sweep: each is a process of `t5x-like train` on a run directory of its own.

The same command again goes on where an earlier one ended: finished runs are recognized by their files, and a further
arm, value or seed adds its runs only.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_like import plugins, run_directory
from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.config.serialization import diff_configs, to_dict, to_json
from t5x_like.errors import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE, RESTART_CODES, ConfigError, ConfigProblem
from t5x_like.evaluation import comparison
from t5x_like.evaluation.best_checkpoints import early_stop
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.evaluation.results_store import CONTINUATION, read_evaluations
from t5x_like.launching.restart_loop import RESTART_DELAY_SECONDS, Supervisor, forwarded_signals
from t5x_like.storage import locations
from t5x_like.storage.locations import Location
from t5x_like.storage.mirror import fetch, path_to_read
from t5x_like.studies.study import StudyRun
from t5x_like.utils import trusted_urls
from t5x_like.utils.sanitize import say

MAX_RESTARTS = 3
"""Restarts of a run after exit codes with which the same command resumes."""
_POLL_SECONDS = 1.0


def run_path(workdir: Location, run: StudyRun) -> Path:
    """Return the local directory of a run: of one in an object store, a copy that is brought up to date.

    Raises:
      UserError: there is no run at the URL, or the object store cannot be accessed.
    """
    directory = path_to_read(str(workdir / run.name), "--workdir")
    fetch(directory)
    return directory


def require_unchanged(runs: Sequence[StudyRun], workdir: Location) -> None:
    """Raise ConfigError, before anything is trained, if a run exists with another configuration.

    What does not affect the training, such as the number of held-out batches, may differ. A run may go on to a later
    step, but one that may have passed the step at which it has to end now is refused: its budget would be another one.
    """
    problems = []
    for run in runs:
        if not locations.exists(workdir / run.name):
            continue
        directory = run_path(workdir, run)
        if not (directory / run_directory.CONFIG).is_file() or not _has_begun(directory):
            continue
        old = run_directory.read_config(directory)
        for field, (before, now) in diff_configs(old, run.run).items():
            ends_earlier = field == "training.num_train_steps" and now < before
            if ends_earlier or not run_directory.may_change(field, old, run.run):
                expected = f"{before!r}, as in its directory"
                fix = "give the arm another name, or remove its directory"
                problems.append(ConfigProblem(f"{run.name}: {field}", repr(now), expected, fix))
    if problems:
        raise ConfigError(problems)


def _has_begun(directory: Path) -> bool:
    """Return whether a run has records or saved steps: without them, `train` replaces its configuration."""
    saved = (directory / run_directory.CHECKPOINTS).glob("[0-9]*")
    return run_directory.has_records(directory) or any(saved)


def train_runs(
    runs: Sequence[StudyRun], workdir: Location, *, jobs: int = 1, further: Sequence[str] = ()
) -> tuple[int, list[StudyRun]]:
    """Train the runs that are not finished, and evaluate those whose rows are missing.

    Args:
      runs: The runs.
      workdir: Directory or URL with a run directory for each of them.
      jobs: Number of runs that train at the same time.
      further: Further options of both `train` and `eval`.

    Returns:
      The exit code of the first command that fails, or 0; and the runs with results. A run that ends with EXIT_REFUSED,
      as one whose loss is no longer finite, is left out with those that start from it, and the others are trained.
      None are left after another error.
    """
    waiting = [run for run in runs if finished_result(workdir, run) is None]
    waiting.sort(key=lambda run: run.parent is not None)
    with tempfile.TemporaryDirectory() as folder:
        commands = {run.name: _train_words(run, workdir, Path(folder), further) for run in waiting}
        first = {run.name: commands[run.name] for run in waiting if run.parent is None}
        codes = _run_all(first, jobs, list(commands))
        if all(code in (EXIT_OK, EXIT_REFUSED) for code in codes.values()):
            ready = [run for run in waiting if run.parent and codes.get(run.parent, EXIT_OK) == EXIT_OK]
            codes |= _run_all({run.name: commands[run.name] for run in ready}, jobs, list(commands))
    for name, code in codes.items():
        if code == EXIT_REFUSED:
            say(f"run {name} is left out of the comparison: exit code {code}")
        elif code != EXIT_OK:
            return code, []
    finished = [run for run in runs if run.name not in commands or codes.get(run.name) == EXIT_OK]
    # Training evaluates the last step, but does not save the rows that intervals are computed from.
    missing = [run for run in finished if evaluated(workdir, run) is None]
    directories = [str(workdir / run.name) for run in missing]
    code = run_command(["eval", *directories, *further, *_trust_words(missing)]) if missing else EXIT_OK
    if code != EXIT_OK:
        return code, []
    return (EXIT_OK if len(finished) == len(runs) else EXIT_REFUSED), finished


def finished_result(workdir: Location, run: StudyRun) -> EvaluatedCheckpoint | None:
    """Return the result of a run that has trained all its steps, or stopped early, and is evaluated with rows.

    None: it has not.
    """
    found = evaluated(workdir, run)
    if found is None or found.step >= run.run.training.num_train_steps:
        return found
    return found if early_stop(found.path, run.run, found.step) is not None else None


def evaluated(workdir: Location, run: StudyRun) -> EvaluatedCheckpoint | None:
    """Return the newest evaluated step of a run.

    None: there is none, it has no rows for intervals, or its windows have other lengths than those of the study.
    """
    if not locations.exists(workdir / run.name):
        return None
    try:
        found = comparison.read_checkpoint(CheckpointRef(run_path(workdir, run)))
    except ConfigError:
        return None
    return found if found.draws and _has_windows(found, run) else None


def _has_windows(found: EvaluatedCheckpoint, run: StudyRun) -> bool:
    """Return whether a run was scored on the windows of `evaluation.continuation`, which may change after training."""
    continuation = run.run.evaluation.continuation
    if continuation is None or all(share.corpus.sequences_per_document > 1 for share in run.run.data.sources):
        return True
    scores = read_evaluations(found.path)[found.step].get(CONTINUATION, {})
    return (scores.get("given"), scores.get("scored")) == continuation


def _train_words(run: StudyRun, workdir: Location, folder: Path, further: Sequence[str]) -> list[str]:
    """Return the command that trains a run. The configuration of an arm without recipe is written into `folder`.

    Runs in a local directory share their compiled programs: another seed compiles nothing.
    """
    directory = ["--workdir", str(workdir / run.name)]
    cache = run.run.compilation_cache
    if cache.directory is None and isinstance(workdir, Path):
        cache = dataclasses.replace(cache, directory=str(workdir.absolute() / run_directory.COMPILATION_CACHE))
    if run.recipe:
        recipe, *overrides = run.recipe
        shared = ["--compilation-cache.directory", cache.directory] if cache.directory else []
        return ["train", recipe, *directory, *further, "--", *shared, *overrides]
    path = folder / f"{run.name}.json"
    path.write_text(to_json(dataclasses.replace(run.run, compilation_cache=cache)), encoding="utf-8")
    return ["train", str(path), *directory, *further, *_trust_words([run])]


def _trust_words(runs: Sequence[StudyRun]) -> list[str]:
    """Return the options that trust the plug-ins, modules and URLs of runs that the user's own code describes.

    That is a study, or a recipe in Python; what a recipe in JSON names must be trusted by the user.
    """
    own = [run.run for run in runs if not (run.recipe and run.recipe[0].endswith(".json"))]
    documents: list[dict[str, Any]] = [to_dict(run) for run in own]
    named = {name for one in documents for name in plugins.named_modules(one) | trusted_urls.urls_in(one)}
    named.update(name for run in own for name in run.plugins)
    return [word for name in sorted(named) for word in ("--trust", name)]


def _run_all(commands: Mapping[str, Sequence[str]], jobs: int, order: Sequence[str]) -> dict[str, int]:
    """Return the exit codes of the commands by name, in their order.

    After a command fails with any code but EXIT_REFUSED, no further command is started.

    Args:
      commands: Words of the commands by the name of the run.
      jobs: Number of commands at the same time.
      order: Names of all runs that are to be trained, of which the messages count.
    """
    codes: dict[str, int] = {}
    waiting = list(commands)
    # Guards both, for several jobs.
    changing = threading.Lock()

    def next_command() -> str | None:
        with changing:
            has_failed = any(code not in (EXIT_OK, EXIT_REFUSED) for code in codes.values())
            if has_failed or not waiting:
                return None
            say(f"run {order.index(waiting[0]) + 1} of {len(order)}: {waiting[0]}")
            return waiting.pop(0)

    def work() -> None:
        while (name := next_command()) is not None:
            code = run_command(commands[name])
            with changing:
                codes[name] = code

    if jobs == 1:
        work()
    else:
        _in_threads([work] * min(jobs, len(commands)))
    return {name: codes[name] for name in commands if name in codes}


_RUNNING: set[Supervisor] = set()
"""Commands of this process that run now, to which signals are forwarded."""


def _in_threads(functions: Sequence[Callable[[], None]]) -> None:
    def forward(number: int) -> None:
        for supervisor in list(_RUNNING):
            supervisor.stop(number)

    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    with forwarded_signals(forward):
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(timeout=_POLL_SECONDS)


def run_command(arguments: Sequence[str]) -> int:
    """Run a command of `t5x-like` in a process of its own, with restarts, and return its exit code."""
    command = [sys.executable, "-m", "t5x_like", *arguments]
    supervisor = Supervisor(
        command, max_restarts=MAX_RESTARTS, restart_codes=RESTART_CODES, seconds=RESTART_DELAY_SECONDS
    )
    _RUNNING.add(supervisor)
    try:
        code = supervisor.run()
        # A run that ended by itself after the signal: what follows it is not begun, and the same command goes on.
        return EXIT_RESUMABLE if supervisor.is_stopped and code == EXIT_OK else code
    finally:
        _RUNNING.discard(supervisor)
