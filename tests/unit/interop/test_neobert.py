"""NeoBERT, whose code is not in transformers, against the formulas of its paper (Le Breton et al. 2025)."""

import json

import jax
import numpy as np

from t5x_like.export.huggingface_directory import export_directory
from t5x_like.interop.huggingface.checkpoint import import_directory, open_directory
from t5x_like.interop.safetensors_file import SINGLE, Pending, TensorFile, write
from t5x_like.models.factory import abstract_model, bind_params

D, HEADS, LAYERS, FF, V = 24, 3, 2, 16, 40
CONFIG = {
    "model_type": "neobert", "architectures": ["NeoBERTLMHead"], "hidden_size": D, "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS, "intermediate_size": 24, "dim_head": 8, "norm_eps": 1e-5, "vocab_size": V,
    "pad_token_id": 0, "max_length": 64, "embedding_init_range": 0.02, "decoder_init_range": 0.02,
    "kwargs": {"pretrained": {}}, "torch_dtype": "float32",
}  # fmt: skip


def arrays():
    rng = np.random.default_rng(0)
    shapes = {"model.encoder.weight": (V, D), "model.layer_norm.weight": (D,), "decoder.weight": (V, D)}
    shapes["decoder.bias"] = (V,)
    for layer in range(LAYERS):
        block = f"model.transformer_encoder.{layer}"
        shapes |= {f"{block}.qkv.weight": (3 * D, D), f"{block}.wo.weight": (D, D)}
        shapes |= {f"{block}.ffn.w12.weight": (2 * FF, D), f"{block}.ffn.w3.weight": (D, FF)}
        shapes |= {f"{block}.attention_norm.weight": (D,), f"{block}.ffn_norm.weight": (D,)}
    return {
        name: (rng.normal(size=shape) * shape[-1] ** -0.5 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def logits(w, ids):
    """Return the logits [L, V] of a text: pre-RMSNorm blocks of rotary attention and SwiGLU."""

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * w[name]

    def rotated(x):
        # Neighbours are the real and the imaginary part of a number, which is multiplied by exp(i position / base**k).
        numbers = x[..., 0::2] + 1j * x[..., 1::2]
        angles = np.arange(len(ids))[:, None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
        numbers = numbers * np.exp(1j * angles)[:, None]
        return np.stack([numbers.real, numbers.imag], axis=-1).reshape(x.shape)

    x = w["model.encoder.weight"][ids].astype(np.float64)
    for layer in range(LAYERS):
        block = f"model.transformer_encoder.{layer}"
        heads = (norm(x, f"{block}.attention_norm.weight") @ w[f"{block}.qkv.weight"].T).reshape(len(ids), HEADS, 24)
        query, key, value = np.split(heads, 3, axis=-1)
        scores = np.einsum("qhx,khx->hqk", rotated(query), rotated(key)) / np.sqrt(8)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khx->qhx", weights / weights.sum(-1, keepdims=True), value).reshape(len(ids), D)
        x = x + mixed @ w[f"{block}.wo.weight"].T
        gate, up = np.split(norm(x, f"{block}.ffn_norm.weight") @ w[f"{block}.ffn.w12.weight"].T, 2, axis=-1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{block}.ffn.w3.weight"].T
    return norm(x, "model.layer_norm.weight") @ w["decoder.weight"].T + w["decoder.bias"]


def test_neobert_computes_its_formulas_and_returns_bitwise(tmp_path):
    published, tensors = tmp_path / "hf", arrays()
    published.mkdir()
    pending = [Pending(name, array.dtype, array.shape, lambda array=array: array) for name, array in tensors.items()]
    write(published / SINGLE, pending, {"format": "pt"})
    (published / "config.json").write_text(json.dumps(CONFIG))
    source = open_directory(published)
    abstract = abstract_model(source.model)
    params = source.params(abstract.params)
    ids = np.random.default_rng(1).integers(2, V, (2, 12)).astype(np.int32)
    run = jax.jit(lambda params: bind_params(abstract.graphdef, params)({"encoder_input_tokens": ids}))
    expected = np.stack([logits(tensors, row) for row in ids])
    np.testing.assert_allclose(run(params), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())

    import_directory(published, tmp_path / "imported", report=lambda line: None)
    export_directory(tmp_path / "imported", tmp_path / "exported", report=lambda line: None)
    written = TensorFile(tmp_path / "exported" / SINGLE)
    assert set(written.tensors) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(written.read(name), array, err_msg=name)
    assert open_directory(tmp_path / "exported").model == source.model
