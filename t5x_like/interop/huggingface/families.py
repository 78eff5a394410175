"""The families that files come in, by the `model_type` of their config.json."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from t5x_like.config.errors import DataError, RefusedError
from t5x_like.config.model import Architecture, ModelConfig, StackConfig
from t5x_like.interop.huggingface import names, settings, special_ids
from t5x_like.interop.huggingface.fields import Fields
from t5x_like.interop.huggingface.names import Rule
from t5x_like.interop.huggingface.settings import Present, Values
from t5x_like.interop.weights import Weights


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
      rules: Names of its tensors.
      read, write: config.json to the model's configuration and back (without `model_type`).
      prefix: What files of the model without its head leave out in front of the names.
      heads: Names that never have that prefix.
      architecture: Which stacks there are.
      left_out: Tensors that the model has no place for; they are kept aside for the way back.
      never_made: What transformers asks for and only an imported model can have, in words.
      renamed: Older names, and newer ones for them.
      table: The token table, and other names for it where it is missing.
      head: The head over the vocabulary, where it is not the token table.
    """

    rules: Sequence[Rule]
    read: Callable[[Fields, Present], ModelConfig]
    write: Callable[[ModelConfig, str], Values]
    table: tuple[str, ...]
    architecture: Architecture = "decoder"
    head: str = "lm_head.weight"
    prefix: str = ""
    heads: str = r"lm_head\."
    left_out: str = r"(?!)"
    never_made: str = ""
    renamed: tuple[tuple[str, str], ...] = ()


_T5 = Family(
    names.T5,
    settings.read_t5,
    settings.write_t5,
    table=("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    architecture="encoder_decoder",
)
_DECODER_TABLE = ("model.embed_tokens.weight",)
_LAYER_NORMS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
_DEAD = (
    r".*\.(rotary_emb\.inv_freq|position_ids|attn\.bias|attn\.masked_bias"
    r"|EncDecAttention\.relative_attention_bias\.weight)"
)
"""What older versions stored though it is computed, or read by nobody."""

FAMILIES: dict[str, Family] = {
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "llama": Family(names.LLAMA, settings.read_llama, settings.write_llama, table=_DECODER_TABLE, prefix="model."),
    "mixtral": Family(
        names.MIXTRAL, settings.read_mixtral, settings.write_mixtral, table=_DECODER_TABLE, prefix="model."
    ),
    "gemma2": Family(names.GEMMA, settings.read_gemma_2, settings.write_gemma_2, table=_DECODER_TABLE, prefix="model."),
    "gemma3_text": Family(
        names.GEMMA, settings.read_gemma_3, settings.write_gemma_3, table=_DECODER_TABLE, prefix="model."
    ),
    "t5gemma": Family(
        names.T5GEMMA,
        settings.read_t5gemma,
        settings.write_t5gemma,
        table=("model.decoder.embed_tokens.weight",),
        architecture="encoder_decoder",
        head="lm_head.out_proj.weight",
    ),
    "t5gemma2": Family(
        names.T5GEMMA_2,
        settings.read_t5gemma_2,
        settings.write_t5gemma_2,
        table=("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
        architecture="encoder_decoder",
        head="lm_head.out_proj.weight",
        left_out=r"model\.encoder\.(vision_tower|multi_modal_projector)\..*",
        never_made="a vision tower, which transformers will report as missing: it knows no text-only T5Gemma 2",
    ),
    "gpt2": Family(
        names.GPT_2,
        settings.read_gpt_2,
        settings.write_gpt_2,
        table=("transformer.wte.weight",),
        prefix="transformer.",
    ),
    "bert": Family(
        names.BERT,
        settings.read_bert,
        settings.write_bert,
        table=("bert.embeddings.word_embeddings.weight",),
        architecture="encoder",
        head="cls.predictions.decoder.weight",
        prefix="bert.",
        heads=r"(cls|classifier)\.",
        left_out=r"bert\.pooler\..*|cls\.seq_relationship\..*",
        renamed=_LAYER_NORMS,
    ),
    "deberta-v2": Family(
        names.DEBERTA,
        settings.read_deberta,
        settings.write_deberta,
        table=("deberta.embeddings.word_embeddings.weight",),
        architecture="encoder",
        head="cls.predictions.decoder.weight",
        prefix="deberta.",
        heads=r"(cls|classifier|pooler|lm_predictions|mask_predictions)\.",
        left_out=r"(lm_predictions|mask_predictions)\..*",
        renamed=_LAYER_NORMS,
    ),
    "modernbert": Family(
        names.MODERNBERT,
        settings.read_modernbert,
        settings.write_modernbert,
        table=("model.embeddings.tok_embeddings.weight",),
        architecture="encoder",
        head="decoder.weight",
        prefix="model.",
        heads=r"(head|decoder|classifier)\.",
    ),
}
"""By `model_type`."""


@dataclasses.dataclass(frozen=True)
class Described:
    """What a directory holds.

    Attributes:
      names: The name in the files of each tensor by its name in the family's rules.
      left_out: Names in the files of what the model has no place for.
    """

    kind: str
    model: ModelConfig
    names: dict[str, str]
    left_out: tuple[str, ...]


def describe(fields: Fields, weights: Weights, *, scale_logits: bool | None = None) -> Described:
    """Reads config.json beside the names of the tensors.

    Args:
      scale_logits: Overrules what config.json says or cannot say.

    Raises:
      DataError: an unknown `model_type`, or a field that is wrong or not supported.
    """
    kind = model_type(fields, weights)
    family = FAMILIES[kind]
    found = {
        name: theirs for name, theirs in _canonical_names(family, weights).items() if not re.fullmatch(_DEAD, name)
    }
    left_out = [theirs for name, theirs in found.items() if re.fullmatch(family.left_out, name)]
    names_kept = {name: theirs for name, theirs in found.items() if theirs not in left_out}
    table = next((name for name in family.table if name in names_kept), None)
    if table is None:
        raise DataError(f"{weights.directory}: no token table: none of {', '.join(family.table)}")
    names_kept[family.table[0]] = theirs = names_kept.pop(table)
    for copy in (*family.table[1:], family.head):
        # Tied tables are stored once, or by older versions under all their names.
        if copy in names_kept and _same(weights, names_kept[copy], theirs):
            names_kept.pop(copy)
    masked_lm = any(name.startswith(("cls.predictions.", "head.dense.")) for name in names_kept)
    present = Present(head=family.head in names_kept, masked_lm=masked_lm)
    names_kept.pop("cls.predictions.decoder.bias", None)  # A copy of cls.predictions.bias.
    model = special_ids.read(fields, kind, family.read(fields, present))
    if scale_logits is not None:
        model = dataclasses.replace(model, scale_logits=scale_logits)
    return Described(kind, model, names_kept, tuple(left_out))


def model_type(fields: Fields, weights: Iterable[str]) -> str:
    """The family; old umT5 files do not name it."""
    kind = fields.values.get("model_type")
    if kind is None and "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in set(weights):
        kind = fields.values["model_type"] = "umt5"
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise DataError(f"{fields.where}: model_type: found {kind!r}, expected one of {', '.join(FAMILIES)}")
    return kind


def _canonical_names(family: Family, weights: Weights) -> dict[str, str]:
    found: dict[str, str] = {}
    for theirs in weights:
        name = theirs
        for old, new in family.renamed:
            name = re.sub(old, new, name)
        if family.prefix and not name.startswith(family.prefix) and not re.match(family.heads, name):
            name = family.prefix + name
        if name in found:
            raise DataError(f"{weights.directory}: {found[name]} and {theirs} are two names of one tensor")
        found[name] = theirs
    return found


def _same(weights: Weights, one: str, other: str) -> bool:
    a, b = weights[one], weights[other]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return bool(np.array_equal(weights.read(one).view(np.uint8), weights.read(other).view(np.uint8)))


def kinds_for(model: ModelConfig) -> list[str]:
    """The families whose config.json can say all that decides what this model computes, the plainest first."""
    return [kind for kind in FAMILIES if not differences(model, kind)]


def differences(model: ModelConfig, kind: str) -> dict[str, tuple[object, object]]:
    """Fields in which the model is not what a config.json of this family can say: {field: (model's, family's)}."""
    family = FAMILIES[kind]
    if model.generator is not None:
        return {"generator": (model.generator, None)}
    if model.architecture != family.architecture:
        return {"architecture": (model.architecture, family.architecture)}
    stack = next(iter(model.stacks.values()))
    if (stack.experts is not None) != (kind == "mixtral"):
        return {"experts": (stack.experts, None)}
    present = Present(head=not model.tie_embeddings, masked_lm=model.head_transform)
    try:
        said = family.read(Fields({"model_type": kind, **family.write(model, kind)}, "config.json"), present)
    except DataError as error:
        return {"config.json": (str(error), "something that can be said")}
    if kind == "umt5":
        said = dataclasses.replace(said, scale_logits=model.scale_logits)
    ours, theirs = (_flat(_computed(each)) for each in (model, said))
    return {
        field: (ours.get(field), theirs.get(field))
        for field in {**ours, **theirs}
        if not _alike(ours.get(field), theirs.get(field))
    }


def require(model: ModelConfig, kind: str | None) -> str:
    """The family to write, `kind` or the plainest that fits.

    Raises:
      RefusedError: it does not fit; the message says in what.
    """
    if kind is None:
        fitting = kinds_for(model)
        if not fitting:
            raise RefusedError(
                f"no family of Hugging Face is this model ({', '.join(FAMILIES)}): name the nearest, to be told where "
                "it differs"
            )
        return fitting[0]
    if kind not in FAMILIES:
        raise DataError(f"family {kind!r}, expected one of {', '.join(FAMILIES)}")
    different = differences(model, kind)
    if different:
        lines = "".join(
            f"\n  {field}: {ours!r} in the model, {theirs!r} in {kind}" for field, (ours, theirs) in different.items()
        )
        raise RefusedError(f"the model is no {kind}:{lines}")
    return kind


_FREE = (
    "pad_id",
    "start_id",
    "eos_ids",
    "embedding_stddev",
    "dtype",
    "attention",
    "scan_layers",
    "remat",
    "discriminator_loss_weight",
)
_FREE_OF_STACKS = ("dropout_rate", "dropout_broadcast_length")


def _computed(model: ModelConfig) -> dict[str, object]:
    """What decides the logits, said in one way."""
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.name not in _FREE}
    return values | {
        name: _computed_by(stack, beside=name == "decoder" and model.encoder is not None)
        for name, stack in model.stacks.items()
    }


def _computed_by(stack: StackConfig, *, beside: bool) -> dict[str, object]:
    values: dict[str, object] = {field.name: getattr(stack, field.name) for field in dataclasses.fields(stack)}
    values["layer_pattern"] = kinds = stack.layer_kinds
    without = list(_FREE_OF_STACKS)
    if not beside:
        without.append("cross_attention")
    if stack.experts is not None:
        values["experts"] = dataclasses.replace(stack.experts, capacity_factor=None, load_balancing=0.0)
    if "local" not in kinds:
        without += ["window", "local_rope_base"]
    if stack.positions != "rope":
        without += ["rope_base", "rope_scaling", "local_rope_base"]
    elif "local" in kinds and stack.local_rope_base is None:
        values["local_rope_base"] = stack.rope_base
    if stack.positions not in ("relative_bias", "disentangled"):
        without += ["relative_bias_buckets", "relative_bias_max_distance"]
    if stack.positions != "relative_bias":
        without += ["relative_bias_bidirectional", "relative_bias_per_layer"]
    if stack.positions != "learned":
        without.append("max_positions")
    if stack.attention_scale is None:
        values["attention_scale"] = stack.head_dim**-0.5
    return {name: value for name, value in values.items() if name not in without}


def _flat(values: dict[str, object], where: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{where}{name}.")
        else:
            found[f"{where}{name}"] = value
    return found


def _alike(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-9 * abs(one)
    return one == other
