"""Losses of small models of several sizes, each trained on several amounts of text: a scaling law, and its limits."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from t5x_like.config import CausalLM, Objective, RunConfig
from t5x_like.config.layouts import Layout
from t5x_like.config.model import StackConfig
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.evaluation.results_store import BITS_OF_CONTINUATION
from t5x_like.planning.estimate.scaling_fit import fit_scaling
from t5x_like.studies.byte_model import HALF_GIVEN, byte_run
from t5x_like.studies.plan import arm_cost
from t5x_like.studies.study import Arm, Prediction, Study, Summary, Tier

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Widths, as fractions of the width of `byte_run`."""
STEPS = {"cpu": (80, 160, 320), "gpu": (2_500, 5_000, 10_000)}
MODELS: dict[str, tuple[Layout, Objective]] = {
    "decoder": ("causal_lm", CausalLM()),
    "encdec": ("encoder_decoder", HALF_GIVEN),
}


def study(tier: Tier, folder: Path) -> Study:
    """Return the study: two architectures, each of four sizes, which are trained for three numbers of steps."""
    arms = {
        name: [_arm(name, tier, layout, objective, fraction, steps) for fraction in FRACTIONS for steps in STEPS[tier]]
        for name, (layout, objective) in MODELS.items()
    }
    fits = {name: f"{name}-fit" for name in MODELS}
    return Study(
        question="Do decoders and encoder-decoders gain alike from size and from text?",
        description="Decoders (causal LM) and encoder-decoders (prefix LM) of four widths read three amounts of text. "
        "L = e + a / N^alpha + b / D^beta is fitted to the bits per byte of each architecture, with all parameters N "
        "and raw tokens D, without the largest model on the most text, whose value the fit predicts.",
        arms=tuple(arm for some in arms.values() for arm in some),
        seeds=(0, 1, 2),
        summaries=tuple(
            Summary(
                fits[name],
                tuple(arm.name for arm in some),
                functools.partial(_fit, {arm.name: arm.run for arm in some}),
            )
            for name, some in arms.items()
        ),
        predictions=(
            *(
                Prediction(
                    f"both gain alike from {what}",
                    "Zhang et al. 2025: RedLLM and DecLLM have similar exponents",
                    fits["encdec"],
                    fits["decoder"],
                    -0.1,
                    0.1,
                    score=score,
                )
                for score, what in (("alpha", "size"), ("beta", "text"))
            ),
            *(
                Prediction(
                    f"the fit of the {name} predicts its largest run within 2 %",
                    "a guess",
                    fit,
                    low=-0.02,
                    high=0.02,
                    score="error_of_largest",
                )
                for name, fit in fits.items()
            ),
        ),
        cannot_show=(
            "Anything about models of interest: these have 2 million parameters at most and read 0.7 million bytes.",
            "A reliable floor e: it is far below all points, and the exponents depend on it.",
            "The optimal share of size and text, as each width has the same learning rate.",
        ),
    )


def _arm(name: str, tier: Tier, layout: Layout, objective: Objective, fraction: float, steps: int) -> Arm:
    run = byte_run(tier, layout, (objective,))
    stacks = {stack: _narrow(config, fraction) for stack, config in run.model.stacks.items()}
    model = dataclasses.replace(run.model, encoder=stacks.get("encoder"), decoder=stacks.get("decoder"))
    schedule = dataclasses.replace(run.training.schedule, warmup_steps=steps // 8)
    training = dataclasses.replace(run.training, num_train_steps=steps, schedule=schedule)
    width = model.stacks["decoder"].d_model
    return Arm(f"{name}-{width}-{steps}", dataclasses.replace(run, model=model, training=training))


def _narrow(stack: StackConfig, fraction: float) -> StackConfig:
    """Return the stack with a fraction of the width, and heads of the same number."""
    width = round(stack.d_model * fraction)
    return dataclasses.replace(stack, d_model=width, head_dim=width // stack.num_heads, d_ff=3 * width)


def _fit(runs: Mapping[str, RunConfig], results: Mapping[str, EvaluatedCheckpoint]) -> dict[str, float]:
    """Return the exponents of the fit to all runs but the last one, the largest, and its relative error there."""
    costs = [arm_cost(run) for run in runs.values()]
    sizes, tokens = (np.array([getattr(cost, field) for cost in costs]) for field in ("parameters", "raw_tokens"))
    bits = np.array([results[name].values[BITS_OF_CONTINUATION] for name in runs])
    fit = fit_scaling(sizes[:-1], tokens[:-1], bits[:-1], "this study")
    predicted = fit.loss(sizes[-1], tokens[-1])
    return {"alpha": fit.alpha, "beta": fit.beta, "floor": fit.e, "error_of_largest": predicted / bits[-1] - 1}
