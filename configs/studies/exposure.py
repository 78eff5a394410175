"""Objectives at equal executed FLOPs in one decoder: is the number of loss tokens the whole story?"""

from pathlib import Path

from t5x_like.config import (
    CausalLM,
    FillInTheMiddle,
    MaskedDiffusion,
    Objective,
    PrefixLM,
    SpanCorruption,
    ul2,
)
from t5x_like.config.layouts import Layout
from t5x_like.config.mixtures import gpt_bert
from t5x_like.studies.byte_model import byte_run
from t5x_like.studies.study import Arm, Budget, Prediction, Study, Tier


def study(tier: Tier, folder: Path) -> Study:
    """Return the study: seven objectives, whose rows execute the same FLOPs."""
    prefix_lm = PrefixLM(name="prefix", min_target_fraction=0.0, max_target_fraction=1.0)
    arms: dict[str, tuple[Layout, tuple[Objective, ...]]] = {
        "causal": ("causal_lm", (CausalLM(),)),
        "prefix": ("prefix_lm", (prefix_lm,)),
        "spans": ("prefix_lm", (SpanCorruption(name="spans"),)),
        "ul2": ("prefix_lm", ul2()),
        "fim": ("causal_lm", (FillInTheMiddle(),)),
        "gpt_bert": ("prefix_lm", gpt_bert(masked=1.0)),
        "diffusion": ("prefix_lm", (MaskedDiffusion(),)),
    }
    return Study(
        question="Is the number of loss tokens the whole story?",
        description="One decoder learns bytes by seven objectives at equal executed FLOPs, and continues held-out "
        "text. The spans arm was never trained to continue a text. Diffusion has an upper bound.",
        arms=tuple(Arm(name, byte_run(tier, layout, mixture)) for name, (layout, mixture) in arms.items()),
        seeds=(0, 1, 2),
        budget=Budget("executed_flops", 6e12 if tier == "cpu" else 1e18),
        predictions=(
            Prediction(
                "rearranging half of the windows costs nothing", "Bavarian et al. 2022", "fim", "causal", -0.02, 0.03
            ),
            Prediction("spans alone are far behind", "loss tokens; a form never trained", "spans", "causal", 0.1),
            Prediction("a prefix LM is behind causal LM", "half of the loss tokens", "prefix", "causal", 0.0),
            Prediction("UL2 is between prefix LM and spans", "loss tokens", "ul2", "spans", high=0.0),
            Prediction("GPT-BERT is ahead of prefix LM", "loss tokens", "gpt_bert", "prefix", high=0.0),
        ),
        cannot_show=(
            "What a model learns from many examples in its prompt.",
            "An equal time: on CPUs attention skips what a causal mask hides, 7 % of the counted FLOPs by arithmetic.",
            "Texts longer than 256 bytes, larger models, and longer training.",
            "The quality of what the arms were trained for: infilling and representations are not measured.",
        ),
    )
