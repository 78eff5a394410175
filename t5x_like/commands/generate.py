"""`t5x-like generate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.commands.arguments import add_run_command, positive, process_flags, simulate_devices


def register(commands: Any) -> None:
    parser = add_run_command(commands, "generate", _run, "continue or fill in prompts, read from stdin by default")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="a single prompt")
    source.add_argument("--input", type=Path, metavar="FILE", help='JSON lines {"prompt": ...}; answered in JSON lines')
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the lines there; the same command goes on after a kill"
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    _prompt_options(parser)
    _choice_options(parser)
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="answers at once (default: 32)")
    parser.add_argument(
        "--cache-dtype", choices=("bfloat16", "int8"), help="of remembered keys and values (default: the model's)"
    )


def _prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode", choices=("R", "S", "X"), help="mode token in front of the prompt (default: S if trained)"
    )
    parser.add_argument(
        "--fill", action="store_true", help="of prompts with gaps (<mask>), answer with the whole text, gaps filled"
    )
    parser.add_argument("--literal", action="store_true", help="<mask> and <extra_id_N> in prompts are plain text")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="(default: 64)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends an answer, and is left out; can be repeated"
    )
    parser.add_argument(
        "--choice", action="append", default=[], metavar="TEXT", help="the answer is one of these; can be repeated"
    )
    parser.add_argument("--allowed-characters", metavar="TEXT", help="the answer consists of these, as in 0123456789")
    parser.add_argument("--scores", action="store_true", help="with log-likelihoods, and how each answer ended")


def _choice_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-k", type=positive, metavar="K", help="sample from the K likeliest tokens only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens of joint probability P"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="and from those of P times the likeliest's probability"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="on tokens that were read or said (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")
    parser.add_argument("--num-samples", type=positive, default=1, metavar="N", help="answers per prompt (default: 1)")
    parser.add_argument("--beam-size", type=positive, metavar="N", help="beam search; --num-samples of its best")
    parser.add_argument(
        "--length-penalty", type=float, metavar="A", help="of a beam search (default: 0.6; like transformers 1)"
    )
    parser.add_argument("--draft", metavar="DIR", help="a smaller model that proposes tokens; answers stay the model's")
    parser.add_argument("--lookup", action="store_true", help="propose what followed the same tokens before")
    parser.add_argument(
        "--draft-tokens", type=positive, default=4, metavar="N", help="proposed for each pass of the model (default: 4)"
    )
    parser.add_argument(
        "--beam-like", choices=("t5x", "transformers"), default="t5x", help="whose penalty and stopping (default: t5x)"
    )


def _run(options: argparse.Namespace, _: list[str]) -> int:
    if options.beam_size is None and (options.length_penalty is not None or options.beam_like != "t5x"):
        options.parser.error("--length-penalty and --beam-like are of a beam search: give --beam-size")
    simulate_devices(options.devices)
    from t5x_like.partitioning.distributed import started

    with started(process_flags(options)) as launch:
        from t5x_like.decoding.answers import Settings
        from t5x_like.decoding.beam import BeamSearch
        from t5x_like.decoding.command import generate_command
        from t5x_like.decoding.sampling import Sampling

        beam = None
        if options.beam_size is not None:
            default = 1.0 if options.beam_like == "transformers" else 0.6
            penalty = default if options.length_penalty is None else options.length_penalty
            beam = BeamSearch(options.beam_size, penalty, options.beam_like)
        settings = Settings(
            mode=options.mode,
            max_new_tokens=options.max_new_tokens,
            sampling=Sampling(
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                min_p=options.min_p,
                repetition_penalty=options.repetition_penalty,
            ),
            seed=options.seed,
            num_samples=options.num_samples,
            beam=beam,
            stop=tuple(options.stop),
            choices=tuple(options.choice) or None,
            allowed_characters=options.allowed_characters,
            literal=options.literal,
            fill=options.fill,
            scores=options.scores,
            cache_dtype=options.cache_dtype,
            draft=options.draft,
            lookup=options.lookup,
            draft_tokens=options.draft_tokens,
            batch_size=options.batch_size,
        )
        return generate_command(
            options.run_dir,
            settings,
            prompt=options.prompt,
            input_path=options.input,
            output=options.output,
            step=options.step,
            process=launch.process_index,
            processes=launch.process_count,
        )
