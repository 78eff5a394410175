"""Registry of model families: each has one module with its presets and its mapping to Hugging Face checkpoints.

A family of the package is a module here and an entry of `_BUILT_IN`; a family outside it calls `register_family`.
"""

from __future__ import annotations

import functools

from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.interop.huggingface.families.bart import BART, MBART
from t5x_like.interop.huggingface.families.bert import BERT
from t5x_like.interop.huggingface.families.deberta import DEBERTA
from t5x_like.interop.huggingface.families.electra import ELECTRA
from t5x_like.interop.huggingface.families.eurobert import EUROBERT
from t5x_like.interop.huggingface.families.family import Family
from t5x_like.interop.huggingface.families.gemma import GEMMA_1, GEMMA_2, GEMMA_3
from t5x_like.interop.huggingface.families.gpt2 import GPT_2
from t5x_like.interop.huggingface.families.llama import LLAMA
from t5x_like.interop.huggingface.families.longt5 import LONG_T5, LONG_T5_GLOBAL
from t5x_like.interop.huggingface.families.mistral import MISTRAL
from t5x_like.interop.huggingface.families.mixtral import MIXTRAL
from t5x_like.interop.huggingface.families.modernbert import MODERNBERT, MODERNBERT_DECODER
from t5x_like.interop.huggingface.families.neobert import NEOBERT
from t5x_like.interop.huggingface.families.qwen import QWEN_2, QWEN_3
from t5x_like.interop.huggingface.families.roberta import ROBERTA, XLM_ROBERTA
from t5x_like.interop.huggingface.families.switch import SWITCH
from t5x_like.interop.huggingface.families.t5 import MT5, MT5_ENCODER, T5, T5_ENCODER, UMT5, UMT5_ENCODER
from t5x_like.interop.huggingface.families.t5gemma import T5GEMMA, T5GEMMA_2
from t5x_like.interop.huggingface.families.task_heads import TASK_HEADS
from t5x_like.utils.name_registry import Registry

__all__ = ["Family", "all_families", "get_family", "model_types", "register_family"]

_FAMILIES: Registry[Family] = Registry("model family")
_REQUIRED = ("model_type", "presets", "rules", "read", "write", "special_tokens", "architecture", "token_tables")
# The plainest first: a model that fits several families is exported as the first of them.
_BUILT_IN = (
    T5,
    MT5,
    UMT5,
    T5_ENCODER,
    MT5_ENCODER,
    UMT5_ENCODER,
    LONG_T5,
    LONG_T5_GLOBAL,
    SWITCH,
    LLAMA,
    MISTRAL,
    QWEN_2,
    QWEN_3,
    MIXTRAL,
    GEMMA_1,
    GEMMA_2,
    GEMMA_3,
    T5GEMMA,
    T5GEMMA_2,
    GPT_2,
    BART,
    MBART,
    BERT,
    ROBERTA,
    XLM_ROBERTA,
    ELECTRA,
    DEBERTA,
    MODERNBERT,
    MODERNBERT_DECODER,
    EUROBERT,
    NEOBERT,
    *TASK_HEADS,
)


def register_family(family: Family) -> None:
    """Make a family available to imports and exports of Hugging Face checkpoints, under its `model_type`.

    Raises:
      ConfigError: the family lacks a part, which the message names, or its `model_type` is registered already.
    """
    lacking = [name for name in _REQUIRED if not getattr(family, name, None)]
    if lacking:
        where = f"registration of the model family {getattr(family, 'model_type', '')!r}"
        raise ConfigError([ConfigProblem(where, f"no {', '.join(lacking)}", "a family with all parts")])
    # The function that writes config.json identifies the family: all families are instances of one class.
    writer = family.write.func if isinstance(family.write, functools.partial) else family.write
    _FAMILIES.register(family.model_type, family, defined_by=writer)


def model_types() -> tuple[str, ...]:
    """Return the `model_type` of each registered family, the plainest first."""
    return tuple(_FAMILIES)


def all_families() -> tuple[Family, ...]:
    """Return the registered families, the plainest first."""
    return tuple(_FAMILIES.values())


def get_family(model_type: str) -> Family:
    """Return the family of a `model_type`.

    Raises:
      DataError: no such family is registered; the message lists the names.
    """
    if model_type not in _FAMILIES:
        raise DataError(f"model family {model_type!r}, expected one of {', '.join(_FAMILIES)}")
    return _FAMILIES[model_type]


for _family in _BUILT_IN:
    register_family(_family)
