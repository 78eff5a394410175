"""A trained decoder as the beginning of other models: what does it save, and which way to begin is best?"""

import dataclasses
from pathlib import Path

from t5x_like.config import CausalLM, FreezeConfig, InitializeFrom, MaskedDiffusion, MaskedLM, RunConfig
from t5x_like.config.initialization import (
    ALL_BUT_CROSS_ATTENTION,
    decoder_to_encoder,
    decoder_to_encoder_decoder,
)
from t5x_like.evaluation.results_store import BITS_OF_CONTINUATION
from t5x_like.studies.byte_model import HALF_GIVEN, byte_run, with_merged_attention
from t5x_like.studies.study import Arm, Budget, Prediction, StepsTo, Study, Tier

ALONE = {"cpu": 30, "gpu": 300}
"""Steps for which a new cross-attention trains alone."""
STEPS = "steps_to_the_decoder"


def study(tier: Tier, folder: Path) -> Study:
    """Return the study: a decoder, models that begin from it, and the same models from random parameters."""
    further = 1.8e12 if tier == "cpu" else 2e17
    decoder, total = Budget("executed_flops", 4 * further), Budget("executed_flops", 5 * further)
    causal = byte_run(tier, "causal_lm", (CausalLM(),))
    both = _short(byte_run(tier, "encoder_decoder", (HALF_GIVEN,)))
    merged = dataclasses.replace(both, model=with_merged_attention(both.model))
    encoder = byte_run(tier, "encoder", (MaskedLM(name="mlm", mask_rate=0.3),))
    diffusion = byte_run(tier, "prefix_lm", (MaskedDiffusion(),))
    fresh = decoder_to_encoder_decoder(str(folder), cross_attention="fresh", separate_tables=False)
    copied = decoder_to_encoder_decoder(str(folder), separate_tables=False)

    def from_decoder(name: str, run: RunConfig, start: InitializeFrom) -> Arm:
        return Arm(name, dataclasses.replace(run, initialize_from=start), parent="decoder")

    return Study(
        question="What does a trained decoder save the model that begins from it?",
        description="A decoder is trained once for each seed. Encoder-decoders begin from it, with a cross-attention "
        "that is a copy of the self-attention, new, new and trained alone at first, or merged with the self-attention, "
        "and train for a quarter of its FLOPs; scratch trains for as many from random parameters. An encoder (masked "
        "LM) and masked diffusion begin from it too, beside the same from random parameters with the FLOPs of both.",
        arms=(
            Arm("decoder", causal, budget=decoder),
            from_decoder("copied", both, copied),
            from_decoder("new", both, fresh),
            from_decoder("new_alone", _with_warm_up(both, ALONE[tier]), fresh),
            from_decoder(
                "merged",
                merged,
                decoder_to_encoder_decoder(str(folder), cross_attention="merged", separate_tables=False),
            ),
            Arm("scratch", both),
            from_decoder("encoder", _short(encoder), decoder_to_encoder(str(folder))),
            Arm("encoder_scratch", encoder, budget=total),
            from_decoder("diffusion", _short(diffusion), InitializeFrom(directory=str(folder))),
            Arm("diffusion_scratch", diffusion, budget=total),
        ),
        seeds=(0, 1, 2),
        budget=Budget("executed_flops", further),
        also=("loss/mlm",),
        steps_to=(StepsTo(STEPS, BITS_OF_CONTINUATION, "decoder"),),
        predictions=(
            Prediction(
                "a copied cross-attention is far ahead of scratch", "Zhang et al. 2025", "copied", "scratch", high=-0.2
            ),
            Prediction("a new one is behind a copied one", "Zhang et al. 2025", "new", "copied", low=0.0),
            Prediction("training it alone at first helps", "Zhang et al. 2025", "new_alone", "new", high=0.0),
            Prediction("a merged one is not behind a copied one", "nothing in it is new", "merged", "copied", high=0.0),
            Prediction(
                "a merged one is as good as the decoder within its steps", "a guess", "merged", "decoder", high=0.0
            ),
            Prediction(
                "an encoder from the decoder is ahead at equal total FLOPs",
                "Gisserot-Boukhlef et al. 2025",
                "encoder",
                "encoder_scratch",
                high=0.0,
                score="loss/mlm",
            ),
            Prediction(
                "masked diffusion from the decoder is ahead at equal total FLOPs",
                "Ye et al. 2025",
                "diffusion",
                "diffusion_scratch",
                high=0.0,
            ),
        ),
        cannot_show=(
            "The best learning rate of each start: all arms have that of the decoder.",
            "Encoder-decoders whose encoder and decoder differ in size.",
            "Whether the representations of an encoder are better: its loss is measured, no task.",
            "Decoders that have read far more text than their children: here it is four times as much.",
        ),
    )


def _short(run: RunConfig) -> RunConfig:
    """Return a run of fewer steps, with a shorter warm-up and more evaluations."""
    schedule = dataclasses.replace(run.training.schedule, warmup_steps=10)
    return dataclasses.replace(
        run,
        training=dataclasses.replace(run.training, schedule=schedule),
        evaluation=dataclasses.replace(run.evaluation, every_steps=20),
    )


def _with_warm_up(run: RunConfig, steps: int) -> RunConfig:
    freeze = (FreezeConfig(paths=(ALL_BUT_CROSS_ATTENTION,), until_step=steps),)
    return dataclasses.replace(run, training=dataclasses.replace(run.training, freeze=freeze))
