"""Model that fine-tuning starts from, or learns from: its configuration, its tokenizer and its layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import assert_never

from t5x_like import run_directory
from t5x_like.checkpoints.model_dir import HUGGINGFACE_DIR, read_model
from t5x_like.config import InitializeFrom, ModelConfig, RunConfig, TaskHeadConfig, TokenizerConfig
from t5x_like.config.initialization import encoder_decoder_to_encoder
from t5x_like.config.layouts import Layout
from t5x_like.data.tokenizers.loading import KEPT_MODEL, kept_tokenizer, stored_config
from t5x_like.data.tokenizers.published import load_published
from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.interop.huggingface.checkpoint import open_directory
from t5x_like.model_loading import model_kind
from t5x_like.storage.mirror import local_copy


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """Model that fine-tuning starts from.

    Attributes:
      directory: A run, an imported model or a Hugging Face directory.
      model: Its configuration.
      tokenizer: Its tokenizer, as a configuration that reads it from the directory.
      layout: Layout of its rows: that of a run's training, or that of the architecture.
    """

    directory: Path
    model: ModelConfig
    tokenizer: TokenizerConfig
    layout: Layout

    def lengths(self, inputs: int, targets: int) -> tuple[int, int]:
        """Return lengths of inputs and targets, at most those for which the model has learned positions."""
        stacks = self.model.stacks.values()
        longest = min((stack.max_positions for stack in stacks if stack.positions == "learned"), default=2**30)
        shares = 1 if self.model.architecture == "encoder_decoder" or not targets else 2
        return min(inputs, longest // shares), min(targets, longest // shares)

    @property
    def without_dropout(self) -> ModelConfig:
        """The model without dropout."""
        encoder, decoder = (
            stack and dataclasses.replace(stack, dropout_rate=0.0) for stack in (self.model.encoder, self.model.decoder)
        )
        return dataclasses.replace(self.model, encoder=encoder, decoder=decoder)

    def with_head(self, head: TaskHeadConfig) -> tuple[ModelConfig, Layout, InitializeFrom]:
        """Return the model with a fresh head, its layout, and its initial values. Of an encoder-decoder, the encoder
        gets the head."""
        # Embeddings are the pooled states: their head has no parameters without a transform.
        has_parameters = head.kind != "embedding" or head.transform
        fresh = ("head/.*",) if has_parameters else ()
        match self.model.architecture:
            case "encoder" | "decoder":
                model = dataclasses.replace(self.model, task_head=head)
                return model, self.layout, InitializeFrom(directory=str(self.directory), reinit=fresh)
            case "encoder_decoder":
                separate = self.model.separate_encoder_embeddings
                model = dataclasses.replace(
                    self.model, decoder=None, separate_encoder_embeddings=False, tie_embeddings=False, task_head=head
                )
                source = encoder_decoder_to_encoder(str(self.directory), separate_tables=separate, fresh=fresh)
                return model, "encoder", source
            case unknown:
                assert_never(unknown)

    def require_decoder(self) -> None:
        """Raise ConfigError if the model generates no text."""
        if self.model.decoder is None:
            fix = "`finetune:classify`, `:tag` and `:embed` train an encoder"
            raise ConfigError([ConfigProblem(str(self.directory), "an encoder alone", "a model with a decoder", fix)])


def open_base(directory: Path) -> BaseModel:
    """Read the configuration of the model in a directory.

    Raises:
      UserError: there is no model, or no tokenizer that can be read.
    """
    kind = model_kind(directory)
    match kind:
        case "run":
            run = run_directory.read_config(directory)
            tokenizer = _run_tokenizer(directory) or run.data.tokenizer
            return BaseModel(directory, _plain(run.model), tokenizer, run.data.layout)
        case "imported":
            model, folder = read_model(directory)[0], directory / HUGGINGFACE_DIR
        case "huggingface":
            model, folder = open_directory(directory).model, directory
        case _:
            assert_never(kind)
    vocabulary = load_published(folder, 0).vocabulary
    tokenizer = TokenizerConfig(kind="published", path=str(folder), num_sentinels=vocabulary.num_sentinels)
    # A decoder without a padding id attends to what follows its rows, which no scored position sees.
    pad_id = model.pad_token_id if model.pad_token_id is None else vocabulary.pad_id
    return BaseModel(directory, _plain(dataclasses.replace(model, pad_token_id=pad_id)), tokenizer, _layout(model))


def with_teacher_model(run: RunConfig) -> RunConfig:
    """Return the run with the model of its teacher, read from the teacher's directory, unless the run states it.

    Raises:
      UserError: there is no model, or a Hugging Face directory, which must be converted first.
    """
    distillation = run.training.distillation
    if distillation is None or distillation.model is not None:
        return run
    directory = local_copy(distillation.teacher, "training.distillation.teacher")
    if model_kind(directory) == "huggingface":
        fix = f"`t5x-like convert --from hf {directory} OUT` makes one"
        expected = "a run or an imported model"
        raise ConfigError([ConfigProblem("training.distillation.teacher", "a Hugging Face directory", expected, fix)])
    distillation = dataclasses.replace(distillation, model=open_base(directory).model)
    return dataclasses.replace(run, training=dataclasses.replace(run.training, distillation=distillation))


def _plain(model: ModelConfig) -> ModelConfig:
    """Return the model without the parts of its former task."""
    return dataclasses.replace(model, task_head=None, generator=None)


def _run_tokenizer(directory: Path) -> TokenizerConfig | None:
    """Return the tokenizer that a run has kept; None if it has kept none."""
    folder = directory / run_directory.TOKENIZER
    kept = kept_tokenizer(folder)
    if kept is None:
        return None
    config = stored_config(kept)
    match config.kind:
        case "bytes":
            return config
        case "sentencepiece":
            return dataclasses.replace(config, path=str(folder / KEPT_MODEL))
        case "published":
            return dataclasses.replace(config, path=str(folder))
        case _:
            raise DataError(f"{folder}: found a tokenizer of kind {config.kind}, expected one that a run keeps")


def _layout(model: ModelConfig) -> Layout:
    match model.architecture:
        case "encoder":
            return "encoder"
        case "decoder":
            return "causal_lm"
        case "encoder_decoder":
            return "encoder_decoder"
        case unknown:
            assert_never(unknown)
