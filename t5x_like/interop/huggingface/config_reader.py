"""Typed access to config.json: a field of another type raises an error that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

from t5x_like.config.model import Activation, LayerKind, RopeScalingConfig
from t5x_like.errors import DataError
from t5x_like.utils.json_reader import read_json

ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
KINDS: dict[str, LayerKind] = {"full_attention": "global", "sliding_attention": "local"}
IGNORED = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _sliding_window_pattern
    activation_dropout architectures attention_dropout attention_probs_dropout_prob attn_pdrop auto_map
    bad_words_ids begin_suppress_tokens boi_token_index bos_token_id cache_implementation classif_dropout
    classifier_dropout classifier_dropout_prob classifier_dropout_rate classifier_pooling cls_token_id
    custom_pipelines decoder_layerdrop decoder_start_token_id directionality diversity_penalty do_sample dtype
    early_stopping embd_pdrop embedding_dropout encoder_layerdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty extra_pos_embeddings finetuning_task force_bos_token_to_be_generated
    forced_bos_token_id forced_eos_token_id generator_hidden_size gradient_checkpointing id2label image_token_index
    init_std initializer_cutoff_factor initializer_factor initializer_range is_decoder is_encoder_decoder
    keys_to_ignore_at_inference label2id language length_penalty mask_token_id max_length max_position_embeddings
    max_sequence_length min_length mm_tokens_per_image model_max_length model_parallel model_type n_ctx n_positions
    no_repeat_ngram_size num_beam_groups num_beams num_hidden_layers num_labels num_return_sequences
    output_attentions output_hidden_states output_past output_router_logits output_scores pad_token_id
    pooler_dropout pooler_fc_size pooler_hidden_act pooler_hidden_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values reorder_and_upcast_attn repad_logits_with_grad repetition_penalty return_dict
    return_dict_in_generate router_jitter_noise sep_token_id sparse_pred_ignore_index sparse_prediction
    summary_activation summary_first_dropout summary_last_dropout summary_proj_to_labels summary_type
    summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version type_vocab_size
    typical_p unsloth_version use_bfloat16 use_cache vision_config vocab_size xla_device
    """.split()
)
"""Fields that do not change the outputs of a model without dropout: initialization, dropout, generation, labels, and
ids of special tokens, as well as those that the tensors decide."""
_ROTARY = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "truncate",
)
"""Fields of the scalings of rotary positions."""
MAX_CONFIG_BYTES = 10_000_000
MAX_NUMBERED = 1024
"""Largest number of layers or experts: their tensor names are listed before any tensor is read."""


class _Recorded(dict[str, Any]):
    """Dictionary that records the keys that were looked up."""

    def __init__(self, values: Mapping[str, Any], used: set[str]):
        super().__init__(values)
        self.used = used

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.used.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        return super().get(name, default)


class Fields:
    """JSON object with the name of its origin for error messages; it records which fields were read."""

    def __init__(self, values: Mapping[str, Any], where: str, used: set[str] | None = None):
        self.values = _Recorded(values, set() if used is None else used)
        self.where = where
        self._parts: dict[str, Fields] = {}

    def with_value(self, name: str, value: Any) -> Fields:
        """Return these fields with another value of one of them."""
        self.values.get(name)
        return Fields({**self.values, name: value}, self.where, self.values.used)

    def unused(self, *names: str) -> None:
        """Note fields that the model's family does not need, because others decide the same."""
        self.values.used.update(names)

    def not_read(self) -> dict[str, Any]:
        """Return the fields that no one has read, at all depths of the objects that were read, and that are set."""
        fields = {
            name: value
            for name, value in self.values.items()
            if name not in self.values.used and name not in IGNORED and value not in (None, False, 0, "", [], {})
        }
        for name, part in self._parts.items():
            fields |= {f"{name}.{inner}": value for inner, value in part.not_read().items()}
        return fields

    @classmethod
    def read(cls, path: Path) -> Fields:
        """Return the object in a file.

        Raises:
          DataError: the file cannot be read, is too large or is not a JSON object.
        """
        try:
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise DataError(f"{path}: {path.stat().st_size} bytes, expected {MAX_CONFIG_BYTES} at most")
            values = read_json(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}: a JSON {type(values).__name__}, expected an object")
        return cls(values, str(path))

    def wrong(self, name: str, expected: str) -> DataError:
        """Return the error of a field with a wrong value."""
        return DataError(f"{self.where}: {name}: found {self.values.get(name)!r}, expected {expected}")

    def has(self, name: str) -> bool:
        """Return whether the field exists and is not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, most: int = 2**31 - 1) -> int:
        """Return a natural number of at most `most`, or the default if the field is missing."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 <= value <= most:
            raise self.wrong(name, f"a natural number, {most} at most")
        return value

    def numbered(self, name: str, default: int | None = None) -> int:
        """Return a number of layers or experts."""
        return self.integer(name, default, most=MAX_NUMBERED)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number, or the default if the field is missing."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number")
        return float(value)

    def inverse_root(self, name: str, default: float) -> float:
        """Return 1 / sqrt of a positive number."""
        value = self.number(name, default)
        if not value > 0:
            raise self.wrong(name, "a positive number")
        return value**-0.5

    def optional(self, name: str, default: float | None = None) -> float | None:
        """Return a number, None if the field is null, or the default if it is missing."""
        return default if name not in self.values else self.number(name) if self.has(name) else None

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean, or the default if the field is missing."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def activation(self, name: str, default: str) -> Activation:
        """Return an activation; `default` is a name of config.json."""
        value = self.values.get(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.wrong(name, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def only(self, name: str, expected: Any, default: Any = ...) -> None:
        """Check a field that supports one value only.

        Args:
          name: Name of the field.
          expected: Supported value.
          default: Value that a missing field stands for; by default the supported one.
        """
        value = self.values.get(name, expected if default is ... else default)
        if value != expected:
            raise DataError(f"{self.where}: {name}: found {value!r}, expected {expected!r}: nothing else is supported")

    def part(self, name: str) -> Fields:
        """Return an object inside this one."""
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return self._parts.setdefault(name, Fields(value, f"{self.where}: {name}"))

    def layer_kinds(self, num_layers: int, *, full_every: int, first_full: int) -> tuple[LayerKind, ...]:
        """Return the kinds of layers as the shortest pattern that repeats to all of them.

        Args:
          num_layers: Number of layers.
          full_every: If `layer_types` is missing, one of every `full_every` layers has full attention.
          first_full: Index of the first of these.
        """
        types = self.values.get("layer_types")
        if types is None:
            full = [number % full_every == first_full for number in range(num_layers)]
            types = ["full_attention" if is_full else "sliding_attention" for is_full in full]
        if (
            not isinstance(types, list)
            or len(types) != num_layers
            or not all(isinstance(kind, str) and kind in KINDS for kind in types)
        ):
            raise self.wrong("layer_types", f"{num_layers} of {', '.join(KINDS)}")
        kinds = [KINDS[kind] for kind in types]
        for period in range(1, num_layers):
            if all(kinds[n] == kinds[n % period] for n in range(num_layers)):
                return tuple(kinds[:period])
        return tuple(kinds)

    def rope(self, theta: float, *, kind: str | None = None) -> tuple[float, RopeScalingConfig | None]:
        """Return the rotary base and scaling.

        Args:
          theta: Base if the file has none.
          kind: Kind of layers, for files in which each kind has its own base; None: one base for all layers.
        """
        if isinstance(self.values.get("rope_parameters"), dict):
            values = self.part("rope_parameters")
            if kind is not None and isinstance(values.values.get(kind), dict):
                return values.part(kind)._rope(theta, self)
            if "full_attention" not in values.values:
                return values._rope(theta, self)
        if self.has("rope_parameters"):
            raise self.wrong("rope_parameters", "rotary parameters")
        base = self.number("rope_theta", theta)
        if not self.has("rope_scaling") or kind == "sliding_attention":
            return base, None
        return base, self.part("rope_scaling")._rope(base, self)[1]

    def _rope(self, theta: float, model: Fields) -> tuple[float, RopeScalingConfig | None]:
        """Return base and scaling from an object of rotary parameters; `model` has the fields around it."""
        base = self.number("rope_theta", theta)
        self.only("partial_rotary_factor", 1.0)
        self.unused(*_ROTARY)  # transformers ignores those that the type does not need.
        match self.values.get("rope_type", self.values.get("type", "default")):
            case "default":
                return base, None
            case "linear":
                return base, RopeScalingConfig(kind="linear", factor=self.number("factor"))
            case "llama3":
                return base, RopeScalingConfig(
                    kind="llama3",
                    factor=self.number("factor"),
                    low_frequency_factor=self.number("low_freq_factor"),
                    high_frequency_factor=self.number("high_freq_factor"),
                    original_max_positions=self._original_positions(model),
                )
            case "yarn":
                return base, self._yarn(model)
            case "dynamic":
                # transformers takes the length of the original training from the model, not from these parameters.
                return base, RopeScalingConfig(
                    kind="dynamic",
                    factor=self.number("factor"),
                    original_max_positions=model.integer("max_position_embeddings"),
                )
        raise self.wrong("rope_type", "default, linear, llama3, yarn or dynamic")

    def _original_positions(self, model: Fields) -> int:
        field = "original_max_position_embeddings"
        return self.integer(field) if self.has(field) else model.integer("max_position_embeddings")

    def _yarn(self, model: Fields) -> RopeScalingConfig:
        original = self._original_positions(model)
        factor = self.number("factor") if self.has("factor") else model.integer("max_position_embeddings") / original

        def growth(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        weight, weight_of_all = self.number("mscale", 0.0), self.number("mscale_all_dim", 0.0)
        attention_factor = growth(1.0) if not (weight and weight_of_all) else growth(weight) / growth(weight_of_all)
        return RopeScalingConfig(
            kind="yarn",
            factor=factor,
            low_frequency_factor=self.number("beta_slow", 1.0) or 1.0,
            high_frequency_factor=self.number("beta_fast", 32.0) or 32.0,
            original_max_positions=original,
            attention_factor=self.number("attention_factor", attention_factor),
            truncate=self.flag("truncate", True),
        )


def write_rope(base: float, scaling: RopeScalingConfig | None) -> dict[str, Any]:
    """Return rotary base and scaling as an object of config.json."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": base}
    values = {"rope_type": scaling.kind, "rope_theta": base, "factor": scaling.factor}
    match scaling.kind:
        case "linear" | "dynamic":
            pass
        case "llama3":
            values |= {
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
        case "yarn":
            values |= {
                "beta_slow": scaling.low_frequency_factor,
                "beta_fast": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
                "attention_factor": scaling.attention_factor,
                "truncate": scaling.truncate,
            }
        case unknown:
            assert_never(unknown)
    return values


def write_original_positions(*scalings: RopeScalingConfig | None) -> dict[str, Any]:
    """Return the field of config.json from which dynamic scaling takes the length of the original training."""
    lengths = [scaling.original_max_positions for scaling in scalings if scaling and scaling.kind == "dynamic"]
    return {"max_position_embeddings": lengths[0]} if lengths else {}


def write_layer_types(kinds: tuple[LayerKind, ...]) -> list[str]:
    """Return the kinds of layers in the words of config.json."""
    names = {kind: name for name, kind in KINDS.items()}
    return [names[kind] for kind in kinds]
