"""Entry point of the command line: parses arguments, calls one function, and turns errors into messages and exit codes.

Neither jax nor TensorFlow is imported before a command's own function is called, so that `--help` and errors of a
configuration are shown without delay.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import t5x_like
from t5x_like import plugins
from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.cli import (
    account,
    average,
    compare,
    convert,
    doctor,
    embed,
    eval,
    export,
    generate,
    inspect_data,
    launch,
    lm_eval,
    plan,
    predict,
    prepare,
    serve,
    study,
    sweep,
    train,
)
from t5x_like.cli.arguments import Parser, load_plugins
from t5x_like.cli.recipe_argument import recipe_words
from t5x_like.cli.stall_watch import ended_when_stalled
from t5x_like.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_UNEXPECTED,
    PIPE_CLOSED,
    UserError,
    exit_code_of,
    is_broken_pipe,
)
from t5x_like.utils.sanitize import sanitize_tracebacks, say
from t5x_like.utils.stall_limit import set_stall_seconds

COMMANDS = (
    train,
    prepare,
    inspect_data,
    plan,
    account,
    eval,
    compare,
    sweep,
    study,
    lm_eval,
    generate,
    embed,
    predict,
    convert,
    average,
    export,
    serve,
    launch,
    doctor,
)
"""Commands in the order of `--help`."""


EXIT_SECONDS = 20.0
"""Time that Python's clean-up after a failed command may take."""
SUCCESS_EXIT_SECONDS = 600.0
"""The same after a command that has succeeded."""


def entry() -> NoReturn:
    """Run the command of this process and end the process with its exit code.

    Python waits for the threads of libraries at the end. After a failed save, those of Orbax wait for minutes.
    """
    code = EXIT_UNEXPECTED
    try:
        code = main()
    except BaseException as error:
        code = exit_code_of(error)
        raise
    finally:
        timer = threading.Timer(SUCCESS_EXIT_SECONDS if code == EXIT_OK else EXIT_SECONDS, _end, (code,))
        timer.daemon = True
        timer.start()
    sys.exit(code)


def _end(code: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    sanitize_tracebacks()
    try:
        options, extra = parse(sys.argv[1:] if argv is None else argv)
        load_plugins(options)
        command: Callable[[argparse.Namespace, list[str]], int] = options.run
        with contextlib.ExitStack() as stack:
            # Training has limits of its own; launchers and sweeps wait for it as long as it runs.
            if "stall_timeout" in options:
                set_stall_seconds(options.stall_timeout)
                stack.enter_context(ended_when_stalled())
            with _objects(options):
                code = command(options, extra)
        for name in plugins.unused_trust(options.trust):
            say(f"t5x-like: --trust {name}: found no configuration that names it; it had no effect", file=sys.stderr)
        return code
    except UserError as error:
        say(f"t5x-like: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        say("t5x-like: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        if not is_broken_pipe(error):
            raise
        # The reader of stdout (`| head`) has closed it. Python still flushes stdout at exit: discard that output.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        try:
            say(f"t5x-like: {PIPE_CLOSED}", file=sys.stderr)
        except BrokenPipeError:
            # The same reader has read standard error as well (`2>&1 | head`).
            os.dup2(nowhere, sys.stderr.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as found:
        fault = _fault_error(found)
        if fault is None:
            raise
        say(f"t5x-like: {fault}", file=sys.stderr)
        return fault.exit_code


def _fault_error(error: Exception) -> UserError | None:
    """Return the error for the user if `error` is a fault of a machine, a connection or a storage; None otherwise."""
    # Without jax, only the operating system reports faults. To import jax would take longer than most such commands.
    if "jax" not in sys.modules and not isinstance(error, OSError):
        return None
    from t5x_like.distributed.startup import translate_error

    translated = translate_error(error)
    return translated if isinstance(translated, UserError) else None


@contextlib.contextmanager
def _objects(options: argparse.Namespace) -> Iterator[None]:
    """Download the models and files in object stores that the options name, and upload what the command has written."""
    if "t5x_like.storage.mirror" not in sys.modules:
        # No option is a URL. TensorStore takes a second to import.
        yield
    else:
        from t5x_like.storage.mirror import fetch
        from t5x_like.storage.transfers import transferred

        values = [one for value in vars(options).values() for one in (value if isinstance(value, list) else [value])]
        # A run that is followed may not have begun.
        is_followed = getattr(options, "follow", False)
        for path in {value.path for value in values if isinstance(value, CheckpointRef) and not is_followed}:
            fetch(path)
        with transferred(value for value in values if isinstance(value, Path)):
            yield
    if "t5x_like.storage.mirror" in sys.modules:
        from t5x_like.storage.mirror import upload_results

        upload_results()


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of a command, and its overrides of the recipe, which are not checked here.

    Raises:
      SystemExit: arguments that the command does not have; the code is 2 and the message is on stderr.
    """
    # Arguments after -- are overrides of the recipe, even if the command has an option of the same name.
    arguments = list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    if arguments[:1] in (["train"], ["prepare"], ["inspect"], ["plan"], ["sweep"]):
        words = recipe_words(arguments[1:cut])
        arguments = [arguments[0], *words, *arguments[cut:]]
        cut = len(words) + 1
    options, extra = _parser().parse_known_args(arguments[:cut])
    extra += arguments[cut + 1 :]
    if extra and not options.overrides:
        options.parser.error(f"unrecognized arguments: {' '.join(extra)}")
    return options, extra


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="t5x-like", description=t5x_like.__doc__)
    parser.add_argument("--version", action="version", version=f"t5x-like {t5x_like.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.register(commands)
    return parser


if __name__ == "__main__":
    entry()
