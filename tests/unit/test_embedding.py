"""Imported models embed texts: pooling, attention and lengths by option, or as the model says."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from model_examples import model as example

from t5x_like.config import ConfigError, DataError, RefusedError
from t5x_like.data.tokenizers import train_sentencepiece
from t5x_like.embedding.command import batches, embed
from t5x_like.embedding.encoders import KEPT, open_encoder
from t5x_like.interop import imported
from t5x_like.models.build import build

TEXTS = ["one small text", "another text", "a text that is quite a bit longer than all the other texts are", "one"]
PIECES = 400


@pytest.fixture(scope="module")
def pieces():
    return train_sentencepiece([Path(__file__).read_text(), *TEXTS], PIECES)


def saved(folder, pieces, architecture, positions="rope"):
    config = example(architecture, positions, stack_changes={"num_layers": 1})
    config = config.__class__(encoder=config.encoder, decoder=config.decoder, vocab_size=PIECES)
    folder.mkdir()
    imported.save(folder, config, None, {"params": jax.jit(lambda: build(config, jax.random.key(1)))()})
    (folder / KEPT).mkdir()
    (folder / KEPT / "spiece.model").write_bytes(pieces)
    return folder


def test_a_decoder_embeds_by_its_last_token_or_with_attention_in_both_directions(tmp_path, pieces):
    folder = saved(tmp_path / "decoder", pieces, "decoder")
    causal, both = open_encoder(folder), open_encoder(folder, bidirectional=True)
    assert causal.embedding.pooling == "last" and both.embedding.pooling == "mean"
    a, b = embed(causal, TEXTS), embed(both, TEXTS)
    assert a.shape == b.shape == (4, 32) and np.abs(a - b).max() > 1e-2
    # Each text alone: neither the texts beside it nor its row's length matter.
    np.testing.assert_allclose(embed(both, TEXTS[2:3])[0], b[2], atol=1e-5)
    first = open_encoder(folder, bidirectional=True, pooling="cls", normalize=True)
    found = embed(first, ["one small text", "one small one"])
    assert np.abs(found[0] - found[1]).max() > 1e-4  # The first token has read the last.
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_an_imported_model_says_how_it_embeds(tmp_path, pieces):
    folder = saved(tmp_path / "encoder", pieces, "encoder", "learned")
    (folder / KEPT / "1_Pooling").mkdir()
    (folder / KEPT / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / KEPT / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Normalize"}]))
    (folder / KEPT / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    encoder = open_encoder(folder)
    assert (encoder.embedding.pooling, encoder.embedding.normalize, encoder.max_length) == ("cls", True, 9)
    long = encoder.encode(TEXTS, 9)[2]
    assert len(long) == 9
    with pytest.raises(ConfigError, match="at most 32"):
        open_encoder(folder, max_length=40)


def test_the_encoder_of_an_encoder_decoder_embeds_and_one_without_tokenizer_does_not(tmp_path, pieces):
    folder = saved(tmp_path / "t5", pieces, "encoder_decoder", "relative_bias")
    assert np.isfinite(embed(open_encoder(folder), TEXTS)).all()
    (folder / KEPT / "spiece.model").unlink()
    with pytest.raises(DataError, match="the model's tokenizer"):
        open_encoder(folder)
    (folder / KEPT / "tokenizer.json").write_text("{}")
    with pytest.raises((DataError, RefusedError), match="tokenizer"):
        open_encoder(folder)


def test_relative_biases_to_the_left_do_not_see_both_ways(tmp_path, pieces):
    folder = saved(tmp_path / "left", pieces, "decoder", "relative_bias")
    with pytest.raises(ConfigError, match="to the left only"):
        open_encoder(folder, bidirectional=True)


def test_batches_have_every_text_once_in_rows_that_it_fits():
    lengths = np.random.default_rng(0).integers(1, 300, 500).tolist()
    seen = []
    for cells, rows in batches(lengths, 256, 8):
        assert all(min(lengths[row], 256) <= cells for row in rows)
        assert cells in (16, 32, 64, 128, 256) and len(rows) * cells <= 2**14
        seen += rows
    assert sorted(seen) == list(range(500))
