"""Prefix LM in five architectures at equal FLOPs: does it matter who reads the prefix, and how?"""

import dataclasses
from pathlib import Path

from t5x_like.config import RunConfig
from t5x_like.config.layouts import Layout
from t5x_like.studies.byte_model import HALF_GIVEN, byte_run, with_half_of_the_layers, with_merged_attention
from t5x_like.studies.study import Arm, Budget, Prediction, Study, Tier


def study(tier: Tier, folder: Path) -> Study:
    """Return the study: two masks of one stack, and three encoder-decoders."""

    def run(layout: Layout) -> RunConfig:
        return byte_run(tier, layout, (HALF_GIVEN,))

    both = run("encoder_decoder")
    return Study(
        question="Does a prefix need a bidirectional mask, or a stack of its own?",
        description="A decoder with a causal mask, the same with a bidirectional prefix, and encoder-decoders with as "
        "many layers in each stack, with merged attention, and with half of the layers. All continue the second half "
        "of a window after the first at equal FLOPs of the model, which count the pairs that a mask lets through.",
        arms=(
            Arm("causal", run("causal_lm")),
            Arm("prefix", run("prefix_lm")),
            Arm("encdec", both),
            Arm("merged", dataclasses.replace(both, model=with_merged_attention(both.model))),
            Arm("half", dataclasses.replace(both, model=with_half_of_the_layers(both.model))),
        ),
        seeds=(0, 1, 2),
        budget=Budget("model_flops", 6e12 if tier == "cpu" else 8e17),
        predictions=(
            Prediction("a bidirectional prefix is ahead", "Raffel et al. 2020", "prefix", "causal", -0.03, -0.005),
            Prediction("two stacks are not worse than a prefix", "Raffel et al. 2020", "encdec", "prefix", high=0.0),
            Prediction("two stacks are close to a prefix", "a guess", "encdec", "prefix", -0.03, 0.03),
            Prediction("merged attention is close to separate", "Zhang et al. 2025", "merged", "encdec", -0.03, 0.03),
            Prediction(
                "half of the layers with twice the text are ahead",
                "Hoffmann et al. 2022: all arms read far fewer than 20 tokens for a parameter",
                "half",
                "encdec",
                high=0.0,
            ),
        ),
        cannot_show=(
            "Prefixes of other lengths: all of them are half of the window.",
            "The time of a step: FLOPs are equal, and two stacks take more kernels for them.",
            "An equal time: on CPUs attention skips what a causal mask hides, 7 % of the counted FLOPs by arithmetic.",
            "Larger models, and longer training, for which half of the layers may be too few.",
            "Generation, where an encoder-decoder reads a cached source.",
        ),
    )
