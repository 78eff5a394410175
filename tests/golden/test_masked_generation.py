"""Gaps of a text are filled by a published encoder as by a plain loop over transformers' own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="transformers' models need the hf extra")
transformers = pytest.importorskip("transformers", reason="transformers' models need the hf extra")

from helpers.published_models import write_model  # noqa: E402
from tokenizers import processors  # noqa: E402

import t5x_like  # noqa: E402

pytestmark = pytest.mark.hf


def test_gaps_are_filled_between_the_tokenizers_special_tokens(tmp_path: Path) -> None:
    tokenizer = write_model(tmp_path, "modernbert")
    around = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, around)
    tokenizer.save_pretrained(tmp_path)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()

    text = "one [MASK][MASK] two [MASK] three"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    left = [position for position, token in enumerate(ids) if token == tokenizer.mask_token_id]
    gaps, filled = list(left), list(ids)
    allowed = np.ones(model.config.vocab_size, bool)
    # No special token fills a gap, except that for unknown text, which is a piece of the vocabulary.
    allowed[[token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id]] = False
    while left:
        logits = model(torch.tensor([filled])).logits[0].detach().double().numpy()
        logits = np.where(allowed, logits, -np.inf)
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        position = max(left, key=lambda position: probabilities[position].max())
        filled[position] = int(logits[position].argmax())
        left.remove(position)

    loaded = t5x_like.load(tmp_path)
    found = loaded.generate([text.replace("[MASK]", "<mask>")])
    assert found == [loaded.tokenizer.decode([filled[position] for position in gaps])]
