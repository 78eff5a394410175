"""The same weights give the logits of Hugging Face transformers, computed here and now, with padding.

The weights of a small random model of each family are mapped by hand; interop will do it from files.
"""

import dataclasses

import jax
import numpy as np
import pytest

from t5x_like.config.model import ModelConfig
from t5x_like.models import presets
from t5x_like.models.build import abstract, merge

torch = pytest.importorskip("torch", reason="parity with transformers needs the hf extra")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs the hf extra")

pytestmark = pytest.mark.hf
VOCABULARY, D, HEADS, HEAD_DIM, D_FF, LAYERS = 97, 24, 4, 6, 40, 3


def weights(module) -> dict[str, np.ndarray]:
    """All tensors of a module after moving them off their initial values, so that none is without effect."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def stacked(layers):
    """Trees of layers -> one tree with the layers in front."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def projection(w, heads: int, head_dim: int, bias=None):
    """[H h, d] of torch -> kernel [d, H, h]."""
    tree = {"kernel": w.T.reshape(-1, heads, head_dim)}
    return tree if bias is None else {**tree, "bias": bias.reshape(heads, head_dim)}


def output(w, heads: int, head_dim: int, bias=None):
    """[d, H h] of torch -> kernel [H, h, d]."""
    tree = {"kernel": w.T.reshape(heads, head_dim, -1)}
    return tree if bias is None else {**tree, "bias": bias}


def logits(config: ModelConfig, params, batch):
    spec = abstract(config)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, spec.params)
    return np.asarray(jax.jit(lambda params: merge(spec.graphdef, params)(batch))(params))


def assert_same(found, expected, real):
    """Within 1e-5 of the largest logit at real positions."""
    assert np.abs(expected[real]).max() > 1
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-5 * np.abs(expected[real]).max())


def small(config: ModelConfig, **changes) -> ModelConfig:
    """The preset with the size of these tests."""
    size = {"num_layers": LAYERS, "d_model": D, "num_heads": HEADS, "num_kv_heads": HEADS, "head_dim": HEAD_DIM}
    size |= {"d_ff": D_FF} | changes
    stacks = {name: dataclasses.replace(stack, **size) for name, stack in config.stacks.items()}
    return dataclasses.replace(config, **stacks, vocab_size=VOCABULARY, dtype="float32")


def tokens(rows: int, length: int, lengths):
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (rows, length))
    real = np.arange(length) < np.asarray(lengths)[:, None]
    return np.where(real, ids, 0).astype(np.int32), real


def t5_attention(w, path):
    return {
        "query": projection(w[f"{path}.q.weight"], HEADS, HEAD_DIM),
        "key": projection(w[f"{path}.k.weight"], HEADS, HEAD_DIM),
        "value": projection(w[f"{path}.v.weight"], HEADS, HEAD_DIM),
        "out": output(w[f"{path}.o.weight"], HEADS, HEAD_DIM),
    }


def t5_stack(w, name: str):
    def layer(index):
        path = f"{name}.block.{index}.layer"
        mlp = 1 if name == "encoder" else 2
        inner = [part for part in ("wi", "wi_0", "wi_1") if f"{path}.{mlp}.DenseReluDense.{part}.weight" in w]
        tree = {
            "self_attention_norm": {"scale": w[f"{path}.0.layer_norm.weight"]},
            "self_attention": t5_attention(w, f"{path}.0.SelfAttention"),
            "mlp_norm": {"scale": w[f"{path}.{mlp}.layer_norm.weight"]},
            "mlp": {part: {"kernel": w[f"{path}.{mlp}.DenseReluDense.{part}.weight"].T} for part in [*inner, "wo"]},
        }
        if name == "decoder":
            tree["cross_attention_norm"] = {"scale": w[f"{path}.1.layer_norm.weight"]}
            tree["cross_attention"] = t5_attention(w, f"{path}.1.EncDecAttention")
        return tree

    bias = w[f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "layers": stacked([layer(index) for index in range(LAYERS)]),
        "relative_bias": {"embedding": bias},
        "final_norm": {"scale": w[f"{name}.final_layer_norm.weight"]},
    }


@pytest.mark.parametrize("preset", [presets.t5_1_0("small"), presets.t5_1_1("small"), presets.ul2_20b()])
def test_t5(preset):
    """T5 1.0 (ReLU, tied, scaled logits), T5 1.1 (gated GELU) and UL2 (gated SiLU), the latter two untied."""
    config = small(preset, relative_bias_buckets=8, relative_bias_max_distance=20)
    forward_type = {(False, "relu"): "relu", (True, "gelu_tanh"): "gated-gelu", (True, "silu"): "gated-silu"}
    reference = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=D,
            d_kv=HEAD_DIM,
            d_ff=D_FF,
            num_layers=LAYERS,
            num_heads=HEADS,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
            feed_forward_proj=forward_type[config.encoder.mlp_gated, config.encoder.mlp_activation],
            scale_decoder_outputs=config.scale_logits,
            dropout_rate=0.0,
        )
    ).eval()
    if not config.tie_embeddings:
        # transformers 5 has no configuration for a separate head; a file with two tensors makes one like this.
        reference.lm_head = torch.nn.Linear(D, VOCABULARY, bias=False)
    w = weights(reference)
    params = {
        "token_embedder": {"embedding": w["shared.weight"]},
        "encoder": t5_stack(w, "encoder"),
        "decoder": t5_stack(w, "decoder"),
    }
    if not config.tie_embeddings:
        params["head"] = {"kernel": w["lm_head.weight"].T}
    inputs, encoder_real = tokens(3, 30, [30, 1, 17])
    targets, real = tokens(3, 25, [9, 25, 3])
    with torch.no_grad():
        expected = reference(
            input_ids=torch.tensor(inputs).long(),
            attention_mask=torch.tensor(encoder_real).long(),
            decoder_input_ids=torch.tensor(targets).long(),
        ).logits.numpy()
    found = logits(config, params, {"encoder_input_tokens": inputs, "decoder_input_tokens": targets})
    assert_same(found, expected, real)


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied):
    kv_heads = 2
    config = small(presets.decoder_1b(), num_kv_heads=kv_heads)
    config = dataclasses.replace(config, tie_embeddings=tied)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=D,
            intermediate_size=D_FF,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=kv_heads,
            head_dim=HEAD_DIM,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            tie_word_embeddings=tied,
        )
    ).eval()
    w = weights(reference)

    def layer(index):
        path = f"model.layers.{index}"
        names = {"query": ("q", HEADS), "key": ("k", kv_heads), "value": ("v", kv_heads)}
        attention = {
            name: projection(w[f"{path}.self_attn.{short}_proj.weight"], heads, HEAD_DIM)
            for name, (short, heads) in names.items()
        }
        attention["out"] = output(w[f"{path}.self_attn.o_proj.weight"], HEADS, HEAD_DIM)
        mlp = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
        return {
            "self_attention_norm": {"scale": w[f"{path}.input_layernorm.weight"]},
            "self_attention": attention,
            "mlp_norm": {"scale": w[f"{path}.post_attention_layernorm.weight"]},
            "mlp": {name: {"kernel": w[f"{path}.mlp.{short}_proj.weight"].T} for name, short in mlp.items()},
        }

    params = {
        "token_embedder": {"embedding": w["model.embed_tokens.weight"]},
        "decoder": {
            "layers": stacked([layer(index) for index in range(LAYERS)]),
            "final_norm": {"scale": w["model.norm.weight"]},
        },
    }
    if not tied:
        params["head"] = {"kernel": w["lm_head.weight"].T}
    rows, real = tokens(3, 20, [20, 7, 1])
    with torch.no_grad():
        expected = reference(
            input_ids=torch.tensor(rows).long(), attention_mask=torch.tensor(real).long()
        ).logits.numpy()
    assert_same(logits(config, params, {"decoder_input_tokens": rows}), expected, real)


def test_bert():
    """Segment type 0 is everywhere, so its vector is part of the positions."""
    config = small(presets.bert_base(), max_positions=40)
    reference = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=D,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=D_FF,
            max_position_embeddings=40,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).eval()
    w = weights(reference)

    def norm(path):
        return {"scale": w[f"{path}.weight"], "bias": w[f"{path}.bias"]}

    def dense(path):
        return {"kernel": w[f"{path}.weight"].T, "bias": w[f"{path}.bias"]}

    def layer(index):
        path = f"bert.encoder.layer.{index}"
        attention = {}
        for name in ("query", "key", "value"):
            weight, bias = (w[f"{path}.attention.self.{name}.{part}"] for part in ("weight", "bias"))
            attention[name] = projection(weight, HEADS, HEAD_DIM, bias)
        out = f"{path}.attention.output.dense"
        attention["out"] = output(w[f"{out}.weight"], HEADS, HEAD_DIM, w[f"{out}.bias"])
        return {
            "self_attention_norm": norm(f"{path}.attention.output.LayerNorm"),
            "self_attention": attention,
            "mlp_norm": norm(f"{path}.output.LayerNorm"),
            "mlp": {"wi": dense(f"{path}.intermediate.dense"), "wo": dense(f"{path}.output.dense")},
        }

    positions = w["bert.embeddings.position_embeddings.weight"] + w["bert.embeddings.token_type_embeddings.weight"][0]
    params = {
        "token_embedder": {"embedding": w["bert.embeddings.word_embeddings.weight"]},
        "encoder": {
            "position_embedder": {"embedding": positions},
            "embedding_norm": norm("bert.embeddings.LayerNorm"),
            "layers": stacked([layer(index) for index in range(LAYERS)]),
        },
        "head": {
            "transform": dense("cls.predictions.transform.dense"),
            "transform_norm": norm("cls.predictions.transform.LayerNorm"),
            "bias": w["cls.predictions.bias"],
        },
    }
    rows, real = tokens(3, 30, [30, 1, 17])
    with torch.no_grad():
        expected = reference(
            input_ids=torch.tensor(rows).long(), attention_mask=torch.tensor(real).long()
        ).logits.numpy()
    assert_same(logits(config, params, {"encoder_input_tokens": rows}), expected, real)
