"""Choice of the prompt format for a run: prompts have the form of the inputs of one of its objectives."""

from __future__ import annotations

from t5x_like.config import DataConfig, Objective
from t5x_like.data.objectives.prompts import PromptFormat
from t5x_like.data.objectives.registry import implementation
from t5x_like.errors import ConfigError, ConfigProblem


def objective_format(objective: Objective, data: DataConfig) -> PromptFormat:
    """Return the format of the inputs of `objective` in the layout of `data`."""
    return implementation(objective).prompt_format(data.layout)


def prompt_format(data: DataConfig, mode: str | None) -> PromptFormat:
    """Return the format for a prompt under `mode`.

    Without a mode: the format of S if it was trained, or else of the mixture's first mode; in a mixture without modes,
    the format of the objective with the lowest `prompt_preference` (supervised pairs, prefix LM, causal LM, span
    corruption, then the others).

    Raises:
      ConfigError: the run has an encoder only, or objectives that all predict tokens in place, which generate no text
        from left to right; or its mixture does not have the mode.
    """
    if data.labelled is not None:
        found = f"a run that trained a task head of kind {data.labelled.kind}"
        raise ConfigError(
            [ConfigProblem("data.mixture", found, "a run that generates text", "use `embed` or `eval` for task heads")]
        )
    if data.seqio is not None:
        found = f"{data.seqio.mixture_or_task!r}, read live: only its preprocessors define the form of its inputs"
        raise ConfigError([ConfigProblem("data.seqio", found, "a run on a prepared store")])
    objectives = [objective for objective in data.objectives if not objective.predicts_in_place]
    if data.layout == "encoder" or not objectives:
        found = f"layout '{data.layout}', objectives {', '.join(objective.name for objective in data.objectives)}"
        expected = "an objective that predicts the next token, such as causal_lm or prefix_lm"
        fix = "objectives that predict tokens in place fill masked positions: `generate` and `serve` do so"
        raise ConfigError([ConfigProblem("data", found, expected, fix)])
    by_mode: dict[str, Objective] = {}
    for objective in objectives:
        if objective.mode is not None:
            by_mode.setdefault(objective.mode, objective)
    if mode is not None:
        if mode not in by_mode:
            expected = f"one of {', '.join(by_mode)}" if by_mode else "none: the run was trained without mode tokens"
            raise ConfigError([ConfigProblem("mode", mode, expected)])
        return objective_format(by_mode[mode], data)
    if by_mode:
        # S continues a text, which is what an ordinary prompt asks for.
        return objective_format(by_mode.get("S", next(iter(by_mode.values()))), data)
    preferred = min(objectives, key=lambda objective: implementation(objective).prompt_preference)
    return objective_format(preferred, data)


def infill_format(data: DataConfig, mode: str | None) -> PromptFormat | None:
    """Return the format for a prompt with gaps under `mode`; without a mode, that of the first infilling objective.

    None: no objective fills gaps, or none with this mode.
    """
    token = None if mode is None else prompt_format(data, mode).mode
    formats = (objective_format(one, data) for one in data.objectives if not one.predicts_in_place)
    return next((one for one in formats if one.infill is not None and (mode is None or one.mode == token)), None)


def longest_prompt(data: DataConfig, form: PromptFormat) -> int:
    """Return the maximum number of prompt tokens in training: an objective's inputs, or a row of text."""
    return data.inputs_length if form.ends_in_eos else data.row_length
