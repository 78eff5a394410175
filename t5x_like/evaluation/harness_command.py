"""`t5x-like harness`: lm-evaluation-harness on our models, with its own tasks or a folder of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from t5x_like import run_directory
from t5x_like.config import EXIT_OK, ConfigError, DataError, Problem, RefusedError
from t5x_like.data.prepare import open_stores
from t5x_like.evaluation.docs_choice import write_docs_choice
from t5x_like.evaluation.records import write_output


def harness_command(
    checkpoint: str,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    docs_choice: bool = False,
    num_fewshot: int | None = None,
    limit: int | None = None,
    mode: str | None = None,
    output: Path | None = None,
    step: int | None = None,
) -> int:
    """Evaluates lm-eval tasks and prints its table.

    Args:
      checkpoint: A run, what `convert --from` wrote, or a Hugging Face directory; DIR:STEP for a step.
      tasks: Names, bundled with lm-eval (most of them load their data from a network) or in `include_path`.
      include_path: A folder of task files.
      docs_choice: Make the multiple-choice task of `docs_choice` from the run's held-out text, and evaluate it too.
      limit: Examples of each task.
      mode: Of the prompts; see `text_model`.
      output: File for the results, as JSON.

    Returns:
      The exit code.

    Raises:
      UserError: the model or a task cannot be used, or lm-eval is not installed.
    """
    if not tasks and not docs_choice:
        raise ConfigError([Problem("--tasks", "none", "names of lm-eval tasks, separated by commas, or --docs-choice")])
    if include_path is not None and not include_path.is_dir():
        raise ConfigError([Problem("--include-path", str(include_path), "a directory of task files")])
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from t5x_like.evaluation.harness import T5xLikeLM
    except ImportError as error:
        raise RefusedError(f"lm-evaluation-harness is missing ({error}): `pip install t5x-like[harness]`") from None
    model = T5xLikeLM(checkpoint, step=step, mode=mode)
    named, folders = list(tasks), [] if include_path is None else [include_path]
    if docs_choice:
        folder = Path(model.path) / "harness"
        stores = open_stores(run_directory.read_config(Path(model.path)).data)
        named.append(write_docs_choice(stores[0], folder))
        folders.append(folder)
    manager = TaskManager(include_path=[str(path) for path in folders] or None)
    unknown = [name for name in named if name not in manager.all_tasks]
    if unknown:
        fix = "`python -m t5x_like.evaluation.harness ls tasks` lists lm-eval's own"
        raise ConfigError([Problem("--tasks", ", ".join(unknown), "tasks that lm-eval knows, or --include-path", fix)])
    try:
        results = lm_eval.simple_evaluate(
            model=model, tasks=named, task_manager=manager, num_fewshot=num_fewshot, limit=limit
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise DataError(f"a task's data cannot be read: {error}") from error
    console = Console()
    console.print(_table(results["results"], results["n-samples"]))
    if docs_choice:
        console.print(_verdict(results["results"]["docs_choice"]), highlight=False)
    if output is not None:
        kept = {key: results[key] for key in ("results", "n-samples", "versions", "config") if key in results}
        write_output(output, json.loads(json.dumps(kept, default=str)))
    return EXIT_OK


def _table(results: dict[str, dict[str, Any]], samples: dict[str, dict[str, int]]) -> Table:
    table = Table(title="lm-evaluation-harness")
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


def _verdict(metrics: dict[str, Any]) -> str:
    """Whether the model knows more of its held-out text than chance."""
    from t5x_like.evaluation.docs_choice import CHOICES

    lines = []
    for metric in ("acc", "acc_norm", "acc_mutual_info"):
        value, error = metrics[f"{metric},none"], metrics[f"{metric}_stderr,none"]
        low, high = value - 1.96 * error, value + 1.96 * error
        is_above = "above" if low > 1 / CHOICES else "not above"
        lines.append(
            f"docs_choice {metric}: {value:.3f} [{low:.3f}, {high:.3f}], {is_above} chance ({1 / CHOICES:.2f})"
        )
    return "\n".join(lines)
