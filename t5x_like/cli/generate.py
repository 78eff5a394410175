"""`t5x-like generate`."""

from __future__ import annotations

import argparse
from typing import Any

from t5x_like.cli.arguments import (
    add_command,
    add_devices_option,
    add_model_argument,
    add_processes_options,
    continued_output_path,
    input_path,
    location_text,
    positive,
    process_flags,
    simulate_devices,
)
from t5x_like.cli.unmasking_arguments import add_unmasking_options, unmasking_settings


def register(commands: Any) -> None:
    parser = add_command(commands, "generate", _run, "continue prompts or fill their gaps")
    add_model_argument(parser)
    add_devices_option(parser)
    add_processes_options(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="a single prompt")
    source.add_argument(
        "--input",
        type=input_path,
        metavar="FILE",
        help='file of JSON lines {"prompt": ...}, answered by JSON lines (default: standard input)',
    )
    parser.add_argument(
        "--output",
        type=continued_output_path,
        metavar="FILE",
        help="write the JSON lines to this file; if the command is killed, the same command continues the file",
    )
    _add_prompt_options(parser)
    _add_sampling_options(parser)
    _add_search_options(parser)
    add_unmasking_options(parser)
    parser.add_argument(
        "--gap-tokens",
        type=positive,
        metavar="N",
        help="tokens that fill each <mask> of a prompt, for a model that fills masked positions (default: 1)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="answers decoded at once (default: 32)"
    )
    parser.add_argument(
        "--cache-dtype", choices=("bfloat16", "int8"), help="type of the cached keys and values (default: the model's)"
    )
    parser.set_defaults(overrides=False)


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode",
        choices=("R", "S", "X"),
        help="mode token in front of each prompt (default: S if the model was trained with it)",
    )
    parser.add_argument(
        "--return-filled",
        action="store_true",
        help="for prompts with gaps (<mask>), return the whole text with its gaps filled",
    )
    parser.add_argument("--raw-text", action="store_true", help="take <mask> and <extra_id_N> in prompts as plain text")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="tokens of an answer at most (default: 64)"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end an answer before this text; can be repeated",
    )
    parser.add_argument(
        "--choice",
        action="append",
        default=[],
        metavar="TEXT",
        help="constrain the answer to one of the choices; can be repeated",
    )
    parser.add_argument(
        "--allowed-characters", metavar="TEXT", help="constrain the answer to these characters, as in 0123456789"
    )
    parser.add_argument(
        "--return-scores", action="store_true", help="return log-likelihoods and the reason why each answer ended"
    )


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="sampling temperature; 0, the default, is greedy"
    )
    parser.add_argument("--top-k", type=positive, metavar="K", help="sample from the K most likely tokens only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the most likely tokens with total probability P"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="sample from the tokens with at least P times the probability of the most likely one",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="penalty on tokens of the prompt and of the answer so far (default: 1, none)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)")
    parser.add_argument("--num-samples", type=positive, default=1, metavar="N", help="answers per prompt (default: 1)")


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--beam-size", type=positive, metavar="N", help="beam search with N beams; --num-samples of the best"
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        metavar="A",
        help="length penalty of the beam search (default: 0.6; 1 with --beam-variant transformers)",
    )
    parser.add_argument(
        "--beam-variant",
        choices=("t5x", "transformers"),
        default="t5x",
        help="length penalty and stopping rule of T5X or of transformers (default: t5x)",
    )
    parser.add_argument(
        "--draft-model",
        type=location_text,
        metavar="MODEL",
        help="speculative decoding with a smaller model; the answers do not change",
    )
    parser.add_argument(
        "--prompt-lookup",
        action="store_true",
        help="speculative decoding that proposes what followed the same tokens earlier in the text",
    )
    parser.add_argument(
        "--num-draft-tokens",
        type=positive,
        default=4,
        metavar="N",
        help="proposed tokens per pass of the model (default: 4)",
    )


def _run(options: argparse.Namespace, _: list[str]) -> int:
    if options.beam_size is None and (options.length_penalty is not None or options.beam_variant != "t5x"):
        options.parser.error("--length-penalty and --beam-variant are options of a beam search: give --beam-size")
    simulate_devices(options.devices)
    from t5x_like.distributed.startup import initialize

    with initialize(process_flags(options)) as launch:
        from t5x_like.decoding.beam_search import BeamSearch
        from t5x_like.decoding.generate_files import generate_completions
        from t5x_like.decoding.generation_config import GenerationConfig
        from t5x_like.decoding.sampling import Sampling

        beam = None
        if options.beam_size is not None:
            default = 1.0 if options.beam_variant == "transformers" else 0.6
            penalty = default if options.length_penalty is None else options.length_penalty
            beam = BeamSearch(options.beam_size, penalty, options.beam_variant)
        settings = GenerationConfig(
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
            raw_text=options.raw_text,
            return_filled=options.return_filled,
            return_scores=options.return_scores,
            cache_dtype=options.cache_dtype,
            draft_model=options.draft_model,
            prompt_lookup=options.prompt_lookup,
            num_draft_tokens=options.num_draft_tokens,
            batch_size=options.batch_size,
            diffusion=unmasking_settings(options, options.gap_tokens),
        )
        return generate_completions(
            options.model.path,
            settings,
            prompt=options.prompt,
            input_path=options.input,
            output=options.output,
            step=options.model.step,
            process=launch.process_index,
            processes=launch.process_count,
        )
