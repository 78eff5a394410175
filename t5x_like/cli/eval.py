"""`t5x-like eval`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from t5x_like import plugins
from t5x_like.cli.arguments import (
    MODEL_HELP,
    add_command,
    add_devices_option,
    add_models_argument,
    add_processes_options,
    input_path,
    output_path,
    positive,
    process_flags,
    simulate_devices,
)
from t5x_like.errors import EXIT_OK, DataError
from t5x_like.utils.json_reader import parse_json

_MAX_CONFIGURATION_BYTES = 2**20
_NOT_OF_PAIRS = (
    *(
        "all",
        "skip_evaluated",
        "num_batches",
        "data",
        "split",
        "continuation",
        "no_held_out",
        "task",
        "module",
        "num_examples",
    ),
    *("inputs_length", "targets_length", "follow", "timeout", "predictions", "metrics", "inputs_field"),
    *("target_field", "prediction_field"),
)
"""Options of evaluations of other data than minimal pairs."""


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "eval",
        _run,
        "evaluate models on held-out text and by the metrics of seqio Tasks, or score predictions in a file",
    )
    add_devices_option(parser)
    add_processes_options(parser)
    add_models_argument(parser, nargs="*", help=f"{MODEL_HELP}; DIR:STEP,STEP takes several")
    parser.add_argument("--all", action="store_true", help="evaluate all saved steps")
    parser.add_argument("--skip-evaluated", action="store_true", help="evaluate only steps that are not evaluated yet")
    parser.add_argument("--num-batches", type=positive, metavar="N", help="batches per objective (default: the run's)")
    parser.add_argument(
        "--output",
        type=output_path,
        metavar="PATH",
        help="file to write the results to (default: MODEL/evaluation.json)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="RECIPE|FILE",
        help="recipe with the data, or files of rows (.jsonl, .csv, .tsv, .parquet, ...) that the model answers "
        "(default: a run's own data); scores of a run on other data are printed and written to --output, not to the "
        "run's directory",
    )
    parser.add_argument(
        "--split",
        default="validation",
        metavar="NAME",
        help="split of the text and of the Tasks (default: validation); another one is written to "
        "MODEL/evaluation.NAME.json and not recorded in the run",
    )
    parser.add_argument("--no-held-out", action="store_true", help="evaluate Tasks only")
    parser.add_argument(
        "--no-intervals", action="store_true", help="skip the bootstrap, which is faster; `compare` has no rows then"
    )

    parser.add_argument(
        "--continuation",
        type=positive,
        nargs=2,
        metavar=("GIVEN", "SCORED"),
        help="score SCORED tokens after GIVEN ones, in windows that are the same for every architecture and "
        "row length, so that `compare` can distinguish the models (default: evaluation.continuation of the run)",
    )

    tasks = parser.add_argument_group("seqio Tasks", "in addition to those of a run's own evaluation.tasks")
    tasks.add_argument(
        "--task", action="append", default=[], metavar="NAME", help="name of a Task or Mixture; can be repeated"
    )
    tasks.add_argument("--module", metavar="MODULE", help="module to import, which registers the Tasks")
    tasks.add_argument("--num-examples", type=positive, metavar="N", help="first N examples of a Task (default: all)")
    tasks.add_argument(
        "--inputs-length", type=positive, metavar="N", help="tokens of the inputs (default: as in training)"
    )
    tasks.add_argument(
        "--targets-length", type=positive, metavar="N", help="tokens of the targets (default: as in training)"
    )

    follow = parser.add_argument_group("following a run")
    follow.add_argument(
        "--follow", action="store_true", help="evaluate each new checkpoint, until the run has finished"
    )
    follow.add_argument("--timeout", type=float, metavar="SECONDS", help="stop if no checkpoint appears for this time")

    pairs = parser.add_argument_group("minimal pairs")
    pairs.add_argument(
        "--pairs",
        type=input_path,
        metavar="FILE",
        help="JSON lines with the texts good and bad: report how often the good one is the more likely one",
    )
    pairs.add_argument(
        "--pairs-score",
        choices=("log_likelihood", "pseudo_likelihood", "diffusion_bound"),
        help="score of a text (default: log_likelihood; by a model that predicts masked tokens only diffusion_bound if "
        "it was trained by masked diffusion, else pseudo_likelihood)",
    )

    probes = parser.add_argument_group("use of the context")
    probes.add_argument(
        "--loss-by-position",
        action="store_true",
        help="print the held-out loss by position in the row instead of the usual scores",
    )
    probes.add_argument(
        "--retrieval",
        type=_lengths,
        metavar="N,N",
        help="report how often the model finds a statement in contexts of N characters, by the depth of the statement",
    )

    files = parser.add_argument_group("rows of files: --data FILE, or predictions without a model")
    files.add_argument(
        "--predictions", type=input_path, metavar="FILE", help="JSON lines with a target and a prediction"
    )
    files.add_argument(
        "--metrics",
        metavar="NAMES",
        help="names of metrics, separated by commas, as in squad,bleu (default with --data FILE: those of the head)",
    )
    files.add_argument(
        "--inputs-field", metavar="NAME", help="field of the inputs in --data FILE (default: that of the run's data)"
    )
    files.add_argument(
        "--target-field",
        metavar="NAME",
        help="(default: that of the run's data; with --predictions target, targets, answers, reference or references)",
    )
    files.add_argument("--prediction-field", metavar="NAME", help="(default: prediction or output)")
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    if options.retrieval is not None or options.loss_by_position:
        return _probe_context(options)
    if options.predictions is not None and options.pairs is None:
        return _score_predictions(options)
    if not options.models:
        options.parser.error("found no MODEL, expected at least one, or --predictions FILE")
    if options.all and any(reference.steps for reference in options.models):
        options.parser.error("--all evaluates all steps: name no step with MODEL")
    if options.follow and (len(options.models) > 1 or options.models[0].steps or options.output):
        options.parser.error("--follow takes one run, all of whose steps it evaluates, and writes into its directory")
    if options.prediction_field:
        options.parser.error("--prediction-field is an option of --predictions FILE")
    if options.pairs_score and options.pairs is None:
        options.parser.error("--pairs-score is an option of --pairs FILE")
    if options.pairs is not None:
        return _score_pairs(options)
    if options.data and _names_files(options.data):
        return _score_answers(options)
    if options.metrics or options.target_field or options.inputs_field:
        options.parser.error(
            "--metrics, --inputs-field and --target-field are options of --data FILE and of --predictions FILE"
        )
    if options.data and len(options.data) > 1:
        options.parser.error(f"--data takes one recipe, or files of rows: found {' '.join(options.data)}")
    if options.follow and options.split != "validation":
        options.parser.error("--follow scores the validation split: evaluate other splits when the run has finished")
    if options.follow and options.data:
        options.parser.error("--follow evaluates on the run's own data: it takes no --data")
    if options.timeout is not None and not options.follow:
        options.parser.error("--timeout is an option of --follow")
    if options.module and not options.task:
        options.parser.error("--module names the module that registers the Task of --task: found no --task")
    if options.module:
        plugins.trust([options.module])
        plugins.require_module(options.module, "--module")
    simulate_devices(options.devices)
    # TensorFlow, which Tasks import, logs to stderr.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from t5x_like.distributed.startup import initialize

    with initialize(process_flags(options)):
        return _evaluate(options)


def _names_files(names: list[str]) -> bool:
    """Return whether --data names files of rows, and not a recipe."""
    from t5x_like.config.corpus import file_format

    return all(file_format(name) is not None and not _is_saved_configuration(Path(name)) for name in names)


def _is_saved_configuration(file: Path) -> bool:
    """Return whether a file is a saved configuration: a config.json, or a .json file whose object has its sections."""
    if file.name == "config.json":
        return True
    try:
        if file.suffix != ".json" or file.stat().st_size > _MAX_CONFIGURATION_BYTES:
            return False
        content = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"model", "data", "training"} <= content.keys()


def _names(options: argparse.Namespace) -> list[str]:
    return [name.strip() for name in (options.metrics or "").split(",") if name.strip()]


def _score_answers(options: argparse.Namespace) -> int:
    if options.follow or options.all or options.task:
        options.parser.error("--data FILE scores the named checkpoints: it takes no --follow, --all or --task")
    simulate_devices(options.devices)
    from t5x_like.distributed.startup import initialize

    with initialize(process_flags(options)):
        from t5x_like.evaluation.evaluate_files import evaluate_files
        from t5x_like.evaluation.results_store import write_output

        found = []
        for reference in options.models:
            found.append(
                evaluate_files(
                    reference,
                    options.data,
                    _names(options),
                    inputs_field=options.inputs_field,
                    target_field=options.target_field,
                    **({"draws": 0} if options.no_intervals else {}),
                )
            )
            _print_scores(found[-1])
        if options.output is not None:
            write_output(options.output, found[0] if len(found) == 1 else found)
    return EXIT_OK


def _score_pairs(options: argparse.Namespace) -> int:
    for name in _NOT_OF_PAIRS:
        if getattr(options, name) != options.parser.get_default(name):
            options.parser.error(f"--pairs FILE takes no --{name.replace('_', '-')}")
    simulate_devices(options.devices)
    from t5x_like.distributed.startup import initialize

    with initialize(process_flags(options)):
        from t5x_like.evaluation.console_tables import pairs_table
        from t5x_like.evaluation.minimal_pairs import score_pairs
        from t5x_like.evaluation.results_store import write_output
        from t5x_like.model_loading import open_model
        from t5x_like.utils.console import Console

        found = []
        for reference in options.models:
            loaded = open_model(reference.path)
            for step in reference.steps or (None,):
                draws = {"draws": 0} if options.no_intervals else {}
                found.append(score_pairs(loaded, options.pairs, step=step, scoring=options.pairs_score, **draws))
        Console().print(pairs_table(found))
        if options.output is not None:
            write_output(options.output, found[0] if len(found) == 1 else found)
    return EXIT_OK


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected numbers of characters, as in 200,800")
    return lengths


def _probe_context(options: argparse.Namespace) -> int:
    allowed = ("num_batches", "split") if options.loss_by_position else ()
    for name in (*_NOT_OF_PAIRS, "pairs", "pairs_score", *(("retrieval",) if options.loss_by_position else ())):
        if name not in allowed and getattr(options, name) != options.parser.get_default(name):
            probe = "--loss-by-position" if options.loss_by_position else "--retrieval"
            options.parser.error(f"{probe} takes no --{name.replace('_', '-')}")
    if not options.models:
        options.parser.error("name a model")
    simulate_devices(options.devices)
    from t5x_like.distributed.startup import initialize

    with initialize(process_flags(options)):
        from t5x_like.evaluation.bootstrap import DRAWS
        from t5x_like.evaluation.console_tables import positions_table, retrieval_table
        from t5x_like.evaluation.position_losses import position_scores
        from t5x_like.evaluation.results_store import write_output
        from t5x_like.evaluation.retrieval import score_retrieval
        from t5x_like.model_loading import open_model
        from t5x_like.utils.console import Console

        found = []
        for reference in options.models:
            loaded = open_model(reference.path)
            for step in reference.steps or (None,):
                if options.loss_by_position:
                    sizes = {"num_batches": options.num_batches, "split": options.split}
                    found.append(position_scores(loaded, step=step, **sizes))
                    Console().print(positions_table(found[-1]))
                else:
                    draws = 0 if options.no_intervals else DRAWS
                    found.append(score_retrieval(loaded, options.retrieval, step=step, draws=draws))
                    Console().print(retrieval_table(found[-1]))
        if options.output is not None:
            write_output(options.output, found[0] if len(found) == 1 else found)
    return EXIT_OK


def _print_scores(scores: dict[str, Any]) -> None:
    from t5x_like.evaluation.console_tables import confusion_table, predictions_table
    from t5x_like.utils.console import Console

    Console().print(predictions_table(scores))
    if "confusion" in scores:
        Console().print(confusion_table(scores["confusion"]))


def _evaluate(options: argparse.Namespace) -> int:
    from t5x_like.config.recipes import load_recipe
    from t5x_like.config.seqio_task import EvaluationTask
    from t5x_like.evaluation.options import EvalOptions

    tasks = tuple(
        EvaluationTask(
            mixture_or_task=name,
            module=options.module,
            split=options.split,
            num_examples=options.num_examples,
            inputs_length=options.inputs_length,
            targets_length=options.targets_length,
        )
        for name in dict.fromkeys(options.task)
    )
    asked = EvalOptions(
        num_batches=options.num_batches,
        tasks=tasks,
        held_out=not options.no_held_out,
        split=options.split,
        intervals=not options.no_intervals,
        only_new=options.skip_evaluated,
        all_steps=options.all,
        continuation=None if options.continuation is None else (options.continuation[0], options.continuation[1]),
    )
    if options.follow:
        from t5x_like.evaluation.evaluate_runs import follow_run

        return follow_run(options.models[0].path, asked, write_report=_write_report, timeout=options.timeout)
    from t5x_like.evaluation.evaluate_runs import evaluate_checkpoints

    like = None if options.data is None else load_recipe(options.data[0])
    return evaluate_checkpoints(options.models, asked, write_report=_write_report, like=like, output=options.output)


def _write_report(run_dir: Path) -> None:
    from t5x_like.reports.run_report import write_report

    try:
        write_report(run_dir)
    except OSError as error:
        raise DataError(f"{run_dir}: cannot write the report ({error.strerror or error})") from None


def _score_predictions(options: argparse.Namespace) -> int:
    if options.models or not options.metrics:
        options.parser.error("--predictions takes --metrics, and no MODEL")
    from t5x_like.evaluation.results_store import write_output
    from t5x_like.evaluation.score_predictions import score_file

    found = score_file(
        options.predictions,
        _names(options),
        target_field=options.target_field,
        prediction_field=options.prediction_field,
    )
    _print_scores(found)
    if options.output is not None:
        write_output(options.output, found)
    return EXIT_OK
