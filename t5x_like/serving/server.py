"""HTTP server for one model: opens the model, compiles it, and serves until a signal."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5x_like.data.chat.encoding import encode_rendered, load_template
from t5x_like.data.objectives.prompts import PromptFormat
from t5x_like.decoding.continuous_batching import Batcher, BatcherConfig
from t5x_like.decoding.generation_config import GenerationConfig
from t5x_like.decoding.masked_prompts import mask_id, settings_and_formats, special_tokens
from t5x_like.decoding.prompted_model import PromptedModel, ends_in_eos, open_prompted
from t5x_like.decoding.request_scheduler import RequestScheduler, SlotLimits
from t5x_like.decoding.unmasking_schedule import DiffusionSampling
from t5x_like.decoding.unmasking_scheduler import UnmaskingScheduler
from t5x_like.errors import EXIT_OK, EXIT_UNEXPECTED, ConfigError, ConfigProblem, SafetyError
from t5x_like.serving.chat_schema import EncodeChat
from t5x_like.utils.sanitize import say
from t5x_like.utils.stall_limit import CLEANUP_SECONDS, end_thread

DEFAULT_PROMPT_LENGTH = 512
"""Largest number of prompt tokens of a model whose training lengths are unknown."""


def serve_model(
    directory: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    slots: int = 8,
    prompt_length: int | None = None,
    max_new_tokens: int = 256,
    max_waiting: int = 256,
    max_waiting_per_client: int | None = None,
    max_connections: int = 1024,
    max_connections_per_client: int = 256,
    timeout: float = 600.0,
    api_key: Path | None = None,
    allowed_hosts: tuple[str, ...] = (),
    mode: str | None = None,
    step: int | None = None,
    cache_dtype: str | None = None,
    diffusion: DiffusionSampling | None = None,
) -> int:
    """Serve completions until SIGINT or SIGTERM, which cancel unfinished requests.

    Args:
      directory: A run, or the result of `convert --from`.
      host, port: Address; port 0 takes a free one, which is printed.
      slots: Number of completions that are decoded at once.
      prompt_length: Largest number of prompt tokens; None: that of training, or `DEFAULT_PROMPT_LENGTH`.
      max_new_tokens: Largest number of new tokens of a completion.
      max_waiting: Largest number of completions that wait for a slot.
      max_waiting_per_client: Largest number of them of one client; None: half of `max_waiting`.
      max_connections: Largest number of open connections.
      max_connections_per_client: Largest number of them from one address.
      timeout: Largest duration of a request in seconds.
      api_key: File of API keys; None: that of the environment variable T5X_LIKE_API_KEY, or else none is needed.
      allowed_hosts: Further names by which clients may address the server.
      mode: Mode token, see `prompt_format`.
      step: Step of the checkpoint; None for the newest.
      cache_dtype: See `generate_tokens`.
      diffusion: See `GenerationConfig`.

    Returns:
      The exit code.

    Raises:
      UserError: the model or the settings cannot be used, or the address is already in use.
    """
    try:
        import uvicorn

        from t5x_like.serving.access import API_KEY_VARIABLE, AccessRules, own_names, read_keys
        from t5x_like.serving.app import make_app
        from t5x_like.serving.connections import ConnectionLimits, limited_protocol
        from t5x_like.serving.service import Service
    except ImportError as error:
        raise SafetyError(
            f"serving needs the package {error.name}; install it: `pip install t5x-like[serve]`"
        ) from None
    problems = [
        ConfigProblem(name, str(value), "a number above 0")
        for name, value in (("--max-batch-size", slots), ("--max-waiting", max_waiting), ("--timeout", timeout))
        if not value > 0
    ]
    if not 0 <= port < 2**16:
        problems.append(ConfigProblem("--port", str(port), "0 to 65535"))
    limits = {
        "--max-connections": max_connections,
        "--max-connections-per-client": max_connections_per_client,
        "--max-waiting-per-client": max_waiting_per_client,
    }
    problems += [
        ConfigProblem(name, str(value), "a number above 0")
        for name, value in limits.items()
        if value is not None and value < 1
    ]
    if problems:
        raise ConfigError(problems)
    access = AccessRules(read_keys(api_key), own_names(host, allowed_hosts))
    if not access.keys and host not in ("127.0.0.1", "localhost", "::1"):
        warning = f"whoever reaches {host}:{port} can use the model; --api-key or {API_KEY_VARIABLE} asks for a key"
        say(f"warning: {warning}", file=sys.stderr)
    opened = open_prompted(directory, devices="local")
    settings = GenerationConfig(mode=mode, cache_dtype=cache_dtype, diffusion=diffusion)
    settings, formats = settings_and_formats(opened.loaded, settings)
    step, params = opened.load(step)
    tokenizer, form = opened.tokenizer, ends_in_eos(opened.tokenizer, formats.plain)
    model = opened.program.run.model
    limits_of_slots = (slots, prompt_length or opened.longest_prompt(form) or DEFAULT_PROMPT_LENGTH, max_new_tokens)
    batcher: RequestScheduler
    if settings.diffusion is None:
        batcher = Batcher(
            opened.program,
            params,
            allowed_V=opened.allowed(form),
            bidirectional=form.bidirectional,
            config=BatcherConfig(*limits_of_slots),
            cache_dtype=cache_dtype,
        )
    else:
        batcher = UnmaskingScheduler(
            opened.program,
            params,
            allowed_V=opened.allowed(form),
            mask_id=mask_id(opened.loaded),
            diffusion=settings.diffusion,
            special_tokens=special_tokens(opened.loaded),
            config=SlotLimits(*limits_of_slots),
        )

    def encode(text: str) -> list[int]:
        return form.ids(
            tokenizer.encode_marked(text) if form.sentinels else tokenizer.encode(text), tokenizer.vocabulary
        )

    service = Service(
        model=directory.resolve().name if opened.data is None else opened.program.run.name,
        batcher=batcher,
        encode=encode,
        tokenizer=tokenizer,
        vocab_size=model.vocab_size,
        start_id=None if model.encoder is not None or form.is_masked_text else model.decoder_start_token_id,
        encode_chat=None if form.is_masked_text else _chat_encoder(opened, form),
        max_waiting=max_waiting,
        max_waiting_per_client=max_waiting_per_client or -(-max_waiting // 2),
        timeout=timeout,
    )
    # Open streams must not delay a shutdown: they are cancelled after a second.
    most_seconds = timeout + service.body_seconds
    connections = ConnectionLimits(max_connections, max_connections_per_client, request_seconds=most_seconds)
    config = uvicorn.Config(
        make_app(service, access),
        http=limited_protocol(connections),
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=1,
        # Whoever connects from this machine could otherwise name another address as its own.
        proxy_headers=False,
    )
    # The address is bound before the compilation, which takes minutes, so that an address in use is reported at once.
    # Until the server listens, connections are refused.
    socket = _bind(config)
    batcher.warm_up()
    sizes = batcher.config
    say(
        f"{directory}, step {step:,}: prompts of up to {sizes.max_prompt_length:,} tokens, completions of up to "
        f"{sizes.max_new_tokens:,}, {sizes.slots} at once",
        file=sys.stderr,
    )
    return _run(uvicorn.Server(config), socket, batcher)


def _chat_encoder(opened: PromptedModel, form: PromptFormat) -> EncodeChat:
    """Return the function that lays dialogues out by the chat template: that of the run's corpus, or of the tokenizer.

    The start token of a decoder may be among the ids, where the template writes it.
    """
    corpus = opened.data.sources[0].corpus if opened.data is not None and opened.data.sources else None
    tokenizer = opened.loaded.tokenizer
    template = load_template(tokenizer, None if corpus is None else corpus.chat_template)

    def encode(messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None) -> list[int]:
        ids, _ = encode_rendered(tokenizer, template.render(messages, tools, add_generation_prompt=True))
        if opened.loaded.model.encoder is not None:
            return form.ids(ids, tokenizer.vocabulary)
        return ids

    return encode


def _bind(config: Any) -> Any:
    try:
        return config.bind_socket()
    except SystemExit:
        found = f"{config.host}:{config.port}"
        raise ConfigError([ConfigProblem("--port", found, "an unused address of this machine")]) from None


def _run(server: Any, socket: Any, batcher: RequestScheduler) -> int:
    """Serve HTTP in this thread and decode in another one. When one of them ends, the other one is ended.

    Raises the error that ended the decoding.
    """
    host, port = socket.getsockname()[:2]
    # Whoever reads the address may connect at once: until the server accepts connections, they wait.
    socket.listen()
    say(f"http://{host}:{port}/v1/completions", flush=True)

    def decode() -> None:
        # The error is kept in `batcher.failure`.
        with contextlib.suppress(BaseException):
            batcher.run()
        server.should_exit = True

    thread = threading.Thread(target=decode, name="decode", daemon=True)
    thread.start()
    try:
        server.run(sockets=[socket])
    finally:
        batcher.close()
        has_ended = end_thread(thread)
    if not has_ended:
        say(f"t5x-like: a decoding step did not end within {CLEANUP_SECONDS:g} s after the shutdown", file=sys.stderr)
    if batcher.failure is not None:
        raise batcher.failure
    return EXIT_OK if has_ended else EXIT_UNEXPECTED
