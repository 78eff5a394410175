"""Continuations: windows of given and scored raw tokens, which are the same for models of every architecture.

Each layout puts a window into the form of its training rows, with its mode token, EOS or start token, so that rows of
different lengths score the same tokens after the same tokens.
"""

from __future__ import annotations

from typing import assert_never

from t5x_like.config.bounds import Problems
from t5x_like.config.data import DataConfig
from t5x_like.config.layouts import StackName
from t5x_like.config.objectives import BlockDiffusion, CausalLM, Objective, PrefixLM
from t5x_like.config.run import RunConfig
from t5x_like.errors import ConfigProblem


def has_bound(data: DataConfig) -> bool:
    """Return whether held-out text is scored by the bound of masked diffusion, and not token after token.

    This holds for encoders, for bidirectional streams whose objectives all predict tokens in place, and for block
    diffusion.
    """
    if data.seqio is not None or not data.objectives:
        return False
    return all(objective.predicts_in_place for objective in data.objectives)


def block_objective(data: DataConfig) -> BlockDiffusion | None:
    """Return the objective of a run of block diffusion, which has no other one; None for other runs."""
    return next((one for one in data.objectives if isinstance(one, BlockDiffusion)), None)


def continuing_objective(data: DataConfig) -> tuple[CausalLM | PrefixLM, int]:
    """Return the objective in whose form a text is continued, and its index in the mixture.

    A mixture without prefix LM uses its causal LM. One of span corruption only uses a prefix LM without mode token.
    """
    found = [(one, index) for index, one in enumerate(data.objectives) if isinstance(one, CausalLM | PrefixLM)]
    if found:
        return min(found, key=lambda candidate: isinstance(candidate[0], CausalLM))
    for index, objective in enumerate(data.objectives):
        if not objective.has_inputs:
            return CausalLM(), index
    return PrefixLM(name="prefix_lm", min_target_fraction=0.5, max_target_fraction=0.5), 0


def continuation_positions(data: DataConfig, given: int, scored: int) -> dict[StackName, int]:
    """Return the token positions that a window takes in the row of each stack.

    The EOS after the targets is not scored, and no scored token sees it, so that it needs no position.
    """
    objective = None if has_bound(data) else continuing_objective(data)[0]
    separate = isinstance(objective, PrefixLM)
    inputs = given + objective.mode_tokens + 1 if isinstance(objective, PrefixLM) else given
    match data.layout:
        case "encoder":
            return {"encoder": given + scored}
        case "encoder_decoder":
            if block := block_objective(data):
                # The last block has all text before it, and EOS, in the encoder.
                last = (scored - 1) // block.block_length * block.block_length
                return {"encoder": given + last + 1, "decoder": min(block.block_length, scored) + 1}
            return {"encoder": inputs, "decoder": scored} if separate else {"encoder": 0, "decoder": given + scored}
        case "prefix_lm" | "causal_lm":
            return {"decoder": inputs + scored}
        case unknown:
            assert_never(unknown)


def continuation_problems(run: RunConfig) -> Problems:
    """Yield the problems of `evaluation.continuation`: data without text, and rows that are too short."""
    continuation, data = run.evaluation.continuation, run.data
    if continuation is None:
        return
    where, (given, scored) = "evaluation.continuation", continuation
    if data.seqio is not None or not any(_has_text(data.objectives_of(share)) for share in data.sources):
        found = f"{given} and {scored} tokens, with data that are no plain text"
        yield ConfigProblem(where, found, "none: only text of a token store can be continued")
        return
    positions = data.row_positions
    for stack, needed in continuation_positions(data, given, scored).items():
        if needed > positions[stack]:
            one_row = len(positions) == 1
            field = "inputs_length" if stack == "encoder" else "targets_length"
            field = "inputs_length or data.targets_length" if one_row and stack == "decoder" else field
            found = f"{given} given and {scored} scored tokens, which take {needed} positions of the {stack}"
            yield ConfigProblem(
                where, found, f"at most {positions[stack]}, the length of its rows", f"raise data.{field}"
            )


def _has_text(objectives: tuple[Objective, ...]) -> bool:
    return all(objective.example_source == "text" for objective in objectives)
