"""Fine-tuning of a model from files, without a recipe of your own: `t5x-like train finetune:classify --from MODEL_DIR`.

MODEL_DIR is a run, an imported model or a Hugging Face directory. `configs/runs/finetune.py:text_to_text` generates the
targets of pairs, `:classify` predicts the label of a text, `:tag` one label for each word, `:embed` trains embeddings
on pairs of texts that match, `:chat` trains the assistant's turns of dialogues, and `:dpo`, or for dialogues
`:chat_dpo`, trains on pairs of answers of which one was preferred. The files and their fields are set on the command
line: `--data.corpus.files train.tsv --data.corpus.validation-files dev.tsv --data.corpus.inputs-field question
--data.corpus.text-field answer`. The labels are those that occur in the training files, in alphabetical order, unless
`--data.corpus.labels` names them.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from t5x_like.config import (
    AdamWConfig,
    CorpusConfig,
    DataConfig,
    Dialogues,
    EvaluationConfig,
    InitializeFrom,
    LabeledExamples,
    ModelConfig,
    Preference,
    RunConfig,
    ScheduleConfig,
    Supervised,
    TaskHeadConfig,
    TrainingConfig,
)
from t5x_like.config.corpus import TargetKind
from t5x_like.config.model import HeadKind, Pooling
from t5x_like.finetuning.base_model import BaseModel, open_base

INPUTS, TARGETS = 512, 128


def text_to_text(base: Path) -> RunConfig:
    """Return the run that learns to generate the targets of pairs; of a decoder, after the inputs."""
    model = open_base(base)
    model.require_decoder()
    inputs, targets = model.lengths(INPUTS, TARGETS)
    data = DataConfig(
        corpus=CorpusConfig(inputs_field="inputs", text_field="targets"),
        tokenizer=model.tokenizer,
        layout=model.layout,
        mixture=(Supervised(),),
        example_mode="documents",
        inputs_length=inputs,
        targets_length=targets,
    )
    return _run("text_to_text", model.model, data, InitializeFrom(directory=str(base)))


def classify(base: Path) -> RunConfig:
    """Return the run that learns the label of a text."""
    return _with_head("classify", open_base(base), "classification", "label")


def tag(base: Path) -> RunConfig:
    """Return the run that learns a label for each word, such as the entities of NER."""
    return _with_head("tag", open_base(base), "token_classification", "token_labels")


def embed(base: Path) -> RunConfig:
    """Return the run that learns embeddings of pairs of texts that match, with the other rows as negatives."""
    return _with_head("embed", open_base(base), "embedding", "text")


def chat(base: Path) -> RunConfig:
    """Return the run that learns the assistant's turns of dialogues, as the chat template lays them out. An encoder
    reads the dialogue before each turn."""
    model = open_base(base)
    model.require_decoder()
    is_pair = model.model.architecture == "encoder_decoder"
    inputs, targets = model.lengths(*((INPUTS, 2 * TARGETS) if is_pair else (INPUTS, INPUTS)))
    data = DataConfig(
        corpus=CorpusConfig(messages_field="messages", messages_as="turns" if is_pair else "dialogue"),
        tokenizer=model.tokenizer,
        layout="encoder_decoder" if is_pair else "causal_lm",
        mixture=(Supervised(),) if is_pair else (Dialogues(),),
        example_mode="documents",
        inputs_length=inputs,
        targets_length=targets,
    )
    return _run("chat", model.model, data, InitializeFrom(directory=str(base)))


def dpo(base: Path) -> RunConfig:
    """Return the run that learns which of two answers to a prompt is preferred (direct preference optimization). The
    model that it starts from is the reference; both are compared without dropout."""
    model = open_base(base)
    model.require_decoder()
    inputs, targets = model.lengths(INPUTS, TARGETS)
    data = DataConfig(
        corpus=CorpusConfig(inputs_field="prompt", text_field="chosen", rejected_field="rejected"),
        tokenizer=model.tokenizer,
        layout=model.layout,
        mixture=(Preference(),),
        inputs_length=inputs,
        targets_length=targets,
    )
    run = _run("dpo", model.without_dropout, data, InitializeFrom(directory=str(base)))
    # Larger steps move the model away from the reference before it has learned the preferences.
    schedule = dataclasses.replace(run.training.schedule, learning_rate=5e-6)
    return dataclasses.replace(run, training=dataclasses.replace(run.training, schedule=schedule))


def chat_dpo(base: Path) -> RunConfig:
    """Return the run that learns which of two answers in a dialogue is preferred, as the chat template lays them out.
    An encoder reads the dialogue before the answers."""
    run = dpo(base)
    is_pair = run.data.layout == "encoder_decoder"
    messages_as: Literal["turns", "dialogue"] = "turns" if is_pair else "dialogue"
    corpus = dataclasses.replace(run.data.corpus, inputs_field=None, messages_field="prompt", messages_as=messages_as)
    data = dataclasses.replace(
        run.data,
        corpus=corpus,
        layout="encoder_decoder" if is_pair else "causal_lm",
        mixture=(Preference(dialogues=not is_pair),),
    )
    return dataclasses.replace(run, name="chat_dpo", data=data)


def _with_head(name: str, base: BaseModel, kind: HeadKind, target_kind: TargetKind) -> RunConfig:
    # In a causal decoder only the last token attends to the whole text.
    pooling: Pooling = "last" if base.layout == "causal_lm" else "mean"
    model, layout, source = base.with_head(TaskHeadConfig(kind=kind, pooling=pooling, dropout_rate=0.1))
    inputs, _ = base.lengths(INPUTS, 0)
    data = DataConfig(
        corpus=CorpusConfig(inputs_field="text", text_field="label", target_kind=target_kind),
        tokenizer=base.tokenizer,
        layout=layout,
        mixture=(LabeledExamples(kind=kind),),
        inputs_length=inputs,
        targets_length=0,
    )
    return _run(name, model, data, source)


def _run(name: str, model: ModelConfig, data: DataConfig, source: InitializeFrom) -> RunConfig:
    return RunConfig(
        name=name,
        model=model,
        data=data,
        initialize_from=source,
        training=TrainingConfig(
            num_train_steps=1000,
            global_batch_size=16,
            optimizer=AdamWConfig(weight_decay=0.01),
            schedule=ScheduleConfig(kind="cosine", learning_rate=1e-4, warmup_steps=50),
        ),
        evaluation=EvaluationConfig(every_steps=200, num_batches=16),
    )
