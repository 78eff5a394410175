"""Files of sentence-transformers beside an exported encoder: how its states become one vector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from t5x_like.config.model import ModelConfig, Pooling
from t5x_like.model_loading import LoadedModel

_MODES: dict[Pooling, str] = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
_MODULES = "sentence_transformers.models."


def write_sentence_files(directory: Path, loaded: LoadedModel) -> list[str]:
    """Write modules.json, sentence_bert_config.json and 1_Pooling/config.json of a run with an embedding head.

    Args:
      directory: Existing directory with the encoder and its tokenizer.
      loaded: The run; other models have no such head.

    Returns:
      A line with the reason if they cannot be written.
    """
    model, data = loaded.model, loaded.trained_on
    head = model.task_head
    if data is None or head is None or head.kind != "embedding":
        return []
    if model.encoder is None:
        # The rows of a decoder end in EOS, which an exported decoder's tokenizer does not add.
        return ["files of sentence-transformers: they are written for encoders only"]
    if data.labelled is not None and data.labelled.mode is not None:
        return ["files of sentence-transformers: its tokenizer would not put the mode token in front of a text"]
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if head.normalize:
        kinds.append(("2_Normalize", "Normalize"))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{_MODULES}{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    _write(directory / "modules.json", modules)
    length = {"max_seq_length": data.inputs_length, "do_lower_case": False}
    _write(directory / "sentence_bert_config.json", length)
    _write(directory / "1_Pooling" / "config.json", _pooling(model, head.pooling))
    return []


def _pooling(model: ModelConfig, pooling: Pooling) -> dict[str, Any]:
    assert model.encoder is not None
    modes = {f"pooling_mode_{name}": kind == pooling for kind, name in _MODES.items()}
    return {"word_embedding_dimension": model.encoder.d_model, **modes}


def _write(path: Path, values: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
