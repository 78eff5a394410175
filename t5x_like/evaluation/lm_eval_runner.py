"""Runner of lm-evaluation-harness on models of this package, with bundled tasks or a folder of tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from t5x_like import run_directory
from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.data.store.prepare import open_stores
from t5x_like.errors import EXIT_OK, ConfigError, ConfigProblem, DataError, SafetyError
from t5x_like.evaluation.heldout_multiple_choice import write_docs_choice
from t5x_like.evaluation.masked_scores import Scoring
from t5x_like.evaluation.results_store import write_output
from t5x_like.utils.console import Console


def run_lm_eval(
    reference: CheckpointRef,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    heldout_multiple_choice: bool = False,
    num_fewshot: int | None = None,
    limit: int | None = None,
    mode: str | None = None,
    scoring: Scoring | None = None,
    output: Path | None = None,
) -> int:
    """Evaluate lm-eval tasks and print their results.

    Args:
      reference: Directory of the model, with its step if one is named.
      tasks: Names of tasks, bundled with lm-eval (most of them load their data from a network) or in `include_path`.
      include_path: Folder of task files.
      heldout_multiple_choice: Build the multiple-choice task `docs_choice` from the run's held-out text, and evaluate
        it too.
      num_fewshot: Number of examples in the prompt; None: that of the task.
      limit: Largest number of examples of each task.
      mode: Mode token of the prompts; see `lm_requests`.
      scoring: Score of texts; None: `masked_scores.default_scoring`.
      output: File for the results, as JSON.

    Returns:
      The exit code.

    Raises:
      UserError: the model or a task cannot be used, or lm-eval is not installed.
    """
    if not tasks and not heldout_multiple_choice:
        raise ConfigError([ConfigProblem("--tasks", "none", "names of lm-eval tasks, or --heldout-multiple-choice")])
    if include_path is not None and not include_path.is_dir():
        raise ConfigError([ConfigProblem("--include-path", str(include_path), "a directory of task files")])
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from t5x_like.evaluation.lm_eval_adapter import FOLDER, T5xLikeLM
    except ImportError as error:
        raise SafetyError(
            f"lm-evaluation-harness is not installed ({error}): `pip install t5x-like[harness]`"
        ) from None
    model = T5xLikeLM(reference, mode=mode, scoring=scoring)
    named, folders = list(tasks), [] if include_path is None else [include_path]
    if heldout_multiple_choice:
        folder = model.path / FOLDER
        stores = open_stores(run_directory.read_config(model.path).data)
        named.append(write_docs_choice(stores[0], folder))
        folders.append(folder)
    manager = TaskManager(include_path=[str(path) for path in folders] or None)
    unknown = [name for name in named if name not in manager.all_tasks]
    if unknown:
        fix = "`python -m t5x_like.evaluation.lm_eval_adapter ls tasks` lists lm-eval's bundled tasks"
        raise ConfigError(
            [ConfigProblem("--tasks", ", ".join(unknown), "tasks that lm-eval knows, or --include-path", fix)]
        )
    try:
        results = lm_eval.simple_evaluate(
            model=model, tasks=named, task_manager=manager, num_fewshot=num_fewshot, limit=limit
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise DataError(f"a task's data cannot be read: {error}") from error
    console = Console()
    console.print(_table(results["results"], results["n-samples"], model.scoring))
    if heldout_multiple_choice:
        console.print(_compare_with_chance(results["results"]["docs_choice"]), highlight=False)
    if output is not None:
        document = {key: results[key] for key in ("results", "n-samples", "versions", "config") if key in results}
        document["scoring"] = model.scoring
        write_output(output, json.loads(json.dumps(document, default=str)))
    return EXIT_OK


def _table(results: dict[str, dict[str, Any]], samples: dict[str, dict[str, int]], scoring: Scoring) -> Table:
    score = scoring.replace("_", "-" if scoring != "diffusion_bound" else " ")
    table = Table(title=f"lm-evaluation-harness, texts scored by {score}")
    for name in ("task", "examples", "metric", "value", "standard error"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, metrics in results.items():
        first = (task, f"{samples[task]['effective']:,}" if task in samples else "")
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or "," not in name:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            shown = f"{error:.4f}" if isinstance(error, float) else "-"
            table.add_row(*first, metric, f"{value:.4f}", shown)
            first = ("", "")
    return table


def _compare_with_chance(metrics: dict[str, Any]) -> str:
    """Return lines that state whether each accuracy on docs_choice is significantly above chance (95 %)."""
    from t5x_like.evaluation.heldout_multiple_choice import CHOICES

    lines = []
    for metric in ("acc", "acc_norm", "acc_mutual_info"):
        value, error = metrics[f"{metric},none"], metrics[f"{metric}_stderr,none"]
        low, high = value - 1.96 * error, value + 1.96 * error
        is_above = "above" if low > 1 / CHOICES else "not above"
        lines.append(
            f"docs_choice {metric}: {value:.3f} [{low:.3f}, {high:.3f}], {is_above} chance ({1 / CHOICES:.2f})"
        )
    return "\n".join(lines)
