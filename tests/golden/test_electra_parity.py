"""ELECTRA's generator and discriminator, compared with transformers, whose two models share embeddings here."""

import dataclasses

import jax
import numpy as np
import pytest

from t5x_like.models import presets
from t5x_like.models.factory import abstract_model, bind_params

torch = pytest.importorskip("torch", reason="parity with transformers needs the hf extra")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs the hf extra")

pytestmark = pytest.mark.hf
VOCABULARY, D, HEADS, D_FF, LAYERS = 97, 24, 4, 40, 3
WIDTH = 16
"""Width of the embeddings."""


def weights(module) -> dict[str, np.ndarray]:
    """Return all tensors of a module after moving them off their initial values, so that each has an effect."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def stacked(layers):
    """Stack the trees of the layers into one tree with the layers in front."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def projection(w, heads: int, head_dim: int, bias=None):
    """Return torch's [H h, d] as a kernel [d, H, h]."""
    tree = {"kernel": w.T.reshape(-1, heads, head_dim)}
    return tree if bias is None else {**tree, "bias": bias.reshape(heads, head_dim)}


def output(w, heads: int, head_dim: int, bias=None):
    """Return torch's [d, H h] as a kernel [H, h, d]."""
    tree = {"kernel": w.T.reshape(heads, head_dim, -1)}
    return tree if bias is None else {**tree, "bias": bias}


def assert_same(found, expected, real):
    """Assert equality at real positions within 1e-5 of the largest logit."""
    assert np.abs(expected[real]).max() > 1
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-5 * np.abs(expected[real]).max())


def tokens(rows: int, length: int, lengths):
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (rows, length))
    real = np.arange(length) < np.asarray(lengths)[:, None]
    return np.where(real, ids, 0).astype(np.int32), real


def reference(kind, hidden: int, heads: int, d_ff: int):
    config = transformers.ElectraConfig(
        vocab_size=VOCABULARY,
        embedding_size=WIDTH,
        hidden_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        intermediate_size=d_ff,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return kind(config).eval()


def norm(w, path):
    return {"scale": w[f"{path}.weight"], "bias": w[f"{path}.bias"]}


def dense(w, path):
    return {"kernel": w[f"{path}.weight"].T, "bias": w[f"{path}.bias"]}


def stack(w, heads: int, head_dim: int):
    def layer(index):
        path = f"electra.encoder.layer.{index}"
        attention = {}
        for name in ("query", "key", "value"):
            weight, bias = (w[f"{path}.attention.self.{name}.{part}"] for part in ("weight", "bias"))
            attention[name] = projection(weight, heads, head_dim, bias)
        out = f"{path}.attention.output.dense"
        return {
            "self_attention_norm": norm(w, f"{path}.attention.output.LayerNorm"),
            "self_attention": {**attention, "out": output(w[f"{out}.weight"], heads, head_dim, w[f"{out}.bias"])},
            "mlp_norm": norm(w, f"{path}.output.LayerNorm"),
            "mlp": {"wi": dense(w, f"{path}.intermediate.dense"), "wo": dense(w, f"{path}.output.dense")},
        }

    return {
        "embedding_projection": dense(w, "electra.embeddings_project"),
        "layers": stacked([layer(index) for index in range(LAYERS)]),
    }


def test_electra_equals_transformers():
    preset = presets.electra("small", generator_fraction=0.5)
    sizes = {"num_layers": LAYERS, "max_positions": 40, "dropout_rate": 0.0}
    heads, head_dim, generator_heads = HEADS, D // HEADS, HEADS // 2
    config = dataclasses.replace(
        preset,
        vocab_size=VOCABULARY,
        embedding_dim=WIDTH,
        encoder=dataclasses.replace(
            preset.encoder, d_model=D, num_heads=heads, num_kv_heads=heads, head_dim=head_dim, d_ff=D_FF, **sizes
        ),
        generator=dataclasses.replace(
            preset.generator,
            d_model=D // 2,
            num_heads=generator_heads,
            num_kv_heads=generator_heads,
            head_dim=head_dim,
            d_ff=D_FF // 2,
            **sizes,
        ),
    )
    discriminator = reference(transformers.ElectraForPreTraining, D, heads, D_FF)
    generator = reference(transformers.ElectraForMaskedLM, D // 2, generator_heads, D_FF // 2)
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.generator_lm_head.weight = discriminator.electra.embeddings.word_embeddings.weight
    weights(discriminator)
    of_generator = weights(generator)  # Moves the embeddings once more.
    with torch.no_grad():
        discriminator.discriminator_predictions.dense_prediction.weight.mul_(50)
    w = {name: tensor.detach().numpy() for name, tensor in discriminator.state_dict().items()}

    types = w["electra.embeddings.token_type_embeddings.weight"][0]
    params = {
        "token_embedder": {"embedding": w["electra.embeddings.word_embeddings.weight"]},
        "encoder": {
            "position_embedder": {"embedding": w["electra.embeddings.position_embeddings.weight"] + types},
            "embedding_norm": norm(w, "electra.embeddings.LayerNorm"),
            **stack(w, heads, head_dim),
        },
        "head": {
            "dense": dense(w, "discriminator_predictions.dense"),
            "out": {
                "kernel": w["discriminator_predictions.dense_prediction.weight"][0],
                "bias": w["discriminator_predictions.dense_prediction.bias"][0],
            },
        },
        "generator": {
            "encoder": stack(of_generator, generator_heads, head_dim),
            "head": {
                "transform": dense(of_generator, "generator_predictions.dense"),
                "transform_norm": norm(of_generator, "generator_predictions.LayerNorm"),
                "bias": of_generator["generator_lm_head.bias"],
            },
        },
    }
    spec = abstract_model(config)
    shapes = {str(path): np.shape(x) for path, x in jax.tree.leaves_with_path(params)}
    assert shapes == {str(path): x.shape for path, x in jax.tree.leaves_with_path(spec.params)}
    model = bind_params(spec.graphdef, params)
    rows, real = tokens(3, 30, [30, 1, 17])
    given = {"input_ids": torch.tensor(rows).long(), "attention_mask": torch.tensor(real).long()}
    with torch.no_grad():
        assert_same(np.asarray(model.generate(rows)), generator(**given).logits.numpy(), real)
        assert_same(np.asarray(model.detect(rows)), discriminator(**given).logits.numpy(), real)
