"""UL2 with its mode tokens, without them, and with the wrong ones: does a model need to be told its task?"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

from t5x_like.config import Objective, ul2
from t5x_like.config.objectives import MODES, Mode
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.studies.byte_model import byte_run
from t5x_like.studies.mode_measures import measure_modes
from t5x_like.studies.study import Arm, Budget, Prediction, Study, Summary, Tier


def study(tier: Tier, folder: Path) -> Study:
    """Return the study: three mixtures that differ in their mode tokens only."""
    with_tokens = ul2()
    kinds = tuple(objective.mode for objective in with_tokens if objective.mode is not None)
    without = tuple(dataclasses.replace(objective, mode=None) for objective in with_tokens)
    shuffled: tuple[Objective, ...] = tuple(
        # By the number of the denoiser, so that the four of X have all three tokens, the two of R have R and S, and the
        # one of S has R.
        dataclasses.replace(objective, mode=MODES[number % 3])
        for number, objective in enumerate(with_tokens)
    )
    arms = {"tokens": with_tokens, "none": without, "shuffled": shuffled}
    return Study(
        question="Does UL2 need its mode tokens?",
        description="Three mixtures of the same seven denoisers: with the mode token of each, without any, and with "
        "tokens that say nothing about the kind of the denoiser. Each continues held-out text in its own form. The two "
        "models that read tokens are then scored on the held-out windows of each kind of denoiser (I) under the token "
        "of each kind (I_under_J, in nats per token; cost: minus I_under_I), and continue prompts without sentinels "
        "under each token.",
        arms=tuple(Arm(name, byte_run(tier, "prefix_lm", mixture)) for name, mixture in arms.items()),
        seeds=(0, 1, 2),
        budget=Budget("executed_flops", 8e12 if tier == "cpu" else 1e18),
        summaries=tuple(
            Summary(f"{name}-modes", (name,), functools.partial(_modes, name, kinds)) for name in ("tokens", "shuffled")
        ),
        predictions=(
            Prediction("leaving the tokens out costs less than .01", "a guess", "none", "tokens", -0.01, 0.01),
            Prediction("tokens without a meaning are as good as none", "a guess", "shuffled", "none", -0.01, 0.01),
            Prediction(
                "no denoiser is better under the token of another kind",
                "Tay et al. 2022: a token switches the model to the mode of its task",
                "tokens-modes",
                low=-0.01,
                score="least_cost",
            ),
            Prediction(
                "R needs no token: another one costs less than .05",
                "its sentinels say what is asked for",
                "tokens-modes",
                low=-0.01,
                high=0.05,
                score="largest_cost_R",
            ),
            Prediction(
                "S needs its token: another one costs more than .02",
                "a prompt of S has no sentinel that says what is asked for",
                "tokens-modes",
                low=0.02,
                score="largest_cost_S",
            ),
            Prediction(
                "X, which has had all tokens, is the same under each",
                "tokens without a meaning are learned to be ignored",
                "shuffled-modes",
                low=-0.02,
                high=0.02,
                score="largest_cost_X",
            ),
            Prediction(
                "under S a prompt of half a window is continued by about the other half",
                "windows have one length, so that S has 129 tokens after 128",
                "tokens-modes",
                low=115,
                high=143,
                score="new_tokens_under_S",
            ),
        ),
        cannot_show=(
            "The losses under each token for the arm without tokens, whose model has never read one.",
            "With shuffled tokens, a cost of X for R, or of S or X for S, that is one of meaning: there these pairs "
            "have never been trained.",
            "Larger models, and the fine-tuned tasks that the tokens were made for.",
        ),
    )


def _modes(arm: str, kinds: tuple[Mode, ...], results: Mapping[str, EvaluatedCheckpoint]) -> dict[str, float]:
    return measure_modes(results[arm], kinds)
