"""Small runs of every model family for the tests of planning, wide enough that matrix products dominate."""

from __future__ import annotations

import dataclasses
from typing import Any

from t5x_like.config import (
    CausalLM,
    DataConfig,
    MaskedLM,
    ModelConfig,
    MoEConfig,
    PrefixLM,
    RunConfig,
    SpanCorruption,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.models import presets

FAMILIES = {
    "t5_1_1": lambda: presets.t5_1_1("base"),
    "t5_1_0": lambda: presets.t5_1_0("base"),
    "umt5": lambda: presets.umt5("small"),
    "t5gemma": lambda: presets.t5gemma("2b-2b"),
    "llama_3": lambda: presets.llama_3("1b"),
    "gemma_2": lambda: presets.gemma_2("2b"),
    "gemma_3": lambda: presets.gemma_3("1b"),
    "mixtral": presets.mixtral_8x7b,
    "bert": lambda: presets.bert("base"),
    "modernbert": lambda: presets.modernbert("base"),
}
OBJECTIVES: dict[str, Any] = {
    "encoder_decoder": ("encoder_decoder", SpanCorruption(name="r", mean_noise_span_length=3.0)),
    "decoder": ("causal_lm", CausalLM()),
    "prefix_lm": ("prefix_lm", PrefixLM(name="s")),
    "encoder": ("encoder", MaskedLM()),
}


def small_run(
    family: str, *, width: int = 64, rows: int = 8, length: int = 64, layers: int = 2, **model: Any
) -> RunConfig:
    """Return a run of a family at `width` with `rows` x `length` token positions (per stack of an encoder-decoder)."""
    config = shrunk(FAMILIES[family](), width, layers)
    config = dataclasses.replace(config, **model)
    layout, objective = OBJECTIVES[config.architecture]
    alone = config.architecture != "encoder_decoder"
    return RunConfig(
        name=family,
        model=config,
        data=DataConfig(
            tokenizer=TokenizerConfig(vocab_size=400, num_sentinels=40),
            layout=layout,
            mixture=(objective,),
            inputs_length=length if layout == "encoder" or not alone else length // 2,
            targets_length=0 if layout == "encoder" else length // 2 if alone else length,
        ),
        training=TrainingConfig(num_train_steps=10, global_batch_size=rows),
    )


def shrunk(config: ModelConfig, width: int, layers: int) -> ModelConfig:
    def stack(of: StackConfig | None) -> StackConfig | None:
        if of is None:
            return None
        experts = None if of.experts is None else MoEConfig(num_experts=4)
        heads = max(width // 32, 2)
        return dataclasses.replace(
            of,
            num_layers=max(layers, len(of.layer_pattern)),
            d_model=width,
            num_heads=heads,
            num_kv_heads=heads if of.num_kv_heads == of.num_heads else heads // 2,
            head_dim=32,
            d_ff=4 * width,
            experts=experts,
            sliding_window=None if of.sliding_window is None else (16, min(16, of.sliding_window[1])),
        )

    return dataclasses.replace(
        config,
        encoder=stack(config.encoder),
        decoder=stack(config.decoder),
        vocab_size=512,
        eos_ids=(1,),
        unscaled_embedding_token_id=None,
    )
