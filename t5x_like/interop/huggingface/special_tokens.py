"""Ids of special tokens in config.json, with the defaults of transformers."""

from __future__ import annotations

import dataclasses

from t5x_like.config.model import ModelConfig
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.family import SpecialTokens, Values


def read(fields: Fields, defaults: SpecialTokens, model: ModelConfig) -> ModelConfig:
    """Return the model with the ids of its config.json, or the family's defaults.

    Raises:
      DataError: an id is not a natural number.
    """
    pad, start = defaults.pad, defaults.start
    if "pad_token_id" in fields.values:
        pad = _id(fields, "pad_token_id")
    if model.decoder is not None:
        names = ("decoder_start_token_id", "bos_token_id") if model.encoder is not None else ("bos_token_id",)
        start = next((token for name in names if (token := _id(fields, name)) is not None), start)
    listed = fields.values.get("eos_token_id")
    # One id or a list of ids; each is checked as a field of its own.
    entries = listed if isinstance(listed, list) else [listed]
    parts = [Fields({"eos_token_id": entry}, fields.where) for entry in entries]
    ends = tuple(token for part in parts if (token := _id(part, "eos_token_id")) is not None)
    return dataclasses.replace(model, pad_token_id=pad, decoder_start_token_id=start, eos_ids=ends or (defaults.eos,))


def _id(fields: Fields, name: str) -> int | None:
    """Return an id, or None. An id beyond the table is no error, because small models keep the defaults of large
    ones."""
    return fields.integer(name) if fields.has(name) and fields.values[name] != -1 else None


def write(model: ModelConfig) -> Values:
    """Return the fields of config.json."""
    if model.decoder is None:
        return {"pad_token_id": model.pad_token_id}
    ends = model.eos_ids
    start = "bos_token_id" if model.encoder is None else "decoder_start_token_id"
    eos = ends[0] if len(ends) == 1 else list(ends)
    return {"pad_token_id": model.pad_token_id, "eos_token_id": eos, start: model.decoder_start_token_id}
