"""`t5x-like serve`."""

from __future__ import annotations

import argparse
from typing import Any

from t5x_like.cli.arguments import (
    add_command,
    add_devices_option,
    add_model_argument,
    local_path,
    not_negative,
    positive,
    simulate_devices,
)
from t5x_like.cli.unmasking_arguments import add_unmasking_options, unmasking_settings


def register(commands: Any) -> None:
    parser = add_command(commands, "serve", _run, "serve completions over HTTP, with the interface of OpenAI's API")
    add_model_argument(parser)
    add_devices_option(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=not_negative, default=8000, metavar="N", help="port; 0 takes a free one (default: 8000)"
    )
    parser.add_argument(
        "--max-batch-size", type=positive, default=8, metavar="N", help="answers decoded at once (default: 8)"
    )
    parser.add_argument(
        "--prompt-length", type=positive, metavar="N", help="tokens of the longest prompt (default: as in training)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="tokens of the longest answer (default: 256)"
    )
    parser.add_argument(
        "--max-waiting",
        type=positive,
        default=256,
        metavar="N",
        help="answers that may wait (default: 256)",
    )
    parser.add_argument(
        "--max-waiting-per-client",
        type=positive,
        metavar="N",
        help="answers of one client that may wait (default: half of --max-waiting)",
    )
    parser.add_argument(
        "--max-connections", type=positive, default=1024, metavar="N", help="open connections (default: 1024)"
    )
    parser.add_argument(
        "--max-connections-per-client",
        type=positive,
        default=256,
        metavar="N",
        help="open connections from one address (default: 256)",
    )
    parser.add_argument(
        "--api-key",
        type=local_path,
        metavar="FILE",
        help="file of API keys, one per line, one of which each request must have (default: the key in the environment "
        "variable T5X_LIKE_API_KEY; none: no key is needed)",
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="further host name by which clients may address the server; repeatable",
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds that a request may take (default: 600)"
    )
    parser.add_argument(
        "--mode",
        choices=("R", "S", "X"),
        help="mode token in front of each prompt (default: S if the model was trained with it)",
    )
    parser.add_argument(
        "--cache-dtype", choices=("bfloat16", "int8"), help="type of the cached keys and values (default: the model's)"
    )
    add_unmasking_options(parser)
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    simulate_devices(options.devices)
    from t5x_like.serving.server import serve_model

    return serve_model(
        options.model.path,
        host=options.host,
        port=options.port,
        slots=options.max_batch_size,
        prompt_length=options.prompt_length,
        max_new_tokens=options.max_new_tokens,
        max_waiting=options.max_waiting,
        max_waiting_per_client=options.max_waiting_per_client,
        max_connections=options.max_connections,
        max_connections_per_client=options.max_connections_per_client,
        timeout=options.timeout,
        api_key=options.api_key,
        allowed_hosts=tuple(options.allowed_host),
        mode=options.mode,
        step=options.model.step,
        cache_dtype=options.cache_dtype,
        diffusion=unmasking_settings(options),
    )
