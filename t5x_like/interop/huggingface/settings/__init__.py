"""config.json to ModelConfig and back, by family.

What is read is the file, not what transformers makes of it: version 5 rewrites `tie_word_embeddings` of T5s, for one.
Old and new spellings are read, new ones written.
"""

from __future__ import annotations

from t5x_like.interop.huggingface.settings.common import Present, Values
from t5x_like.interop.huggingface.settings.encoders import (
    read_bert,
    read_deberta,
    read_modernbert,
    write_bert,
    write_deberta,
    write_modernbert,
)
from t5x_like.interop.huggingface.settings.gpt_2 import read_gpt_2, write_gpt_2
from t5x_like.interop.huggingface.settings.rotary import (
    read_gemma_2,
    read_gemma_3,
    read_llama,
    read_mixtral,
    read_t5gemma,
    read_t5gemma_2,
    write_gemma_2,
    write_gemma_3,
    write_llama,
    write_mixtral,
    write_t5gemma,
    write_t5gemma_2,
)
from t5x_like.interop.huggingface.settings.t5 import read_t5, write_t5

__all__ = [
    "Present",
    "Values",
    "read_bert",
    "read_deberta",
    "read_gemma_2",
    "read_gemma_3",
    "read_gpt_2",
    "read_llama",
    "read_mixtral",
    "read_modernbert",
    "read_t5",
    "read_t5gemma",
    "read_t5gemma_2",
    "write_bert",
    "write_deberta",
    "write_gemma_2",
    "write_gemma_3",
    "write_gpt_2",
    "write_llama",
    "write_mixtral",
    "write_modernbert",
    "write_t5",
    "write_t5gemma",
    "write_t5gemma_2",
]
