"""Family of checkpoints: the presets of a model family and its mapping to the Hugging Face format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from t5x_like.config.model import Activation, Architecture, ModelConfig
from t5x_like.interop.huggingface.config_reader import ACTIVATIONS, Fields
from t5x_like.interop.huggingface.weight_map import Rule

Values = dict[str, Any]
"""Fields of a config.json."""
TIED_LM: dict[str, Any] = {"tie_embeddings": True, "embedding_stddev": 0.02}


@dataclasses.dataclass(frozen=True)
class Present:
    """Facts about a model that the tensors tell and config.json does not.

    Attributes:
      head: There is a separate head over the vocabulary, whose values differ from the token table.
      masked_lm: An encoder has the layers of a masked-LM head.
    """

    head: bool = False
    masked_lm: bool = True


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens that transformers assumes if config.json does not give them."""

    pad: int | None
    start: int
    eos: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Model family: its presets, and how its checkpoints map to the one model. `register_family` registers it.

    Attributes:
      model_type: `model_type` of its config.json, which names the family.
      presets: Functions that return a `ModelConfig` of the family.
      rules: Mapping of tensor names to parameters.
      read: Converts config.json to the model's configuration.
      write: Converts the model's configuration to fields of config.json, without `model_type`.
      special_tokens: Ids that hold where config.json has none.
      architecture: Stacks of the model.
      token_tables: Name of the token table, followed by other names under which it may be stored.
      lm_head: Name of the head over the vocabulary, if it is not the token table.
      masked_lm_head: Name of a tensor of the layers of a masked-LM head, of families of encoders that may lack it.
      head_bias_copy: Name of a copy of the head's bias that files hold, or None.
      prefix: Beginning of the tensor names that checkpoints without a head leave out.
      head_pattern: Pattern of names that never have that prefix.
      unused_pattern: Pattern of tensors that the model does not use; they are kept for the way back.
      missing_note: Tensors that transformers expects and only an imported model has, in words; "" if there are none.
      renames: (pattern of an older name, present name).
      has_experts: The MLPs are mixtures of experts.
      ties_by_default: Value of `tie_word_embeddings` that transformers assumes if config.json does not state it.
      unstated_fields: Fields of `ModelConfig` that config.json cannot express; any value of theirs fits.
      signature: Name of a tensor that identifies checkpoints whose config.json has no `model_type`, or None.
      variant_of: `model_type` in config.json if it is that of another family, of which this is a variant.
      variant_field: Field of config.json that identifies the variant, with its value or one of its values; None: the
        encoder alone, which is identified by the absence of a decoder.
    """

    model_type: str
    presets: Sequence[Callable[..., ModelConfig]]
    rules: Sequence[Rule]
    read: Callable[[Fields, Present], ModelConfig]
    write: Callable[[ModelConfig], Values]
    special_tokens: SpecialTokens
    architecture: Architecture
    token_tables: tuple[str, ...]
    lm_head: str = "lm_head.weight"
    masked_lm_head: str = ""
    head_bias_copy: str | None = None
    prefix: str = ""
    head_pattern: str = r"lm_head\."
    unused_pattern: str = r"(?!)"
    missing_note: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    has_experts: bool = False
    ties_by_default: bool = True
    unstated_fields: tuple[str, ...] = ()
    signature: str | None = None
    variant_of: str | None = None
    variant_field: tuple[str, str] | None = None

    @property
    def written_type(self) -> str:
        """Return the `model_type` in config.json."""
        return self.variant_of or self.model_type


def activation_name(activation: Activation, *, tanh: str = "gelu_pytorch_tanh") -> str:
    """Return the name of an activation in config.json; `tanh` is the family's name of GELU by tanh."""
    if activation == "gelu_tanh":
        return tanh
    return next(name for name, value in ACTIVATIONS.items() if value == activation)
