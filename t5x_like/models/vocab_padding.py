"""Rows of zeros that `ModelConfig.pad_vocab_to_multiple_of` adds to token tables and output projections."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from t5x_like.config.model import ModelConfig
from t5x_like.models.factory import abstract_model
from t5x_like.models.layers import with_zeros
from t5x_like.utils.type_aliases import PyTree


def without_padding(model: ModelConfig) -> ModelConfig:
    """Return the same model without padding."""
    return dataclasses.replace(model, pad_vocab_to_multiple_of=1)


def padded(params: PyTree, model: ModelConfig) -> PyTree:
    """Return the parameters of a model from those of the same model without padding."""
    rows = model.vocab_padding_rows
    return _mapped(params, model, lambda value, axis: with_zeros(value, rows, axis)) if rows else params


def cut(params: PyTree, model: ModelConfig) -> PyTree:
    """Return the parameters of a model as those of the same model without padding: the inverse of `padded`."""
    if not model.vocab_padding_rows:
        return params
    return _mapped(params, model, lambda value, axis: value[(slice(None),) * axis + (slice(model.vocab_size),)])


def _mapped(params: PyTree, model: ModelConfig, function: Callable[[Any, int], Any]) -> PyTree:
    """Return the parameters with function(value, axis of the vocabulary) in place of each one that has this axis."""
    return jax.tree.map(
        lambda value, axes: function(value, axes.index("vocab")) if "vocab" in axes else value,
        params,
        abstract_model(model).logical_axes,
    )
