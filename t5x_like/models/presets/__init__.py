"""Presets: published model families as configurations of the one model.

No other module of the package branches on the name of a family. Each preset except `ltg_bert` and `gpt_bert` belongs to
a family that `interop.huggingface.families` registers.
"""

from t5x_like.models.presets.bart import bart, mbart
from t5x_like.models.presets.decoders import decoder_1b, gpt_2, llama_3, mistral_7b, mixtral_8x7b, qwen_2_5, qwen_3
from t5x_like.models.presets.encoders import (
    DISCRIMINATOR_STATES,
    ElectraSize,
    bert,
    bert_base,
    deberta_v3,
    electra,
    electra_encoder,
    eurobert,
    modernbert,
    modernbert_decoder,
    neobert,
    roberta,
    xlm_roberta,
)
from t5x_like.models.presets.gemma import gemma_1, gemma_2, gemma_3, t5gemma, t5gemma_2
from t5x_like.models.presets.ltg import gpt_bert, ltg_bert
from t5x_like.models.presets.smoke import SmokeModel, smoke
from t5x_like.models.presets.t5 import (
    T5_VOCABULARY,
    T5Size,
    byt5,
    long_t5,
    mt5,
    mt5_base,
    switch,
    t5_1_0,
    t5_1_1,
    t5_encoder,
    ul2_20b,
    umt5,
)

__all__ = [
    "DISCRIMINATOR_STATES",
    "ElectraSize",
    "SmokeModel",
    "T5Size",
    "T5_VOCABULARY",
    "bart",
    "bert",
    "bert_base",
    "deberta_v3",
    "byt5",
    "decoder_1b",
    "electra",
    "electra_encoder",
    "eurobert",
    "gemma_1",
    "gemma_2",
    "gemma_3",
    "gpt_2",
    "gpt_bert",
    "llama_3",
    "long_t5",
    "ltg_bert",
    "mbart",
    "mistral_7b",
    "mixtral_8x7b",
    "modernbert",
    "modernbert_decoder",
    "mt5",
    "mt5_base",
    "neobert",
    "qwen_2_5",
    "qwen_3",
    "roberta",
    "smoke",
    "switch",
    "t5_1_0",
    "t5_1_1",
    "t5_encoder",
    "t5gemma",
    "t5gemma_2",
    "ul2_20b",
    "umt5",
    "xlm_roberta",
]
