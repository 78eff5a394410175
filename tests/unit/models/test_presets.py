"""Parameter counts of the presets, compared with published numbers; FLOPs, compared with traced programs."""

import dataclasses
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers.even_experts import even_experts

from t5x_like.config import MoEConfig
from t5x_like.config.batch_spec import ArraySpec
from t5x_like.kernels import expert_dispatch, grouped_mlp
from t5x_like.models import presets
from t5x_like.models.factory import abstract_model, bind_params
from t5x_like.models.flops import forward_flops

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
    "ByT5 base": (presets.byt5("base"), 581_653_248),
    "Mistral 7B v0.3": (presets.mistral_7b(), 7_248_023_552),
    "Qwen 2.5 0.5B": (presets.qwen_2_5("0.5b"), 494_032_768),
    "Qwen 3 0.6B": (presets.qwen_3("0.6b"), 596_049_920),
    "Gemma 2B": (presets.gemma_1("2b"), 2_506_172_416),
    "RoBERTa base": (presets.roberta("base"), 124_697_433),
    "XLM-R base": (presets.xlm_roberta("base"), 278_295_186),
    # With the bias of the logits, which transformers does not count.
    "BART base": (presets.bart("base"), 139_420_416 + 50_265),
    "mT5 small": (presets.mt5("small"), 300_176_768),
    "mT5 large": (presets.mt5("large"), 1_229_581_312),
    "mT5 xl": (presets.mt5("xl"), 3_742_619_648),
    "mT5 xxl": (presets.mt5("xxl"), 12_921_057_280),
    "Llama 3.2 3B": (presets.llama_3("3b"), 3_212_749_824),
    "Llama 3.1 8B": (presets.llama_3("8b"), 8_030_261_248),
    "Llama 3.1 70B": (presets.llama_3("70b"), 70_553_706_496),
    "Mixtral 8x7B": (presets.mixtral_8x7b(), 46_702_792_704),
    "Gemma 2 2B": (presets.gemma_2("2b"), 2_614_341_888),
    "Gemma 2 9B": (presets.gemma_2("9b"), 9_241_705_984),
    "Gemma 2 27B": (presets.gemma_2("27b"), 27_227_128_320),
    "GPT-2 small": (presets.gpt_2("small"), 124_439_808),
    "GPT-2 medium": (presets.gpt_2("medium"), 354_823_168),
    "GPT-2 large": (presets.gpt_2("large"), 774_030_080),
    "GPT-2 xl": (presets.gpt_2("xl"), 1_557_611_200),
    "BERT base with segments": (presets.bert("base"), 109_514_298),
    "BERT large": (presets.bert("large"), 335_174_458),
    # What transformers 5.23 counts in a model of the published size.
    "umT5 small": (presets.umt5("small"), 175_333_376 + 256_384 * 512),
    "umT5 base": (presets.umt5("base"), 395_140_608 + 256_384 * 768),
    "umT5 xl": (presets.umt5("xl"), 3_243_282_432 + 256_384 * 2048),
    "umT5 xxl": (presets.umt5("xxl"), 11_922_382_848 + 256_384 * 4096),
    "Gemma 3 270M": (presets.gemma_3("270m"), 268_098_176),
    "Gemma 3 1B": (presets.gemma_3("1b"), 999_885_952),
    "Gemma 3 4B": (presets.gemma_3("4b"), 3_880_263_168),
    "Gemma 3 12B": (presets.gemma_3("12b"), 11_766_034_176),
    "Gemma 3 27B": (presets.gemma_3("27b"), 27_009_346_304),
    "T5Gemma 2B-2B": (presets.t5gemma("2b-2b"), 5_596_853_760),
    "T5Gemma 9B-2B": (presets.t5gemma("9b-2b"), 12_292_375_296),
    "T5Gemma 9B-9B": (presets.t5gemma("9b-9b"), 20_333_401_088),
    "T5Gemma 2 270M-270M": (presets.t5gemma_2("270m-270m"), 368_424_832),
    "T5Gemma 2 1B-1B": (presets.t5gemma_2("1b-1b"), 1_697_783_168),
    "T5Gemma 2 4B-4B": (presets.t5gemma_2("4b-4b"), 7_089_112_576),
    "ModernBERT base": (presets.modernbert("base"), 149_655_232),
    "ModernBERT large": (presets.modernbert("large"), 395_881_664),
    "DeBERTa-v3 small": (presets.deberta_v3("small"), 142_024_548),
    "DeBERTa-v3 base": (presets.deberta_v3("base"), 184_551_780),
    "DeBERTa-v3 large": (presets.deberta_v3("large"), 435_191_908),
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


def count_parameters(config):
    """Count the parameters of the built model, by part."""
    return {
        name: sum(math.prod(x.shape) for x in jax.tree.leaves(part))
        for name, part in abstract_model(config).params.items()
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_parameter_counts_equal_the_published_models(name):
    config, published = PUBLISHED[name]
    assert sum(count_parameters(config).values()) == published


@pytest.mark.parametrize("name", ELECTRA)
def test_electra_parameter_counts_equal_the_published_models(name):
    size, _, released = name.partition(",")
    config = presets.electra(size, generator_fraction=1.0 if released else None)
    counts = count_parameters(config)
    discriminator, generator = ELECTRA[name]
    assert counts["token_embedder"] + counts["encoder"] + counts["head"] == discriminator
    if generator is not None:
        assert counts["generator"] == generator


def test_ul2_has_19_59_billion_parameters():
    assert round(sum(count_parameters(presets.ul2_20b()).values()) / 1e9, 2) == 19.59


def test_flops_equal_the_closed_form_for_t5_base():
    """T5 1.1 base, 512/114: 2 N D with the encoder's share on 512 and the decoder's on 114 tokens, cross-attention's
    keys and values on 512, scores, and the head."""
    config = presets.t5_1_1("base")
    spec = {"encoder_input_tokens": ArraySpec((2, 512), "int32"), "decoder_input_tokens": ArraySpec((2, 114), "int32")}
    kernels = 4 * 768 * 768
    encoder = 12 * (2 * 512 * (kernels + 3 * 768 * 2048) + 4 * 768 * 512**2)
    decoder = 12 * (2 * 114 * (kernels + 3 * 768 * 2048) + 4 * 768 * 114 * 115 // 2)
    cross = 12 * (2 * 114 * kernels // 2 + 2 * 512 * kernels // 2 + 4 * 768 * 512 * 114)
    assert forward_flops(config, spec) == 2 * (encoder + decoder + cross + 2 * 114 * 768 * 32128)


SMOKE = presets.smoke("encoder_decoder")
FLOPS = {
    **{name: presets.smoke(name) for name in ("encoder_decoder", "decoder", "encoder")},
    "electra": dataclasses.replace(presets.smoke("electra"), embedding_dim=96),
    "merged": dataclasses.replace(SMOKE, decoder=dataclasses.replace(SMOKE.decoder, cross_attention="merged")),
    "unequal": dataclasses.replace(
        SMOKE, encoder=dataclasses.replace(SMOKE.encoder, d_model=192), separate_encoder_embeddings=True
    ),
    "disentangled": dataclasses.replace(
        presets.smoke("encoder"),
        encoder=dataclasses.replace(
            SMOKE.encoder, positions="disentangled", relative_bias_buckets=16, relative_bias_max_distance=64
        ),
    ),
    "gate": dataclasses.replace(
        presets.smoke("decoder"), decoder=dataclasses.replace(SMOKE.decoder, attention_gate=True)
    ),
    "blocks": dataclasses.replace(
        presets.smoke("encoder"),
        encoder=dataclasses.replace(SMOKE.encoder, positions="relative_bias", global_block_size=8),
    ),
    # All experts for all tokens, so that XLA counts them all.
    "experts": dataclasses.replace(
        presets.smoke("decoder"), decoder=dataclasses.replace(SMOKE.decoder, experts=MoEConfig(num_experts=2))
    ),
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops_equal_the_count_of_xla(name, monkeypatch):
    """XLA also counts elementwise work and the full square of causal scores, so its count is slightly higher."""
    monkeypatch.setattr(expert_dispatch, "grouped_mlp", even_experts)
    config = dataclasses.replace(FLOPS[name], scan_layers=False)  # XLA counts the body of a loop once.
    features = [f"{side}_input_tokens" for side in config.stacks]
    if name == "electra":
        features += ["encoder_target_tokens", "encoder_loss_weights"]
    spec = {feature: ArraySpec((4, 64), "int32") for feature in features}
    of_model = abstract_model(config)
    batch = {key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in spec.items()}
    lowered = jax.jit(lambda params, batch: bind_params(of_model.graphdef, params).output(batch)).lower(
        of_model.params, batch
    )
    ratio = lowered.cost_analysis()["flops"] / forward_flops(config, spec)
    assert 1.0 < ratio < 1.15


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(3, 1), (0, 0), (100, 7)])
def test_local_layers_cost_the_pairs_of_their_window(causal, window):
    stack = dataclasses.replace(presets.smoke("encoder").encoder, num_layers=2, layer_pattern=("local", "global"))
    config = dataclasses.replace(presets.smoke("encoder"), encoder=dataclasses.replace(stack, sliding_window=window))
    everywhere = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, layer_pattern=("global",)))
    if causal:
        config, everywhere = (dataclasses.replace(c, encoder=None, decoder=c.encoder) for c in (config, everywhere))
    length = 12
    spec = {f"{'decoder' if causal else 'encoder'}_input_tokens": ArraySpec((1, length), "int32")}
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (distance <= window[0]) & (distance >= (0 if causal else -window[1]))
    all_seen = distance >= (0 if causal else -length)
    unseen = int(all_seen.sum() - seen.sum())
    assert forward_flops(everywhere, spec) - forward_flops(config, spec) == 4 * 4 * 32 * unseen


def test_presets_and_flops_do_not_import_jax():
    code = (
        "import sys, t5x_like.models.presets as p, t5x_like.models.flops as q;"
        "assert p.smoke() and q.forward_flops; assert 'jax' not in sys.modules and 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def products(jaxpr):
    """Count the operations of all matrix products in a program, with those of scanned layers as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operand = equation.invars[0].aval.shape
            summed = math.prod(operand[dimension] for dimension in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * summed
        if equation.primitive.name == "ragged_dot_general":
            # Each row is multiplied with the kernel of its group.
            total += 2 * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[-1]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * products(inner)
    return total


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_flops_equal_those_of_their_traced_programs(name, monkeypatch):
    """Count the matrix products of the traced model for rows of one token, where each query has one key by any mask."""
    # Of the programs for each platform, that for TPUs has groups of experts without spare rows.
    monkeypatch.setattr(
        expert_dispatch, "grouped_mlp", lambda *arguments: grouped_mlp.grouped_mlp(*arguments[:-1], platform="tpu")
    )
    config, _ = PUBLISHED[name]
    spec = abstract_model(config)
    experts = None if config.decoder is None else config.decoder.experts
    rows = 2 if experts is None else grouped_mlp.ROW_TILE // experts.experts_per_token
    features = {f"{stack}_input_tokens": jax.ShapeDtypeStruct((rows, 1), np.int32) for stack in config.stacks}
    program = jax.make_jaxpr(lambda params, batch: bind_params(spec.graphdef, params)(batch))(spec.params, features)
    counted = forward_flops(config, {feature: ArraySpec((rows, 1), "int32") for feature in features})
    if experts is not None:
        # Products with the weights of a token's experts, and with the mask of the tokens that are counted.
        decoder = config.decoder
        counted += decoder.num_layers * 2 * rows * (experts.experts_per_token * decoder.d_model + experts.num_experts)
    assert products(program.jaxpr) == counted
