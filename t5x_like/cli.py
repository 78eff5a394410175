"""The command line, thin: reads arguments, calls one function, turns errors into messages and exit codes.

Neither jax nor TensorFlow is imported before a command's own function is called, so that `--help` and every refusal of
a configuration answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import t5x_like
from t5x_like.commands import (
    compare,
    convert,
    embed,
    evaluate,
    export,
    generate,
    harness,
    inspect,
    launch,
    plan,
    prepare,
    serve,
    train,
)
from t5x_like.commands.arguments import Parser
from t5x_like.config import UserError
from t5x_like.config.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, reader_has_gone

COMMANDS = (train, prepare, inspect, plan, evaluate, compare, harness, generate, embed, convert, export, serve, launch)
"""In the order of `--help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code of the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # What stands behind -- is for the recipe, also where an option in front has the same name.
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _parser()
    try:
        options, extra = parser.parse_known_args(arguments[:cut])
        extra += arguments[cut + 1 :]
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
    except (BrokenPipeError, SystemExit) as error:
        if not reader_has_gone(error):
            raise
        # Whoever read stdout (`| head`) has left. What Python would still write at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("t5x-like: the reader of the output has gone", file=sys.stderr)
        return EXIT_BROKEN_PIPE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="t5x-like", description=t5x_like.__doc__)
    parser.add_argument("--version", action="version", version=f"t5x-like {t5x_like.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.register(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
