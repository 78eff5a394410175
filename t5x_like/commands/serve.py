"""`t5x-like serve`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.commands.arguments import add_command, add_devices_option, not_negative, positive, simulate_devices


def register(commands: Any) -> None:
    parser = add_command(commands, "serve", _run, "answer completion requests over HTTP, as OpenAI's API does")
    add_devices_option(parser)
    parser.add_argument("directory", type=Path, metavar="DIR", help="of a run, or what `convert --from` wrote")
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="(default: 127.0.0.1)")
    parser.add_argument("--port", type=not_negative, default=8000, metavar="N", help="0: a free one (default: 8000)")
    parser.add_argument("--slots", type=positive, default=8, metavar="N", help="answers decoded at once (default: 8)")
    parser.add_argument(
        "--prompt-length", type=positive, metavar="N", help="tokens of the longest prompt (default: as in training)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="(default: 256)")
    parser.add_argument(
        "--max-waiting", type=positive, default=256, metavar="N", help="answers that may wait for a slot (default: 256)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds a request may take (default: 600)"
    )
    parser.add_argument(
        "--mode", choices=("R", "S", "X"), help="mode token in front of the prompts (default: S if trained)"
    )
    parser.add_argument("--cache-dtype", choices=("bfloat16", "int8"), help="of keys and values (default: the model's)")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    simulate_devices(options.devices)
    from t5x_like.serving.command import serve_command

    return serve_command(
        options.directory,
        host=options.host,
        port=options.port,
        slots=options.slots,
        prompt_length=options.prompt_length,
        max_new_tokens=options.max_new_tokens,
        max_waiting=options.max_waiting,
        timeout=options.timeout,
        mode=options.mode,
        step=options.step,
        cache_dtype=options.cache_dtype,
    )
