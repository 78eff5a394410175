"""The command line, thin: reads arguments, calls one function, turns errors into messages and exit codes.

Neither jax nor TensorFlow is imported before a command's own function is called, so that `--help` and every refusal of
a configuration answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import t5x_like
from t5x_like.config import EXIT_OK, EXIT_USAGE, ConfigError, RunConfig, UserError

EXIT_INTERRUPTED = 130
"""Ctrl-C where no checkpoint is at stake: the shell's 128 + SIGINT."""

EXIT_BROKEN_PIPE = 141
"""The shell's 128 + SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code of the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    try:
        options, extra = parser.parse_known_args(arguments)
        if extra and not options.overrides:
            options.parser.error(f"unrecognized arguments: {' '.join(extra)}")
        command: Callable[[argparse.Namespace, list[str]], int] = options.run
        return command(options, extra)
    except UserError as error:
        print(f"t5x-like: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("t5x-like: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout (`| head`) has left. What Python would still write at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("t5x-like: the reader of the output has gone", file=sys.stderr)
        return EXIT_BROKEN_PIPE


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    run = _configured_run(options, overrides)
    if options.print_config:
        from t5x_like.config.serialization import to_json

        print(to_json(run), end="")
        return EXIT_OK
    _simulate_devices(options.devices)
    from t5x_like.trainer import train

    return train(run, options.workdir or Path("runs") / run.name, options.allow_change)


def _prepare(options: argparse.Namespace, overrides: list[str]) -> int:
    run = _configured_run(options, overrides)
    # TensorFlow, which seqio brings, announces itself on stderr; what it has to say of GPUs is no matter here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from t5x_like.data.prepare import prepare

    make_parts = None
    if options.beam:
        from t5x_like.data.beam import make_parts_by

        make_parts = make_parts_by(shlex.split(options.beam_options))
    prepare(run.data, report=print, workers=options.workers, make_parts=make_parts)
    return EXIT_OK


def _inspect(options: argparse.Namespace, overrides: list[str]) -> int:
    run = _configured_run(options, overrides)
    if options.stats:
        from t5x_like.inspection.page import write_statistics

        output = options.output or Path("runs") / f"{run.name}.statistics.html"
        print(write_statistics(run, output, rows=options.sample_rows, first_row=options.first_row))
        return EXIT_OK
    from t5x_like.data.describe import inspect

    inspect(run, rows=options.rows, first_row=options.first_row)
    return EXIT_OK


def _eval(options: argparse.Namespace, _: list[str]) -> int:
    _simulate_devices(options.devices)
    from t5x_like.evaluation.command import evaluate_run

    return evaluate_run(
        options.run_dir, steps=tuple(options.step), num_batches=options.num_batches, output=options.output
    )


def _generate(options: argparse.Namespace, _: list[str]) -> int:
    _simulate_devices(options.devices)
    from t5x_like.decoding.command import generate_command

    return generate_command(
        options.run_dir,
        prompt=options.prompt,
        input_path=options.input,
        mode=options.mode,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        num_samples=options.num_samples,
        step=options.step,
    )


def _convert(options: argparse.Namespace, _: list[str]) -> int:
    _simulate_devices(options.devices)
    from t5x_like.interop.huggingface import directories

    if options.from_format == "t5x":
        from t5x_like.interop.t5x.directories import import_directory

        if not options.model:
            options.parser.error("--from t5x needs --model: a T5X checkpoint does not say what its model is")
        import_directory(options.source, options.out, model=options.model, optimizer=options.optimizer)
    elif options.from_format:
        scale = {None: None, "yes": True, "no": False}[options.scale_logits]
        directories.import_directory(options.source, options.out, scale_logits=scale)
    elif options.merge:
        from t5x_like.interop.merging import merge_directory

        merge_directory(options.source, options.out, step=options.step)
    else:
        directories.export_directory(
            options.source, options.out, family=options.family, dtype=options.dtype, step=options.step
        )
    return EXIT_OK


def _embed(options: argparse.Namespace, _: list[str]) -> int:
    _simulate_devices(options.devices)
    from t5x_like.embedding.command import embed_command

    return embed_command(
        options.directory,
        options.input,
        options.output,
        field=options.field,
        pooling=options.pooling,
        normalize={None: None, "yes": True, "no": False}[options.normalize],
        bidirectional={None: None, "bidirectional": True, "causal": False}[options.attention],
        max_length=options.max_length,
        step=options.step,
    )


def _simulate_devices(number: int | None) -> None:
    """A mesh of CPU devices in this process, which must be asked for before jax looks for devices."""
    if number is not None:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", number)


def _configured_run(options: argparse.Namespace, overrides: list[str]) -> RunConfig:
    """The recipe with its overrides, checked.

    Raises:
      UserError: no such recipe, a wrong override, or a configuration with problems, all of which are listed.
    """
    from t5x_like.config.recipes import apply_overrides, load_recipe
    from t5x_like.config.validate import validate

    run = apply_overrides(load_recipe(options.recipe), overrides, options=options.parser.option_strings)
    problems = validate(run)
    if problems:
        raise ConfigError(problems)
    return run


class _RecipeHelp(argparse.Action):
    """`--help`: of the command; after a recipe also of all its fields."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        parser.print_help()
        if namespace.recipe:
            from t5x_like.config.recipes import apply_overrides, load_recipe

            print()
            apply_overrides(load_recipe(namespace.recipe), ["--help"])
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Spells options in full, and answers a mistyped one with the nearest."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    @property
    def option_strings(self) -> list[str]:
        return [option for option in self._option_string_actions if option.startswith("--")]

    def error(self, message: str) -> NoReturn:
        unknown = [word for word in message.split() if word.startswith("--")] if "unrecognized" in message else []
        near = [match for word in unknown for match in difflib.get_close_matches(word, self.option_strings, n=1)]
        hint = f" (perhaps you meant {', '.join(near)})" if near else ""
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"t5x-like: {message}{hint}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="t5x-like", description=t5x_like.__doc__)
    parser.add_argument("--version", action="version", version=f"t5x-like {t5x_like.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    train = _recipe_command(commands, "train", _train, "pre-train or go on training; the same command again resumes")
    train.add_argument("--workdir", type=Path, metavar="DIR", help="the run's directory (default: runs/NAME)")
    train.add_argument("--print-config", action="store_true", help="print the resolved configuration as JSON and leave")
    train.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on although this training field differs from the run's, as in training.batch_size",
    )
    _devices_option(train)

    prepare = _recipe_command(commands, "prepare", _prepare, "turn the recipe's corpora into stores of tokens")
    prepare.add_argument("--workers", type=_positive, metavar="N", help="processes (default: as many as cores)")
    prepare.add_argument("--beam", action="store_true", help="as an Apache Beam pipeline, in place of --workers")
    prepare.add_argument(
        "--beam-options", default="", metavar="OPTIONS", help="of the pipeline, as in '--runner=FlinkRunner'"
    )

    inspect = _recipe_command(commands, "inspect", _inspect, "show training rows as text, masks in colour")
    inspect.add_argument("--rows", type=_positive, default=8, metavar="N", help="rows to show (default: 8)")
    inspect.add_argument(
        "--first-row", type=_not_negative, default=0, metavar="I", help="rows of the run before them (default: 0)"
    )
    inspect.add_argument(
        "--stats", action="store_true", help="instead, read a sample of the rows and write their statistics as a page"
    )
    inspect.add_argument(
        "--sample-rows", type=_positive, default=4096, metavar="N", help="rows of the sample (default: 4096)"
    )
    inspect.add_argument(
        "--output", type=Path, metavar="PATH", help="the page's file (default: runs/NAME.statistics.html)"
    )

    evaluate = _run_command(commands, "eval", _eval, "score a run's checkpoints on held-out text")
    evaluate.add_argument(
        "--step", type=int, nargs="+", default=[], metavar="N", help="checkpoints (default: the newest)"
    )
    evaluate.add_argument(
        "--num-batches", type=_positive, metavar="N", help="batches per objective (default: the run's)"
    )
    evaluate.add_argument("--output", type=Path, metavar="PATH", help="where to write (default: DIR/evaluation.json)")

    generate = _run_command(commands, "generate", _generate, "continue or fill in prompts, read from stdin by default")
    source = generate.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="a single prompt")
    source.add_argument("--input", type=Path, metavar="FILE", help='JSON lines {"prompt": ...}; answered in JSON lines')
    generate.add_argument(
        "--mode", choices=("R", "S", "X"), help="mode token in front of the prompt (default: S if trained)"
    )
    generate.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="(default: 64)")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    generate.add_argument("--top-k", type=_positive, metavar="K", help="sample from the K likeliest tokens only")
    generate.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens of joint probability P"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")
    generate.add_argument(
        "--num-samples", type=_positive, default=1, metavar="N", help="answers per prompt (default: 1)"
    )
    generate.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")

    embed = _command(commands, "embed", _embed, "turn the texts of a JSONL file into vectors")
    _devices_option(embed)
    embed.add_argument("directory", type=Path, metavar="DIR", help="of a run, or what `convert --from` wrote")
    embed.add_argument("--input", type=Path, required=True, metavar="FILE", help='JSON lines {"text": ...}')
    embed.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help=".npy or .parquet, rows in the order of the texts"
    )
    embed.add_argument("--field", default="text", metavar="NAME", help="that holds the text (default: text)")
    embed.add_argument("--pooling", choices=("cls", "mean", "last"), help="(default: the model's own, or mean)")
    embed.add_argument("--normalize", choices=("yes", "no"), help="to length 1 (default: as the model says, or no)")
    embed.add_argument(
        "--attention", choices=("causal", "bidirectional"), help="of a decoder (default: as it was trained, or causal)"
    )
    embed.add_argument("--max-length", type=_positive, metavar="N", help="tokens of a text; longer ones are cut")
    embed.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    embed.set_defaults(overrides=False)

    convert = _command(
        commands, "convert", _convert, "turn a Hugging Face or T5X model into a checkpoint, or one into that"
    )
    _devices_option(convert)
    direction = convert.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--from", dest="from_format", choices=("hf", "t5x"), help="SOURCE is a Hugging Face directory or T5X checkpoint"
    )
    direction.add_argument("--to", dest="to_format", choices=("hf",), help="OUT becomes a Hugging Face directory")
    direction.add_argument("--merge", action="store_true", help="OUT becomes the run SOURCE without its adapters apart")
    convert.add_argument("source", type=Path, metavar="SOURCE", help="with --to: a run, or what --from wrote")
    convert.add_argument("out", type=Path, metavar="OUT", help="a directory that is not there yet")
    convert.add_argument(
        "--model", metavar="MODEL", help="with --from t5x: a preset, as in t5_1_1:base, or a recipe that has the model"
    )
    convert.add_argument(
        "--optimizer",
        action="store_true",
        help="with --from t5x: Adafactor's moments too",
    )
    convert.add_argument(
        "--family", metavar="NAME", help="with --to: its model_type (default: the imported or plainest)"
    )
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="with --to: of the tensors (default: float32)",
    )
    convert.add_argument("--step", type=int, metavar="N", help="with --to, --merge: checkpoint (default: the newest)")
    convert.add_argument(
        "--scale-logits",
        choices=("yes", "no"),
        help="with --from: whether T5's logits are scaled (default: as config.json says; umT5: no)",
    )
    convert.set_defaults(overrides=False)
    return parser


def _command(
    commands: Any, name: str, run: Callable[..., int], summary: str, **keywords: Any
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", **keywords
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def _recipe_command(commands: Any, name: str, run: Callable[..., int], summary: str) -> argparse.ArgumentParser:
    parser = _command(
        commands,
        name,
        run,
        summary,
        epilog="Any field of the recipe can be set: --training.batch-size 64 --data.corpus.files 'texts/*.jsonl'. "
        f"`t5x-like {name} RECIPE --help` lists them.",
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", action=_RecipeHelp, nargs=0, help="show this message and, of a RECIPE, all fields"
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a Python recipe (FILE.py[:FUNCTION]), a config.json, or the name of a shipped one",
    )
    parser.set_defaults(overrides=True)
    return parser


def _run_command(commands: Any, name: str, run: Callable[..., int], summary: str) -> argparse.ArgumentParser:
    parser = _command(commands, name, run, summary)
    _devices_option(parser)
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="directory of a run, as given to `train --workdir`"
    )
    parser.set_defaults(overrides=False)
    return parser


def _devices_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=_positive, metavar="N", help="run on N simulated CPU devices")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}, expected a number above 0")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"found {value}, expected 0 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
