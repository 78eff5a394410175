"""Encoders with a task head in place of the masked-LM head: classification of texts or tokens, and regression.

Each is a variant of its encoder's family, recognized by the class that config.json names.
"""

from __future__ import annotations

import dataclasses

from t5x_like.config.model import HeadKind, ModelConfig, TaskHeadConfig
from t5x_like.errors import DataError
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.bert import BERT
from t5x_like.interop.huggingface.families.deberta import DEBERTA
from t5x_like.interop.huggingface.families.electra import ELECTRA
from t5x_like.interop.huggingface.families.family import Family, Present, Values
from t5x_like.interop.huggingface.families.roberta import ROBERTA, XLM_ROBERTA
from t5x_like.interop.huggingface.weight_map import dense_rules

_DEFAULT_LABELS = ("LABEL_0", "LABEL_1")
"""Labels that transformers assumes if config.json names none; the first is also that of a regression."""


def _variant(base: Family, architecture: str, kind: HeadKind, *, out: str, transform: str | None = None) -> Family:
    """Return the variant of a family with a task head.

    Args:
      base: Family of the encoder.
      architecture: Class in transformers, without "For...".
      kind: classification, which with a single label is regression, or token_classification.
      out: Name of the output layer.
      transform: Name of the dense layer before it, which ends in tanh; it reads the state of the first token.
    """
    task = "Sequence" if kind == "classification" else "Token"
    name = f"{architecture}For{task}Classification"
    rules = [rule for rule in base.rules if not any(path.startswith("head/") for path in rule.paths)]
    rules += dense_rules(out, "head/out")
    if transform is not None:
        rules += dense_rules(transform, "head/transform")

    def read(fields: Fields, present: Present) -> ModelConfig:
        model = base.read(fields, Present(masked_lm=False))
        names = fields.values.get("id2label") or {}
        if not isinstance(names, dict):
            raise fields.wrong("id2label", "an object of labels by number")
        labels = tuple(str(names.get(str(number))) for number in range(len(names))) or _DEFAULT_LABELS
        is_number = kind == "classification" and len(labels) == 1
        head = TaskHeadConfig(
            kind="regression" if is_number else kind,
            labels=() if is_number else labels,
            pooling="cls",
            transform=transform is not None,
            dropout_rate=fields.number("classifier_dropout", fields.number("hidden_dropout_prob", 0.1)),
        )
        return dataclasses.replace(model, task_head=head)

    def write(model: ModelConfig) -> Values:
        if model.task_head is None:
            raise DataError(f"found a head over the vocabulary, expected the task head of {name}")
        labels = model.task_head.labels or _DEFAULT_LABELS[:1]
        return {
            **base.write(dataclasses.replace(model, task_head=None)),
            "architectures": [name],
            "classifier_dropout": model.task_head.dropout_rate,
            "id2label": {str(number): label for number, label in enumerate(labels)},
            "label2id": {label: number for number, label in enumerate(labels)},
        }

    def preset() -> ModelConfig:
        head = TaskHeadConfig(
            kind=kind, labels=_DEFAULT_LABELS, pooling="cls", transform=transform is not None, dropout_rate=0.1
        )
        return dataclasses.replace(base.presets[0](), task_head=head, lm_head_transform=False, head_bias=False)

    return dataclasses.replace(
        base,
        model_type=f"{base.model_type}_{kind}",
        variant_of=base.model_type,
        variant_field=("architectures", name),
        presets=(preset,),
        rules=rules,
        read=read,
        write=write,
        masked_lm_head="",
        unused_pattern=r"(?!)" if transform is not None else base.unused_pattern,
    )


TASK_HEADS = (
    _variant(BERT, "Bert", "classification", transform="bert.pooler.dense", out="classifier"),
    _variant(BERT, "Bert", "token_classification", out="classifier"),
    _variant(ROBERTA, "Roberta", "classification", transform="classifier.dense", out="classifier.out_proj"),
    _variant(ROBERTA, "Roberta", "token_classification", out="classifier"),
    _variant(XLM_ROBERTA, "XLMRoberta", "classification", transform="classifier.dense", out="classifier.out_proj"),
    _variant(XLM_ROBERTA, "XLMRoberta", "token_classification", out="classifier"),
    _variant(ELECTRA, "Electra", "token_classification", out="classifier"),
    _variant(DEBERTA, "DebertaV2", "token_classification", out="classifier"),
)
