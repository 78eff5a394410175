"""UL2 with its mode tokens, without them, and with the wrong ones: does a model need to be told its task?"""

import dataclasses
from pathlib import Path

from t5x_like.config import Objective, ul2
from t5x_like.config.objectives import MODES
from t5x_like.studies.byte_model import byte_run
from t5x_like.studies.study import Arm, Budget, Prediction, Study, Tier


def study(tier: Tier, folder: Path) -> Study:
    """Return the study: three mixtures that differ in their mode tokens only."""
    with_tokens = ul2()
    without = tuple(dataclasses.replace(objective, mode=None) for objective in with_tokens)
    shuffled: tuple[Objective, ...] = tuple(
        # By the number of the denoiser, so that R and X both occur with all three tokens.
        dataclasses.replace(objective, mode=MODES[number % 3])
        for number, objective in enumerate(with_tokens)
    )
    arms = {"tokens": with_tokens, "none": without, "shuffled": shuffled}
    return Study(
        question="Does UL2 need its mode tokens?",
        description="Three mixtures of the same seven denoisers: with the mode token of each, without any, and with "
        "tokens that say nothing about the kind of the denoiser. Each continues held-out text in its own form.",
        arms=tuple(Arm(name, byte_run(tier, "prefix_lm", mixture)) for name, mixture in arms.items()),
        seeds=(0, 1, 2),
        budget=Budget("executed_flops", 1.8e13 if tier == "cpu" else 1e18),
        predictions=(
            Prediction("leaving the tokens out costs less than .01", "a guess", "none", "tokens", -0.01, 0.01),
            Prediction("tokens without a meaning are as good as none", "a guess", "shuffled", "none", -0.01, 0.01),
        ),
        cannot_show=(
            "The loss of each denoiser under the token of another one: prompts are scored in their own form only.",
            "Where a prompt without sentinels stops under another mode.",
            "Larger models, and the fine-tuned tasks that the tokens were made for.",
        ),
    )
