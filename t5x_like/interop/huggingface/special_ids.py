"""Ids of special tokens: of config.json, or what transformers takes where it does not say them."""

from __future__ import annotations

import dataclasses

from t5x_like.config.model import ModelConfig
from t5x_like.interop.huggingface.fields import Fields
from t5x_like.interop.huggingface.settings.common import Values

_T5 = (0, 0, 1)
_GEMMA = (0, 2, 1)
_LLAMA = (None, 1, 2)
_DEFAULTS: dict[str, tuple[int | None, int, int]] = {
    "llama": _LLAMA,
    "mixtral": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "t5gemma": _GEMMA,
    "t5gemma2": _GEMMA,
    "gpt2": (None, 50256, 50256),
    "modernbert": (50283, 0, 1),
}
"""Padding, start of a decoder, end of text; those of all others are T5's."""


def read(fields: Fields, kind: str, model: ModelConfig) -> ModelConfig:
    """The model with the ids of its files.

    Raises:
      DataError: an id that is no natural number.
    """
    pad, start, eos = _DEFAULTS.get(kind, _T5)
    if "pad_token_id" in fields.values:
        pad = _id(fields, "pad_token_id")
    if model.decoder is not None:
        names = ("decoder_start_token_id", "bos_token_id") if model.encoder is not None else ("bos_token_id",)
        start = next((found for name in names if (found := _id(fields, name)) is not None), start)
    listed = fields.values.get("eos_token_id")
    each = [Fields({"eos_token_id": one}, fields.where) for one in (listed if isinstance(listed, list) else [listed])]
    ends = tuple(found for one in each if (found := _id(one, "eos_token_id")) is not None)
    return dataclasses.replace(model, pad_id=pad, start_id=start, eos_ids=ends or (eos,))


def _id(fields: Fields, name: str) -> int | None:
    """An id, or None. One beyond the table occurs in no text, and is no error: small models keep large defaults."""
    return fields.integer(name) if fields.has(name) and fields.values[name] != -1 else None


def write(model: ModelConfig) -> Values:
    """The fields of config.json."""
    if model.decoder is None:
        return {"pad_token_id": model.pad_id}
    ends = model.eos_ids
    start = "bos_token_id" if model.encoder is None else "decoder_start_token_id"
    eos = ends[0] if len(ends) == 1 else list(ends)
    return {"pad_token_id": model.pad_id, "eos_token_id": eos, start: model.start_id}
