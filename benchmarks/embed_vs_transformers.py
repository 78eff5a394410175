"""Embedding of texts by t5x_like and by transformers: the mean of a BERT-like encoder's states, measured in one run.

    pip install -e '.[hf]'
    python benchmarks/embed_vs_transformers.py

The model is an encoder of d_model 256, d_ff 1024, 8 layers, 4 heads of 64 and a vocabulary of 30522, in float32 with
random weights. The texts are 64 rows of 128 random tokens; neither library tokenizes. Each runs in its own process, in
turns (`interleaved.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable

import interleaved
import numpy as np

ROWS, LENGTH, VOCABULARY = 64, 128, 30_522


def _rows() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 30_000, (ROWS, LENGTH)).astype(np.int32)


def t5x_like_embedder(options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that embeds all texts and returns the mean length of the vectors."""
    import jax

    from t5x_like.config import ShardingConfig
    from t5x_like.embedding.text_encoder import Embedding, TextEncoder
    from t5x_like.models import presets
    from t5x_like.models.factory import abstract_model, init_params
    from t5x_like.sharding.mesh import make_mesh
    from t5x_like.sharding.rules import default_rules

    model = presets.bert("base")
    size = {"num_layers": 8, "d_model": 256, "d_ff": 1024, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64}
    assert model.encoder is not None
    model = dataclasses.replace(
        model, encoder=dataclasses.replace(model.encoder, **size), vocab_size=VOCABULARY, embedding_dim=None
    )
    sharding = ShardingConfig(fsdp=1)
    encoder = TextEncoder(
        model,
        Embedding("mean", normalize=False, bidirectional=True, transform=False),
        lambda texts, length: [],
        LENGTH,
        abstract_model(model).graphdef,
        init_params(model, jax.random.key(0)),
        make_mesh(sharding, jax.devices()[:1]),
        default_rules(sharding),
    )
    rows = _rows().tolist()
    return lambda: float(np.linalg.norm(encoder.vectors(rows, LENGTH), axis=-1).mean())


def transformers_embedder(options: argparse.Namespace) -> Callable[[], float]:
    """The same by transformers."""
    import torch
    import transformers

    if options.cpus:
        torch.set_num_threads(options.cpus)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.tensor(_rows()).long()
    mask = torch.ones_like(ids)

    def embed() -> float:
        with torch.inference_mode():
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
            vectors = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return float(np.linalg.norm(vectors.numpy(), axis=-1).mean())

    return embed


LIBRARIES = {"t5x_like": t5x_like_embedder, "transformers": transformers_embedder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    interleaved.add_options(parser, turns=8)
    records = interleaved.measure(LIBRARIES, parser.parse_args())
    report = {name: record.summary() for name, record in records.items()}
    ratios = {"transformers": interleaved.ratio(records, "t5x_like", "transformers")}
    print(json.dumps({"machine": interleaved.machine(), **report, "ratios": ratios}, indent=2))


if __name__ == "__main__":
    main()
