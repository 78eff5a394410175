"""Parameter paths, shapes and logical axes are part of the checkpoint format: a change here breaks checkpoints."""

import dataclasses
import math

import jax
import pytest

from t5x_like.models import presets
from t5x_like.models.factory import abstract_model

ATTENTION = """
{0}/query/kernel layers embed heads head_dim
{0}/key/kernel layers embed kv_heads head_dim
{0}/value/kernel layers embed kv_heads head_dim
{0}/out/kernel layers heads head_dim embed
"""
ATTENTION_BIASES = """
{0}/query/bias layers heads head_dim
{0}/key/bias layers kv_heads head_dim
{0}/value/bias layers kv_heads head_dim
{0}/out/bias layers embed
"""
GATED_MLP = """
{0}/mlp_norm/scale layers norm
{0}/mlp/wi_0/kernel layers embed mlp
{0}/mlp/wi_1/kernel layers embed mlp
{0}/mlp/wo/kernel layers mlp embed
"""


def t5_stack(name):
    return (
        f"{name}/relative_bias/embedding relative_buckets heads\n{name}/final_norm/scale norm\n"
        f"{name}/layers/self_attention_norm/scale layers norm\n"
        + ATTENTION.format(f"{name}/layers/self_attention")
        + GATED_MLP.format(f"{name}/layers")
    )


T5_1_1 = (
    "token_embedder/embedding vocab embed\nhead/kernel embed vocab\n"
    + t5_stack("encoder")
    + t5_stack("decoder")
    + "decoder/layers/cross_attention_norm/scale layers norm\n"
    + ATTENTION.format("decoder/layers/cross_attention")
)
LLAMA = (
    "token_embedder/embedding vocab embed\ndecoder/final_norm/scale norm\n"
    "decoder/layers/self_attention_norm/scale layers norm\n"
    + ATTENTION.format("decoder/layers/self_attention")
    + GATED_MLP.format("decoder/layers")
)
BERT = (
    """
token_embedder/embedding vocab embed
encoder/position_embedder/embedding positions embed
encoder/embedding_norm/scale norm
encoder/embedding_norm/bias norm
encoder/layers/self_attention_norm/scale layers norm
encoder/layers/self_attention_norm/bias layers norm
encoder/layers/mlp_norm/scale layers norm
encoder/layers/mlp_norm/bias layers norm
encoder/layers/mlp/wi/kernel layers embed mlp
encoder/layers/mlp/wi/bias layers mlp
encoder/layers/mlp/wo/kernel layers mlp embed
encoder/layers/mlp/wo/bias layers embed
head/transform/kernel embed mlp
head/transform/bias mlp
head/transform_norm/scale norm
head/transform_norm/bias norm
head/bias vocab
"""
    + ATTENTION.format("encoder/layers/self_attention")
    + ATTENTION_BIASES.format("encoder/layers/self_attention")
)
GPT_BERT = (
    """
token_embedder/embedding vocab embed
decoder/distance_embedder/embedding relative_buckets embed
decoder/distance_norm/scale norm
decoder/distance_norm/bias norm
decoder/depth_weights norm
decoder/layers/self_attention/gate/kernel layers embed heads head_dim
decoder/layers/self_attention/gate/bias layers heads head_dim
decoder/layers/mlp/wi_0/kernel layers embed mlp
decoder/layers/mlp/wi_1/kernel layers embed mlp
decoder/layers/mlp/wo/kernel layers mlp embed
head/transform/kernel embed mlp
head/transform/bias mlp
head/bias vocab
"""
    + ATTENTION.format("decoder/layers/self_attention")
    + ATTENTION_BIASES.format("decoder/layers/self_attention")
)
GOLDEN = {
    "t5_1_1": (presets.t5_1_1("small"), T5_1_1),
    "llama": (presets.decoder_1b(), LLAMA),
    "bert": (presets.bert_base(), BERT),
    "gpt_bert": (presets.gpt_bert(), GPT_BERT),
}


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", GOLDEN)
def test_parameter_paths_and_logical_axes_match_the_golden_table(name):
    config, lines = GOLDEN[name]
    expected = {path: tuple(axes) for path, *axes in (line.split() for line in lines.splitlines() if line)}
    assert paths(abstract_model(config).logical_axes) == expected


def test_layers_with_experts_are_rows_of_their_own():
    spec = abstract_model(presets.switch("base"))
    axes, shapes = paths(spec.logical_axes), {path: leaf.shape for path, leaf in paths(spec.params).items()}
    for stack in ("encoder", "decoder"):
        experts = f"{stack}/layers/experts"
        assert axes[f"{experts}/router/kernel"] == ("layers", "embed", "router")
        assert axes[f"{experts}/wi/kernel"] == ("layers", "experts", "embed", "mlp")
        assert shapes[f"{experts}/wi/kernel"] == (6, 8, 768, 3072)
        assert axes[f"{stack}/layers/mlp/wi/kernel"] == ("layers", "embed", "mlp")
        assert shapes[f"{stack}/layers/mlp/wi/kernel"] == (6, 768, 3072)
    block_sums = paths(abstract_model(presets.long_t5("small", block_size=16)).logical_axes)
    assert block_sums["encoder/global_relative_bias/embedding"] == ("relative_buckets", "heads")
    assert block_sums["encoder/layers/global_norm/scale"] == ("layers", "norm")


def test_shapes_match_the_logical_axes():
    config = presets.decoder_1b()
    size = {"layers": 16, "embed": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64, "mlp": 8192}
    size |= {"vocab": 128_256, "norm": 2048}
    spec = abstract_model(config)
    axes = paths(spec.logical_axes)
    assert {path: leaf.shape for path, leaf in paths(spec.params).items()} == {
        path: tuple(size[name] for name in names) for path, names in axes.items()
    }


def test_scan_and_remat_do_not_change_parameter_paths():
    config = presets.t5_1_1("small")
    other = dataclasses.replace(config, scan_layers=False, remat="full", dtype="bfloat16")
    assert abstract_model(other).params == abstract_model(config).params
    assert math.prod(abstract_model(config).params["head"]["kernel"].shape) == 512 * 32128
