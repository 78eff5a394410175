"""Sizes of the presets against published and exact numbers; the arithmetic against the built models."""

import dataclasses
import math
import subprocess
import sys

import jax
import pytest
from model_examples import model

from t5x_like.config.batch import ArraySpec
from t5x_like.models import presets
from t5x_like.models.build import abstract, merge
from t5x_like.models.parameters import count_parameters, forward_flops

PUBLISHED = {
    # The totals of the checkpoints on the Hugging Face hub.
    "T5 1.1 small": (presets.t5_1_1("small"), 76_961_152),
    "T5 1.1 base": (presets.t5_1_1("base"), 247_577_856),
    "T5 1.1 large": (presets.t5_1_1("large"), 783_150_080),
    "T5 1.1 xl": (presets.t5_1_1("xl"), 2_849_757_184),
    "T5 1.1 xxl": (presets.t5_1_1("xxl"), 11_135_332_352),
    "T5 1.0 small": (presets.t5_1_0("small"), 60_506_624),
    "T5 1.0 base": (presets.t5_1_0("base"), 222_903_552),
    "T5 1.0 large": (presets.t5_1_0("large"), 737_668_096),
    "T5 1.0 xl": (presets.t5_1_0("xl"), 2_851_598_336),
    "T5 1.0 xxl": (presets.t5_1_0("xxl"), 11_307_321_344),
    "mT5 base": (presets.mt5_base(), 582_401_280),
    "Llama 3.2 1B": (presets.decoder_1b(), 1_235_814_400),
    # BertForMaskedLM without its two rows of segment types.
    "BERT base": (presets.bert_base(), 109_514_298 - 2 * 768),
}
ELECTRA = {
    # ElectraForPreTraining without its two rows of segment types; what ElectraForMaskedLM has beside the embeddings.
    "small": (13_549_057 - 2 * 128, None),
    "small, the released generator": (13_549_057 - 2 * 128, 13_546_682 - 3_972_864),
    "base": (109_483_009 - 2 * 768, 33_740_602 - 23_837_184),
    "large": (335_142_913 - 2 * 1024, 51_295_290 - 31_782_912),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_presets_are_those_of_the_published_models(name):
    config, published = PUBLISHED[name]
    assert sum(count_parameters(config).values()) == published


@pytest.mark.parametrize("name", ELECTRA)
def test_electras_discriminator_and_generator_are_those_of_the_published_models(name):
    size, _, released = name.partition(",")
    config = presets.electra(size, generator_fraction=1.0 if released else None)
    counts = count_parameters(config)
    discriminator, generator = ELECTRA[name]
    assert counts["token_embedder"] + counts["encoder"] + counts["head"] == discriminator
    if generator is not None:
        assert counts["generator"] == generator


def test_ul2_has_the_size_of_its_recount():
    assert round(sum(count_parameters(presets.ul2_20b()).values()) / 1e9, 2) == 19.59


def shapes(config):
    return {
        name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for name, part in abstract(config).params.items()
    }


ODD = {
    "learned, post-norm, biases": model(
        "encoder_decoder",
        "learned",
        stack_changes={"norm_placement": "post", "norm": "layernorm", "use_bias": True, "mlp_gated": False},
        embedding_norm=True,
        head_transform=True,
        head_bias=True,
    ),
    "layernorm without bias": model("decoder", "rope", stack_changes={"norm": "layernorm"}, tie_embeddings=True),
    "narrow embeddings": model(
        "encoder_decoder", "learned", embedding_width=24, tie_embeddings=True, head_transform=True, embedding_norm=True
    ),
    "narrow embeddings, own head": model("decoder", embedding_width=24, stack_changes={"use_bias": True}),
    "electra small": presets.electra("small"),
    "electra base": presets.electra("base"),
    **{
        f"smoke {name}": presets.smoke(name)
        for name in ("encoder_decoder", "decoder", "prefix_lm", "encoder", "electra")
    },
}


@pytest.mark.parametrize("name", [*PUBLISHED, *ODD])
def test_counts_by_part_are_those_of_the_built_model(name):
    config = PUBLISHED[name][0] if name in PUBLISHED else ODD[name]
    assert {part: n for part, n in count_parameters(config).items() if n} == shapes(config)


def test_flops_are_the_short_form_and_attention_and_the_premium_of_cross_attention():
    """T5 1.1 base, 512/114: 2 N D with the encoder's share on 512 and the decoder's on 114 tokens, cross-attention's
    keys and values on 512, scores, and the head."""
    config = presets.t5_1_1("base")
    spec = {"encoder_input_tokens": ArraySpec((2, 512), "int32"), "decoder_input_tokens": ArraySpec((2, 114), "int32")}
    kernels = 4 * 768 * 768
    encoder = 12 * (2 * 512 * (kernels + 3 * 768 * 2048) + 4 * 768 * 512**2)
    decoder = 12 * (2 * 114 * (kernels + 3 * 768 * 2048) + 4 * 768 * 114 * 115 // 2)
    cross = 12 * (2 * 114 * kernels // 2 + 2 * 512 * kernels // 2 + 4 * 768 * 512 * 114)
    assert forward_flops(config, spec) == 2 * (encoder + decoder + cross + 2 * 114 * 768 * 32128)


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder", "encoder", "electra"])
def test_flops_are_those_that_xla_counts(name):
    """XLA counts elementwise work too and computes the full square of causal scores: above ours by little."""
    config = dataclasses.replace(presets.smoke(name), scan_layers=False)  # XLA counts the body of a loop once.
    features = [f"{side}_input_tokens" for side in config.stacks]
    if name == "electra":
        config = dataclasses.replace(config, embedding_width=96)
        features += ["encoder_target_tokens", "encoder_loss_weights"]
    spec = {feature: ArraySpec((4, 64), "int32") for feature in features}
    of_model = abstract(config)
    batch = {key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in spec.items()}
    lowered = jax.jit(lambda params, batch: merge(of_model.graphdef, params).output(batch)).lower(
        of_model.params, batch
    )
    assert 1.0 < lowered.cost_analysis()["flops"] / forward_flops(config, spec) < 1.15


def test_presets_and_arithmetic_need_no_jax():
    code = (
        "import sys, t5x_like.models.presets as p, t5x_like.models.parameters as q;"
        "q.count_parameters(p.smoke()); assert 'jax' not in sys.modules and 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
