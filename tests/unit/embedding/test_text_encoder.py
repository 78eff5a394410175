"""Imported models embed texts: pooling, attention and lengths by option, or from the model's configuration."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.model_examples import model as example

from t5x_like.checkpoints import model_dir
from t5x_like.checkpoints.model_dir import HUGGINGFACE_DIR
from t5x_like.data.tokenizers.train_vocabulary import train_sentencepiece
from t5x_like.embedding.embed_files import batches, embed
from t5x_like.embedding.text_encoder import open_encoder
from t5x_like.errors import ConfigError, DataError, SafetyError
from t5x_like.models.factory import init_params

TEXTS = ["one small text", "another text", "a text that is quite a bit longer than all the other texts are", "one"]
PIECES = 400


@pytest.fixture(scope="module")
def pieces():
    return train_sentencepiece([Path(__file__).read_text(), *TEXTS], PIECES)


def saved(folder, pieces, architecture, positions="rope"):
    config = example(architecture, positions, stack_changes={"num_layers": 1})
    config = config.__class__(encoder=config.encoder, decoder=config.decoder, vocab_size=PIECES)
    folder.mkdir()
    model_dir.save(folder, config, None, {"params": jax.jit(lambda: init_params(config, jax.random.key(1)))()})
    (folder / HUGGINGFACE_DIR).mkdir()
    (folder / HUGGINGFACE_DIR / "spiece.model").write_bytes(pieces)
    return folder


@pytest.mark.slow
def test_decoder_embeds_by_last_token_or_bidirectionally(tmp_path, pieces):
    folder = saved(tmp_path / "decoder", pieces, "decoder")
    causal, both = open_encoder(folder), open_encoder(folder, bidirectional=True)
    assert causal.embedding.pooling == "last" and both.embedding.pooling == "mean"
    a, b = embed(causal, TEXTS), embed(both, TEXTS)
    assert a.shape == b.shape == (4, 32) and np.abs(a - b).max() > 1e-2
    # Each text alone: neither the texts beside it nor its row's length matter.
    np.testing.assert_allclose(embed(both, TEXTS[2:3])[0], b[2], atol=1e-5)
    short = embed(open_encoder(folder, bidirectional=True, normalize=True, dimensions=8), TEXTS)
    np.testing.assert_allclose(short, b[:, :8] / np.linalg.norm(b[:, :8], axis=1, keepdims=True), rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="--dimensions: found 33, expected at most 32"):
        open_encoder(folder, dimensions=33)
    first = open_encoder(folder, bidirectional=True, pooling="cls", normalize=True)
    found = embed(first, ["one small text", "one small one"])
    assert np.abs(found[0] - found[1]).max() > 1e-4  # The first token has read the last.
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_settings_of_an_imported_model_are_used(tmp_path, pieces):
    folder = saved(tmp_path / "encoder", pieces, "encoder", "learned")
    (folder / HUGGINGFACE_DIR / "1_Pooling").mkdir()
    (folder / HUGGINGFACE_DIR / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / HUGGINGFACE_DIR / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Normalize"}])
    )
    (folder / HUGGINGFACE_DIR / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    encoder = open_encoder(folder)
    assert (encoder.embedding.pooling, encoder.embedding.normalize, encoder.max_length) == ("cls", True, 9)
    long = encoder.encode(TEXTS, 9)[2]
    assert len(long) == 9
    with pytest.raises(ConfigError, match="at most 32"):
        open_encoder(folder, max_length=40)


def test_encoder_decoder_embeds_by_its_encoder_and_needs_a_tokenizer(tmp_path, pieces):
    folder = saved(tmp_path / "t5", pieces, "encoder_decoder", "relative_bias")
    assert np.isfinite(embed(open_encoder(folder), TEXTS)).all()
    (folder / HUGGINGFACE_DIR / "spiece.model").unlink()
    with pytest.raises(DataError, match="the model's tokenizer"):
        open_encoder(folder)
    (folder / HUGGINGFACE_DIR / "tokenizer.json").write_text("{}")
    with pytest.raises((DataError, SafetyError), match="tokenizer"):
        open_encoder(folder)


def test_bidirectional_attention_is_refused_for_causal_relative_biases(tmp_path, pieces):
    folder = saved(tmp_path / "left", pieces, "decoder", "relative_bias")
    with pytest.raises(ConfigError, match="to the left only"):
        open_encoder(folder, bidirectional=True)


def test_batches_hold_every_text_once_in_rows_that_fit():
    lengths = np.random.default_rng(0).integers(1, 300, 500).tolist()
    seen = []
    for length, rows in batches(lengths, 256, 8):
        assert all(min(lengths[row], 256) <= length for row in rows)
        assert length in (16, 32, 64, 128, 256) and len(rows) * length <= 2**14
        seen += rows
    assert sorted(seen) == list(range(500))
