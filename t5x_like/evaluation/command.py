"""`t5x-like eval`, and the evaluations during training: scores and samples into the run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from t5x_like.config import EXIT_OK, DataError
from t5x_like.data.store import Store
from t5x_like.decoding.trained import open_trained
from t5x_like.evaluation.evaluator import evaluate
from t5x_like.evaluation.samples import decode_samples
from t5x_like.monitoring.records import dumps, read_records
from t5x_like.monitoring.report import write_report
from t5x_like.program import Program
from t5x_like.run_directory import write_atomically

EVALUATION = "evaluation.json"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.json"

Result = dict[str, Any]


def evaluate_run(
    run_dir: Path, *, steps: Sequence[int] = (), num_batches: int | None = None, output: Path | None = None
) -> int:
    """Scores checkpoints of the run in `run_dir` on its held-out text, and prints a table for each.

    Args:
      run_dir: Gets the scores and samples, and its report is made anew; unless `output` is given.
      steps: Checkpoints; none: the newest.
      num_batches: Per objective; None: as the run's configuration has it.
      output: File to write the scores to instead: an object, or a list of objects for more than one step.

    Returns:
      The exit code.

    Raises:
      UserError: the run, its data or a checkpoint cannot be used, or the result cannot be written.
    """
    trained = open_trained(run_dir)
    results = []
    console = Console(quiet=jax.process_index() > 0)
    for chosen in steps or (None,):
        step, params = trained.params(chosen)
        if output is None:
            result = evaluate_and_record(
                trained.program, params, trained.stores, run_dir, step, num_batches=num_batches
            )
        else:
            batches = num_batches or trained.run.evaluation.num_batches
            result = evaluate(trained.program, params, trained.stores, step=step, num_batches=batches)
        results.append(result)
        for table in tables(result):
            console.print(table)
    if jax.process_index() == 0:
        try:
            if output is None:
                write_report(run_dir)
            else:
                _write_json(output, results if len(steps) > 1 else results[0])
        except OSError as error:
            raise DataError(f"{output or run_dir}: cannot be written ({error.strerror or error})") from None
    return EXIT_OK


def evaluate_and_record(
    program: Program, params: Any, stores: Sequence[Store], run_dir: Path, step: int, *, num_batches: int | None = None
) -> Result:
    """Scores parameters and writes evaluation.json, samples.json (both of the newest step that was evaluated) and the
    step's line of evaluations.jsonl.

    Returns:
      What `evaluator.evaluate` returns.
    """
    run = program.run
    batches = num_batches or run.evaluation.num_batches
    result = evaluate(program, params, stores, step=step, num_batches=batches)
    samples = decode_samples(program, params, stores, count=run.monitoring.samples)
    if jax.process_index() == 0:
        newest = _record(run_dir / EVALUATIONS, result)
        if newest == step:
            _write_json(run_dir / EVALUATION, result)
            _write_json(run_dir / SAMPLES, samples)
    return result


def is_evaluated(run_dir: Path, step: int) -> bool:
    """Whether evaluations.jsonl has the scores of this step."""
    path = run_dir / EVALUATIONS
    return path.exists() and any(record["step"] == step for record in read_records(path)[0])


def _record(path: Path, result: Result) -> int:
    """Puts a result among those of other steps, in their order, in the place of an older one of its step. Returns the
    last step."""
    known = read_records(path)[0] if path.exists() else []
    by_step = {record["step"]: record for record in known} | {result["step"]: result}
    write_atomically(path, "".join(dumps(by_step[step]) + "\n" for step in sorted(by_step)))
    return max(by_step)


def _write_json(path: Path, document: Any) -> None:
    """With line breaks, for people; numbers that are not finite as in the records."""
    write_atomically(path, json.dumps(json.loads(dumps(document)), indent=2, ensure_ascii=False) + "\n")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def tables(result: Result) -> list[Table]:
    """The scores for people."""
    objectives = Table(title=f"held-out text, step {result['step']:,}")
    objectives.add_column("objective")
    for name in ("loss", "accuracy", "tokens"):
        objectives.add_column(name, justify="right")
    for name, scores in result["objectives"].items():
        objectives.add_row(name, f"{scores['loss']:.4f}", _percent(scores.get("accuracy")), f"{scores['tokens']:,}")
    own = Table(title="what the model reports of itself")
    for name in ("objective", "metric", "mean"):
        own.add_column(name, justify="right" if name == "mean" else "left")
    for name, scores in result["objectives"].items():
        for metric in [metric for metric in scores if metric not in ("loss", "accuracy", "tokens")]:
            own.add_row(name, metric, f"{scores[metric]:.4f}")
    found = [objectives, own] if own.row_count else [objectives]
    if result["prefix_lm"] is None:
        return found
    bits = Table(title=f"bits per byte of the same {result['prefix_lm']['bytes']:,} bytes")
    bits.add_column("code")
    bits.add_column("bits", justify="right")
    bits.add_row("this model, first half of each window given", f"{result['prefix_lm']['bits_per_byte']:.3f}")
    names = {
        "unigram_bits_per_byte": "token unigram",
        "byte_entropy_bits_per_byte": "byte entropy",
        "gzip_bits_per_byte": "gzip -9",
        "lzma_bits_per_byte": "lzma",
    }
    for key, name in names.items():
        bits.add_row(name, f"{result['baselines'][key]:.3f}")
    return [*found, bits]
