"""Recognize the family of a Hugging Face checkpoint, and find the families that can express a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import numpy as np

from t5x_like.config.model import ModelConfig, StackConfig, TaskHeadConfig
from t5x_like.config.objectives import Layout
from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.interop.huggingface import special_tokens
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families import Family, all_families, get_family, model_types
from t5x_like.interop.huggingface.families.family import Present
from t5x_like.interop.weight_files import Weights

_IGNORED = (
    r".*\.(rotary_emb\.inv_freq|position_ids|attn\.bias|attn\.masked_bias"
    r"|EncDecAttention\.relative_attention_bias\.weight)"
)
"""Tensors that older versions stored although they are computed or never read."""


PREFIX_LM = "transformers attends causally to the prefix of a prefix LM, too, and would compute other logits"
ELECTRA_PAIR = "models of transformers hold a generator or a discriminator of ELECTRA, not both as this model does"


@dataclasses.dataclass(frozen=True)
class CheckpointDescription:
    """Model and tensors of a checkpoint directory.

    Attributes:
      family: Family of the checkpoint.
      model: Configuration of the model.
      names: Name in the files of each tensor, by its name in the family's rules.
      unused: Names in the files of tensors that the model does not use.
    """

    family: Family
    model: ModelConfig
    names: dict[str, str]
    unused: tuple[str, ...]


def describe(fields: Fields, weights: Weights, *, scale_logits: bool | None = None) -> CheckpointDescription:
    """Return the model of a checkpoint from its config.json and the names of its tensors.

    Args:
      fields: config.json.
      weights: Tensors of the checkpoint.
      scale_logits: Overrides config.json, or sets what it cannot express; None: no override.

    Raises:
      DataError: the `model_type` is unknown, or a field is wrong or not supported.
    """
    family = get_family(model_type(fields, weights))
    file_names = {
        name: file_name
        for name, file_name in _canonical_names(family, weights).items()
        if not re.fullmatch(_IGNORED, name)
    }
    unused = [file_name for name, file_name in file_names.items() if re.fullmatch(family.unused_pattern, name)]
    names = {name: file_name for name, file_name in file_names.items() if file_name not in unused}
    _require_decoder(family, fields, names, weights)
    table = next((name for name in family.token_tables if name in names), None)
    if table is None:
        raise DataError(f"{weights.directory}: no token table: none of {', '.join(family.token_tables)}")
    masked_lm = family.masked_lm_head in names
    has_lm_head = masked_lm or family.architecture != "encoder"
    if has_lm_head and family.lm_head not in names and not fields.flag("tie_word_embeddings", family.ties_by_default):
        raise DataError(
            f"{weights.directory}: {family.lm_head} is missing, expected {weights[names[table]].shape}: config.json "
            "says tie_word_embeddings false. If the head is the token table, set it to true"
        )
    names[family.token_tables[0]] = table_file_name = names.pop(table)
    for copy in (*family.token_tables[1:], family.lm_head):
        # Tied tables are stored once, or by older versions under all their names.
        if copy in names and _are_equal(weights, names[copy], table_file_name):
            names.pop(copy)
    present = Present(head=family.lm_head in names, masked_lm=masked_lm)
    if family.head_bias_copy is not None:
        names.pop(family.head_bias_copy, None)
    model = _read(family, fields, present)
    if scale_logits is not None:
        model = dataclasses.replace(model, scale_logits=scale_logits)
    return CheckpointDescription(family, model, names, tuple(unused))


def model_of_config(fields: Fields) -> ModelConfig:
    """Return the model that a config.json describes without tensors beside it.

    What only tensors tell follows from `tie_word_embeddings` and from the classes in `architectures`.

    Raises:
      DataError: the `model_type` is unknown, or a field is wrong or not supported.
    """
    classes = [str(name) for name in fields.values.get("architectures") or ()]
    # The encoder of an encoder-decoder has the same `model_type`.
    is_encoder = any(name.endswith("EncoderModel") for name in classes)
    family = get_family(model_type(fields, () if is_encoder else ("decoder.",)))
    tied = fields.flag("tie_word_embeddings", family.ties_by_default)
    masked_lm = any(name.endswith(("MaskedLM", "PreTraining", "CausalLM")) for name in classes)
    return _read(family, fields, Present(head=not tied, masked_lm=masked_lm))


def _read(family: Family, fields: Fields, present: Present) -> ModelConfig:
    """Return the model of a config.json, all of whose fields must be understood."""
    model = special_tokens.read(fields, family.special_tokens, family.read(fields, present))
    # A family may write fields that it does not read back.
    unknown = {name: value for name, value in fields.not_read().items() if name not in family.write(model)}
    if unknown:
        shown = ", ".join(f"{name} {value!r}"[:80] for name, value in unknown.items())
        raise DataError(
            f"{fields.where}: found fields that are not understood and may change what the model computes: {shown}; "
            "expected none. Remove those that do not"
        )
    return model


def _require_decoder(family: Family, fields: Fields, names: Iterable[str], weights: Weights) -> None:
    """Raise DataError for the encoder alone of an encoder-decoder."""
    if family.architecture == "encoder_decoder" and not any(re.match(r"(model\.)?decoder\.", name) for name in names):
        found = ", ".join(map(str, fields.values.get("architectures") or ["an encoder"]))
        raise DataError(
            f"{weights.directory}: found {found}: the encoder of a {family.model_type} alone, without a decoder, "
            "expected both: a separate encoder cannot be imported"
        )


def model_type(fields: Fields, weights: Iterable[str]) -> str:
    """Return the `model_type` of a checkpoint; old files do not state it and are recognized by a tensor.

    Raises:
      DataError: no registered family has this `model_type`.
    """
    found = fields.values.get("model_type")
    if found is None:
        names = set(weights)
        found = next((family.model_type for family in all_families() if family.signature in names), None)
    known = list(dict.fromkeys(family.written_type for family in all_families()))
    if not isinstance(found, str) or found not in known:
        expected = f"one of {', '.join(known)}, or that of a --plugin FILE"
        raise DataError(f"{fields.where}: model_type: found {found!r}, expected {expected}")
    has_decoder = any(name.startswith("decoder.") for name in weights)
    for family in all_families():
        if family.variant_of == found:
            if family.variant_field is None:
                is_variant = not has_decoder
            else:
                name, value = family.variant_field
                stated = fields.values.get(name)
                is_variant = value in stated if isinstance(stated, list) else value == stated
            if is_variant:
                return family.model_type
    return found


def _canonical_names(family: Family, weights: Weights) -> dict[str, str]:
    """Return the name in the files of each tensor by its name in the family's rules, before tables are merged."""
    names: dict[str, str] = {}
    for file_name in weights:
        name = file_name
        for old, new in family.renames:
            name = re.sub(old, new, name)
        if family.prefix and not name.startswith(family.prefix) and not re.match(family.head_pattern, name):
            name = family.prefix + name
        if name in names:
            raise DataError(f"{weights.directory}: {names[name]} and {file_name} are two names of one tensor")
        names[name] = file_name
    return names


def _are_equal(weights: Weights, first: str, second: str) -> bool:
    """Return whether two tensors have the same shape, type and bytes."""
    a, b = weights[first], weights[second]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return bool(np.array_equal(weights.read(first).view(np.uint8), weights.read(second).view(np.uint8)))


def matching_families(model: ModelConfig) -> list[str]:
    """Return the families whose config.json can express everything that this model computes, the plainest first."""
    return [family.model_type for family in all_families() if not differences(model, family)]


def written_model(model: ModelConfig, family: Family) -> ModelConfig:
    """Return the model that a directory of the family describes.

    An embedding head without parameters is no part of it: sentence-transformers keeps it in files of its own.
    """
    alone = _without_embedding_head(model)
    return model if alone is not model and _differences(alone, family) else alone


def _without_embedding_head(model: ModelConfig) -> ModelConfig:
    head = model.task_head
    if head is None or head.kind != "embedding" or head.transform:
        return model
    return dataclasses.replace(model, task_head=None, tie_embeddings=True, lm_head_transform=False, head_bias=False)


def differences(model: ModelConfig, family: Family) -> dict[str, tuple[object, object]]:
    """Return the fields of the model that a config.json of the family cannot express: {field: (model's, family's)}."""
    return _differences(written_model(model, family), family)


def _differences(model: ModelConfig, family: Family) -> dict[str, tuple[object, object]]:
    if model.generator is not None:
        return {"generator": (model.generator, None)}
    if model.architecture != family.architecture:
        return {"architecture": (model.architecture, family.architecture)}
    stack = next(iter(model.stacks.values()))
    if (stack.experts is not None) != family.has_experts:
        return {"experts": (stack.experts, None)}
    present = Present(head=not model.tie_embeddings, masked_lm=model.lm_head_transform)
    try:
        written = {"model_type": family.written_type, **family.write(model)}
        expressed = family.read(Fields(written, "config.json"), present)
    except DataError as error:
        return {"config.json": (str(error), "a configuration that the family can express")}
    expressed = dataclasses.replace(expressed, **{name: getattr(model, name) for name in family.unstated_fields})
    wanted, given = (_flat(_computed(config)) for config in (model, expressed))
    return {
        field: (wanted.get(field), given.get(field))
        for field in {**wanted, **given}
        if not _are_close(wanted.get(field), given.get(field))
    }


def describe_export(model: ModelConfig, layout: Layout) -> str:
    """Return in words which family the model is exported as, or why it cannot be: `layout` is that of its rows."""
    if layout == "prefix_lm":
        return f"no Hugging Face export: {PREFIX_LM}"
    if model.generator is not None:
        return f"no Hugging Face export: {ELECTRA_PAIR}"
    matching = matching_families(model)
    if matching:
        return f"exports to Hugging Face as {matching[0]}"
    same = [family for family in all_families() if family.architecture == model.architecture]
    found = {family.model_type: differences(model, family) for family in same}
    # A family that cannot express the model at all is not near, although only one difference is known.
    nearest = min(found, key=lambda name: (bool(_WHOLE & found[name].keys()), len(found[name])))
    fields = list(found[nearest])
    more = f" and {len(fields) - 4} more" if len(fields) > 4 else ""
    return f"no Hugging Face export: the nearest family, {nearest}, differs in {', '.join(fields[:4])}{more}"


def require_family(model: ModelConfig, name: str | None) -> Family:
    """Return the family to export as: the one of this `model_type`, or the plainest that matches the model.

    Raises:
      DataError: the family is not registered.
      ConfigError: the model does not match; the message lists the differences.
    """
    if model.generator is not None:
        raise ConfigError([ConfigProblem("model.generator", "a generator", "none", ELECTRA_PAIR)])
    if name is None:
        matching = matching_families(model)
        if not matching:
            fix = "to see where the model differs, name the nearest family with --family"
            raise ConfigError(
                [ConfigProblem("model", "no matching Hugging Face family", f"one of {', '.join(model_types())}", fix)]
            )
        return get_family(matching[0])
    family = get_family(name)
    different = differences(model, family)
    if different:
        fix = f"the model_type {name} (--family) cannot express it"
        raise ConfigError(
            [
                ConfigProblem(f"model.{field}", repr(wanted), repr(given), fix)
                for field, (wanted, given) in different.items()
            ]
        )
    return family


# Fields that a config.json may leave open: they do not change the logits of a given batch, or the checkpoint has its
# own values.
_FREE = (
    "pad_vocab_to_multiple_of",
    "pad_token_id",
    "decoder_start_token_id",
    "eos_ids",
    "embedding_stddev",
    "head_init_scale",
    "dtype",
    "attention",
    "scan_layers",
    "remat",
    "discriminator_loss_weight",
)
_WHOLE = {"architecture", "config.json", "experts", "generator"}
"""Differences that leave the other fields uncompared."""
_OF_LM_HEAD = ("tie_embeddings", "scale_logits", "logits_softcap", "lm_head_transform", "head_bias")
"""Fields of the head over the vocabulary, which a task head replaces."""
_FREE_OF_STACK = ("dropout_rate", "dropout_broadcast_length", "output_init_scale", "quantization")
"""The same of a stack. transformers computes the products of `quantization` without rounding."""


def _computed(model: ModelConfig) -> dict[str, object]:
    """Return the fields that decide the logits, in a canonical form."""
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.name not in _FREE}
    if model.task_head is not None:
        values = {name: value for name, value in values.items() if name not in _OF_LM_HEAD}
        values["task_head"] = _computed_by_head(model.task_head)
    if not model.lm_head_transform or model.task_head is not None:
        values.pop("lm_head_activation")
    elif model.lm_head_activation is None:
        values["lm_head_activation"] = next(reversed(model.stacks.values())).mlp_activation
    return values | {
        name: _computed_by(stack, has_encoder=name == "decoder" and model.encoder is not None)
        for name, stack in model.stacks.items()
    }


def _computed_by_head(head: TaskHeadConfig) -> dict[str, object]:
    values: dict[str, object] = {"kind": head.kind, "labels": head.labels, "transform": head.transform}
    if head.pools:
        values["pooling"] = head.pooling
    if head.kind == "embedding":
        values["normalize"] = head.normalize
    return values


def _computed_by(stack: StackConfig, *, has_encoder: bool) -> dict[str, object]:
    """Return the fields of a stack that decide its output; fields that its other fields make irrelevant are left
    out."""
    values: dict[str, object] = {field.name: getattr(stack, field.name) for field in dataclasses.fields(stack)}
    values["layer_pattern"] = kinds = stack.layer_kinds
    without = list(_FREE_OF_STACK)
    if not has_encoder:
        without.append("cross_attention")
    if stack.experts is not None:
        values["experts"] = dataclasses.replace(
            stack.experts,
            router_aux_loss_weight=0.0,
            router_z_loss_weight=0.0,
            bias_update_rate=None if stack.experts.bias_update_rate is None else 0.0,
        )
    if "local" not in kinds:
        without += ["sliding_window", "local_rope_base", "local_rope_scaling"]
    if stack.positions != "rope":
        without += ["rope_base", "rope_scaling", "local_rope_base", "local_rope_scaling"]
    elif "local" in kinds and stack.local_rope_base is None:
        values["local_rope_base"] = stack.rope_base
    if stack.positions not in ("relative_bias", "disentangled"):
        without += ["relative_bias_buckets", "relative_bias_max_distance"]
    if stack.positions != "relative_bias":
        without += ["relative_bias_bidirectional", "relative_bias_per_layer"]
    if stack.positions != "learned":
        without += ["max_positions", "position_offset"]
    if stack.mlp_bias is None:
        values["mlp_bias"] = stack.use_bias
    if stack.attention_scale is None:
        values["attention_scale"] = stack.head_dim**-0.5
    return {name: value for name, value in values.items() if name not in without}


def _flat(values: dict[str, object], where: str = "") -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            fields |= _flat(value, f"{where}{name}.")
        else:
            fields[f"{where}{name}"] = value
    return fields


def _are_close(first: object, second: object) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) <= 1e-9 * abs(first)
    return first == second
