"""`t5x-like serve`: a model behind HTTP."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import jax

from t5x_like.config import EXIT_OK, EXIT_UNEXPECTED, ConfigError, Problem, RefusedError
from t5x_like.decoding.continuous import Batcher, Sizes
from t5x_like.decoding.models import ends_in_eos, formats_of, open_model

LONGEST = 512
"""Tokens of an imported model's longest prompt."""


def serve_command(
    directory: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    slots: int = 8,
    prompt_length: int | None = None,
    max_new_tokens: int = 256,
    max_waiting: int = 256,
    timeout: float = 600.0,
    mode: str | None = None,
    step: int | None = None,
    cache_dtype: str | None = None,
) -> int:
    """Serves completions until it is told to leave (SIGINT, SIGTERM); what is being answered then is given up.

    Args:
      directory: Path of a run.
      port: 0 takes a free one, which is printed.
      slots: Answers that are decoded at once.
      prompt_length: Tokens of the longest prompt; None: as in training, or `LONGEST` for an imported model.
      max_new_tokens: Tokens of the longest answer.
      max_waiting: Answers that may wait for a slot.
      timeout: Seconds that a request may take.
      mode: As of `prompts.prompt_format`.
      step: Checkpoint; None for the newest.
      cache_dtype: As of `generate_tokens`.

    Returns:
      The exit code.

    Raises:
      UserError: the run or the settings cannot be used, or the address is taken.
    """
    try:
        import uvicorn

        from t5x_like.serving.app import Service, make_app
    except ImportError as error:
        raise RefusedError(
            f"serving needs the package {error.name}; install it: `pip install t5x-like[serve]`"
        ) from None
    problems = [
        Problem(name, str(value), "a number above 0")
        for name, value in (("--slots", slots), ("--max-waiting", max_waiting), ("--timeout", timeout))
        if not value > 0
    ]
    if not 0 <= port < 2**16:
        problems.append(Problem("--port", str(port), "0 to 65535"))
    if problems:
        raise ConfigError(problems)
    formats = formats_of(directory, mode)
    opened = open_model(directory, jax.local_devices())
    step, params = opened.load(step)
    speller, form = opened.speller, ends_in_eos(opened.speller, formats.plain)
    batcher = Batcher(
        opened.program,
        params,
        allowed_V=opened.allowed(form),
        bidirectional=form.bidirectional,
        sizes=Sizes(slots, prompt_length or opened.longest_prompt(form) or LONGEST, max_new_tokens),
        cache_dtype=cache_dtype,
    )

    def encode(text: str) -> list[int]:
        return form.ids(speller.encode_marked(text) if form.sentinels else speller.encode(text), speller.vocabulary)

    service = Service(
        model=directory.resolve().name if opened.data is None else opened.program.run.name,
        batcher=batcher,
        encode=encode,
        decode=lambda tokens: speller.decode(list(tokens)),
        vocab_size=opened.program.run.model.vocab_size,
        most_waiting=max_waiting,
        timeout=timeout,
    )
    # Requests must not outlive the wish to leave: a stream may be long.
    config = uvicorn.Config(make_app(service), host=host, port=port, log_level="warning", timeout_graceful_shutdown=1)
    socket = _bound(config)  # Before minutes of compiling; until it is listened to, clients are refused.
    batcher.warm_up()
    sizes = batcher.sizes
    print(
        f"{directory}, step {step:,}: prompts of up to {sizes.prompt_length:,} tokens, answers of up to "
        f"{sizes.new_tokens:,}, {sizes.slots} at once",
        file=sys.stderr,
    )
    return _run(uvicorn.Server(config), socket, batcher)


def _bound(config: Any) -> Any:
    try:
        return config.bind_socket()
    except SystemExit:
        found = f"{config.host}:{config.port}"
        raise ConfigError([Problem("--port", found, "an address of this machine that is free")]) from None


def _run(server: Any, socket: Any, batcher: Batcher) -> int:
    """Serves in this thread and decodes in another; when one ends, so does the other."""
    host, port = socket.getsockname()[:2]
    print(f"http://{host}:{port}/v1/completions", flush=True)

    def decode() -> None:
        try:
            batcher.run()
        finally:
            server.should_exit = True

    thread = threading.Thread(target=decode, name="decode")
    thread.start()
    try:
        server.run(sockets=[socket])
    finally:
        batcher.close()
        thread.join()
    return EXIT_OK if batcher.failure is None else EXIT_UNEXPECTED
