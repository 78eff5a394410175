"""The command `t5x-like account`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from t5x_like.cli.arguments import add_command, positive, positive_number
from t5x_like.config import ModelConfig, RunConfig
from t5x_like.errors import EXIT_OK, ConfigError, ConfigProblem
from t5x_like.utils.sanitize import say

_MODELS = "a preset such as llama_3:70b, a recipe, or a directory or config.json of a run or of a Hugging Face model"
_PROMPT, _ANSWER = 512, 128


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "account",
        _run,
        "report the parameters, FLOPs, caches, and least serving times of models, beside the common formulas",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=_MODELS)
    parser.add_argument(
        "--machine", default="a100:1", metavar="NAME", help="such as h100:8 or v5e:2x2 (default: a100:1)"
    )
    parser.add_argument(
        "--prompt", type=positive, default=_PROMPT, metavar="N", help=f"tokens that are read (default: {_PROMPT})"
    )
    parser.add_argument(
        "--answer", type=positive, metavar="N", help=f"tokens that a decoder generates (default: {_ANSWER})"
    )
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="rows that are processed together (default: 1)"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="type of the weights (default: bfloat16)"
    )
    parser.add_argument(
        "--cache-dtype",
        choices=("float32", "bfloat16", "int8"),
        help="type of cached keys and values (default: that of --dtype)",
    )
    parser.add_argument("--turns", type=positive, metavar="N", help="also account for a dialogue of N turns")
    parser.add_argument("--draft", metavar="MODEL", help="also account for speculative decoding with this draft model")
    parser.add_argument(
        "--acceptance", type=float, metavar="A", help="with --draft: probability that a drafted token is accepted"
    )
    parser.add_argument(
        "--claim",
        nargs=2,
        type=positive_number,
        metavar=("TOKENS_PER_S", "SECONDS"),
        help="examine a row of a benchmark: its throughput, and the time of a request, with --batch rows in flight",
    )
    parser.add_argument(
        "--quoted", action="store_true", help="print the page on quoted numbers, docs/quoted-numbers.md"
    )
    parser.add_argument("--json", action="store_true", help="print only the accounts, as JSON")
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    if bool(options.models) == options.quoted:
        options.parser.error("expected one or more MODELs, or --quoted alone")
    import jax

    # Models are described by shapes only. Do not initialize accelerators, which another process may be using.
    jax.config.update("jax_platforms", "cpu")
    if options.quoted:
        from t5x_like.planning.account.quoted_numbers import page

        say(page(), end="")
        return EXIT_OK
    from t5x_like.hardware.topologies import parse_topology
    from t5x_like.planning.account.account import account
    from t5x_like.planning.account.report import print_account
    from t5x_like.planning.account.serving_sections import Claim, Draft
    from t5x_like.planning.estimate.inference import Inference, require_speeds
    from t5x_like.utils.console import Console

    machine = require_speeds(parse_topology(options.machine))
    models = [(name, *_model(name)) for name in options.models]
    _check(options, [(name, model) for name, model, _ in models])
    draft = None
    if options.draft is not None:
        draft = Draft(options.draft, _generating(options.draft, _model(options.draft)[0]), options.acceptance)
    settings = {
        "prompt": options.prompt,
        "answer": options.answer or _ANSWER,
        "rows": options.batch,
        "dtype": options.dtype,
        "cache_dtype": options.cache_dtype or options.dtype,
    }
    claim = Claim(*options.claim) if options.claim else None
    accounts = [
        account(name, Inference(model, machine, **settings), run=run, turns=options.turns, draft=draft, claim=claim)
        for name, model, run in models
    ]
    if options.json:
        import json

        document = {"machine": str(machine), **settings, "accounts": [each.as_dict() for each in accounts]}
        json.dump(document, sys.stdout, indent=1)
        say()
        return EXIT_OK
    console = Console()
    console.print(
        f"on {machine}: {settings['prompt']:,} tokens are read and {settings['answer']:,} answered, batch of "
        f"{settings['rows']:,}, weights in {settings['dtype']}, caches in {settings['cache_dtype']}\n",
        highlight=False,
    )
    for each in accounts:
        print_account(each, console)
    return EXIT_OK


def _check(options: argparse.Namespace, models: list[tuple[str, ModelConfig]]) -> None:
    """Raise ConfigError for options that do not belong together, or that a model has no decoder for."""
    from t5x_like.planning.account.figures import generates

    problems = []
    if (options.draft is None) != (options.acceptance is None):
        alone, other = ("--draft", "--acceptance") if options.acceptance is None else ("--acceptance", "--draft")
        problems.append(ConfigProblem(alone, f"no {other}", "both", "for example --draft llama_3:8b --acceptance 0.75"))
    if options.acceptance is not None and not 0 <= options.acceptance <= 1:
        problems.append(ConfigProblem("--acceptance", f"{options.acceptance:g}", "a probability, 0 to 1"))
    if options.answer == 1 and any(generates(model) and model.encoder is None for _, model in models):
        expected = "2 or more: a decoder gets the first token from reading the prompt, and decodes from the second on"
        problems.append(ConfigProblem("--answer", "1", expected))
    if problems:
        raise ConfigError(problems)
    needing = {"--turns": options.turns, "--draft": options.draft, "--claim": options.claim}
    given = [name for name, value in needing.items() if value is not None]
    if options.answer is not None and not any(generates(model) for _, model in models):
        given.append("--answer")
    if given:
        for name, model in models:
            _generating(name, model, given[0])


def _generating(name: str, model: ModelConfig, option: str = "--draft") -> ModelConfig:
    """Return a model if it generates text; raise ConfigError otherwise."""
    from t5x_like.planning.account.figures import generates

    if not generates(model):
        kind = "an encoder" if model.decoder is None else "a model with a task head"
        expected = "a model with a decoder and a language-model head: no other decodes"
        raise ConfigError([ConfigProblem(f"{option} with {name}", kind, expected)])
    return model


def _model(reference: str) -> tuple[ModelConfig, RunConfig | None]:
    """Return the model that a MODEL names, and the run that trains it if it names one.

    Raises:
      ConfigError: there is no such preset, recipe or directory, or it is a URL.
      DataError: a config.json is not understood.
    """
    from t5x_like import run_directory
    from t5x_like.checkpoints import model_dir
    from t5x_like.config.recipes import load_recipe
    from t5x_like.config.validation import validate
    from t5x_like.interop.huggingface.config_reader import Fields
    from t5x_like.interop.huggingface.family_matching import model_of_config
    from t5x_like.models.presets.by_name import is_preset, preset
    from t5x_like.utils.trusted_urls import require_local

    require_local(reference, "MODEL")
    path = Path(reference)
    if path.is_dir() and (path / model_dir.MODEL).is_file():
        return model_dir.read_model(path)[0], None
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.is_file():
        fields = Fields.read(file)
        if "data" not in fields.values or "model_type" in fields.values:
            return model_of_config(fields), None
        run = run_directory.read_config(path) if path.is_dir() else load_recipe(reference)
    elif is_preset(reference):
        return preset(reference), None
    elif path.suffix in (".py", ".json") or path.is_dir():
        run = load_recipe(reference)
    else:
        run = _recipe_or_preset(reference)
    problems = validate(run)
    if problems:
        raise ConfigError(problems)
    return run.model, run


def _recipe_or_preset(reference: str) -> RunConfig:
    """Return the recipe of a name; the error of an unknown one also lists the presets."""
    from t5x_like.config.recipes import load_recipe, shipped_recipes
    from t5x_like.models.presets.by_name import preset

    name = reference.partition(":")[0]
    if name in {found.stem for found in shipped_recipes()} or Path("configs/runs", f"{name}.py").is_file():
        return load_recipe(reference)
    preset(reference, "MODEL, which is no recipe")
    raise AssertionError("unreachable: the name is no preset")
