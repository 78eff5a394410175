"""Objectives: how a window of raw tokens becomes training examples. One module per objective.

Each objective has a second half of the same module name in `t5x_like.data.objectives`. To add an objective, write the
two modules and register them below; one outside of this package calls `register_objective` itself.
"""

from t5x_like.config.layouts import Layout
from t5x_like.config.objectives.bart import BartDenoising
from t5x_like.config.objectives.base import (
    MODES,
    ExampleLengths,
    ExampleSource,
    Mode,
    ObjectiveConfig,
)
from t5x_like.config.objectives.blank_infilling import BlankInfilling
from t5x_like.config.objectives.block_diffusion import BlockDiffusion
from t5x_like.config.objectives.causal_lm import CausalLM
from t5x_like.config.objectives.causal_masking import CausalMasking
from t5x_like.config.objectives.dialogues import Dialogues
from t5x_like.config.objectives.fill_in_the_middle import FillInTheMiddle
from t5x_like.config.objectives.labeled_examples import LabeledExamples
from t5x_like.config.objectives.masked_diffusion import MaskedDiffusion
from t5x_like.config.objectives.masked_lm import MaskedLM
from t5x_like.config.objectives.preference import Preference
from t5x_like.config.objectives.prefix_lm import PrefixLM
from t5x_like.config.objectives.registry import (
    Objective,
    parse_objective,
    register_objective,
    registered_kinds,
)
from t5x_like.config.objectives.span_corruption import SpanCorruption
from t5x_like.config.objectives.supervised import Supervised

__all__ = [
    "MODES",
    "BartDenoising",
    "BlankInfilling",
    "BlockDiffusion",
    "CausalLM",
    "CausalMasking",
    "Dialogues",
    "ExampleLengths",
    "ExampleSource",
    "FillInTheMiddle",
    "LabeledExamples",
    "Layout",
    "MaskedDiffusion",
    "MaskedLM",
    "Mode",
    "Objective",
    "ObjectiveConfig",
    "Preference",
    "PrefixLM",
    "SpanCorruption",
    "Supervised",
    "parse_objective",
    "register_objective",
    "registered_kinds",
]

register_objective(SpanCorruption, "t5x_like.data.objectives.span_corruption:SpanCorruptionDenoiser")
register_objective(PrefixLM, "t5x_like.data.objectives.prefix_lm:PrefixLMDenoiser")
register_objective(CausalLM, "t5x_like.data.objectives.causal_lm:CausalLMDenoiser")
register_objective(MaskedLM, "t5x_like.data.objectives.masked_lm:MaskedLMDenoiser")
register_objective(MaskedDiffusion, "t5x_like.data.objectives.masked_diffusion:MaskedDiffusionDenoiser")
register_objective(BlockDiffusion, "t5x_like.data.objectives.block_diffusion:BlockDiffusionDenoiser")
register_objective(FillInTheMiddle, "t5x_like.data.objectives.fill_in_the_middle:FillInTheMiddleDenoiser")
register_objective(CausalMasking, "t5x_like.data.objectives.causal_masking:CausalMaskingDenoiser")
register_objective(BartDenoising, "t5x_like.data.objectives.bart:BartDenoiser")
register_objective(BlankInfilling, "t5x_like.data.objectives.blank_infilling:BlankInfillingDenoiser")
register_objective(Supervised, "t5x_like.data.objectives.supervised:SupervisedPairs")
register_objective(Dialogues, "t5x_like.data.objectives.dialogues:DialogueExamples")
register_objective(Preference, "t5x_like.data.objectives.preference:PreferencePairs")
register_objective(LabeledExamples, "t5x_like.data.objectives.labeled_examples:LabeledTexts")
