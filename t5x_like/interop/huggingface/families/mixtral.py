"""Mixtral: Llama with a mixture of experts."""

from __future__ import annotations

from t5x_like.config.model import ModelConfig, MoEConfig
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.family import Family, Present, Values
from t5x_like.interop.huggingface.families.llama import RULES as LLAMA_RULES
from t5x_like.interop.huggingface.families.llama import TOKENS, write_llama
from t5x_like.interop.huggingface.families.rotary_stack import read_rotary_stack
from t5x_like.interop.huggingface.weight_map import Rule
from t5x_like.models import presets

_MLP = "model.layers.{layer}.block_sparse_moe"
_RULES = [
    *LLAMA_RULES,
    Rule(f"{_MLP}.gate.weight", ("decoder/layers/mlp/router/kernel",), "out_in"),
    *(
        Rule(f"{_MLP}.experts.{{expert}}.{name}.weight", (f"decoder/layers/mlp/{part}/kernel",), "out_in")
        for name, part in {"w1": "wi_0", "w3": "wi_1", "w2": "wo"}.items()
    ),
]
# The rules of a dense MLP have the same parameter paths as those of the experts.
_RULES = [rule for rule in _RULES if ".mlp." not in rule.tensor]


def read_mixtral(fields: Fields, present: Present) -> ModelConfig:
    base, scaling = fields.rope(1_000_000.0)
    fields.only("sliding_window", None)
    experts = MoEConfig(
        num_experts=fields.numbered("num_local_experts", 8),
        experts_per_token=fields.integer("num_experts_per_tok", 2),
        router_aux_loss_weight=fields.number("router_aux_loss_coef", 0.001),
    )
    stack = read_rotary_stack(
        fields,
        activation="hidden_act",
        default="silu",
        epsilon=1e-5,
        rope_base=base,
        rope_scaling=scaling,
        experts=experts,
    )
    return ModelConfig(
        encoder=None,
        decoder=stack,
        vocab_size=fields.integer("vocab_size"),
        tie_embeddings=not present.head,
        embedding_stddev=0.02,
    )


def write_mixtral(model: ModelConfig) -> Values:
    stack = model.decoder
    assert stack is not None and stack.experts is not None
    return {
        **write_llama(model),
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": stack.experts.num_experts,
        "num_experts_per_tok": stack.experts.experts_per_token,
        "router_aux_loss_coef": stack.experts.router_aux_loss_weight,
        "sliding_window": None,
    }


MIXTRAL = Family(
    model_type="mixtral",
    presets=(presets.mixtral_8x7b,),
    rules=_RULES,
    read=read_mixtral,
    write=write_mixtral,
    special_tokens=TOKENS,
    architecture="decoder",
    token_tables=("model.embed_tokens.weight",),
    prefix="model.",
    has_experts=True,
    ties_by_default=False,
)
