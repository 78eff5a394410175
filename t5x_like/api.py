"""Python API: load a model and use it, or train one. docs/python.md has examples.

`t5x_like.load`, `t5x_like.train` and `t5x_like.PretrainedModel` are these names.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from t5x_like import plugins
from t5x_like.config import ModelConfig, RunConfig
from t5x_like.config.model import Pooling
from t5x_like.config.recipes import load_recipe
from t5x_like.config.validation import validate
from t5x_like.data.tokenizers.tokenizer import TokenizerProtocol
from t5x_like.decoding.generation_config import GenerationConfig
from t5x_like.decoding.log_likelihood import Score, score_tokens
from t5x_like.decoding.masked_prompts import settings_and_formats
from t5x_like.decoding.pipeline import TextGenerator
from t5x_like.decoding.prompt_reader import PromptRequest
from t5x_like.decoding.prompted_model import PromptedModel
from t5x_like.decoding.sampling import Sampling
from t5x_like.embedding.embed_files import embed
from t5x_like.embedding.text_encoder import TextEncoder, open_encoder
from t5x_like.errors import EXIT_OK, ConfigError, ConfigProblem
from t5x_like.evaluation.lm_requests import Pair, RequestFormat, request_format
from t5x_like.finetuning.base_model import with_teacher_model
from t5x_like.model_loading import Devices, LoadedModel, open_model
from t5x_like.program import Program
from t5x_like.storage.mirror import path_to_read
from t5x_like.trainer import train as trainer
from t5x_like.utils.trusted_urls import require_local
from t5x_like.utils.type_aliases import PyTree

Text = str | Sequence[int]
"""A text, or its token ids."""
_SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(Sampling))
_SMALLEST_LENGTH = 16


class PretrainedModel:
    """Model with its parameters and its tokenizer.

    Tokenizer and parameters are read when they are first used. Texts may be given as token ids as well.

    Attributes:
      loaded: The model as it was opened.
    """

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded
        self._encoders: dict[tuple[Any, ...], TextEncoder] = {}

    @property
    def config(self) -> ModelConfig:
        """Architecture of the model."""
        return self.loaded.model

    @property
    def run(self) -> RunConfig | None:
        """Configuration of the training run; None for an imported model."""
        return self.loaded.run if self.loaded.kind == "run" else None

    @property
    def tokenizer(self) -> TokenizerProtocol:
        """Tokenizer of the model.

        Raises:
          DataError: the model has none that can be read here.
        """
        return self.loaded.tokenizer

    @property
    def program(self) -> Program:
        """Compiled functions and shardings of the model on its devices."""
        return self.loaded.program

    @functools.cached_property
    def _restored(self) -> tuple[int, PyTree]:
        return self.loaded.params()

    @property
    def step(self) -> int:
        """Step of the parameters."""
        return self._restored[0]

    @property
    def params(self) -> PyTree:
        """Parameters as nested dictionaries of arrays on the devices."""
        return self._restored[1]

    def logits(self, inputs: Sequence[Text], targets: Sequence[Text] | None = None) -> npt.NDArray[np.float32]:
        """Return logits, float32 [texts, length, vocabulary], for texts that are padded on the right.

        Decoder: logits[i, t] predicts token t of `inputs[i]`, and the last ones the token after it. Encoder-decoder:
        the same for `targets[i]`, given `inputs[i]`. Encoder: logits[i, t] belongs to token t of `inputs[i]`. Texts
        become ids without a mode token; the inputs of an encoder get the tokenizer's special tokens.

        Args:
          targets: Beginnings of the targets of an encoder-decoder; None for empty ones.

        Raises:
          ConfigError: `targets` for a model that has no encoder and decoder, or of another number than `inputs`.
        """
        config = self.config
        if targets is not None and (config.architecture != "encoder_decoder" or len(targets) != len(inputs)):
            found = (
                f"{len(targets)} targets for {len(inputs)} inputs of a model of architecture {config.architecture!r}"
            )
            raise ConfigError([ConfigProblem("targets", found, "one for each input of an encoder-decoder")])
        features: dict[str, npt.NDArray[np.int32]] = {}
        lengths = [0] * len(inputs)
        if config.encoder is not None:
            rows = [self._encoder_ids(text) for text in inputs]
            features |= _features("encoder", rows)
            lengths = [len(row) for row in rows]
        if config.decoder is not None:
            texts = ([[]] * len(inputs) if targets is None else targets) if config.encoder is not None else inputs
            rows = [[config.decoder_start_token_id, *self._ids(text)] for text in texts]
            features |= _features("decoder", rows)
            lengths = [len(row) for row in rows]
        logits = _logits(self.program, self.params, features)
        return np.asarray(logits)[: len(inputs), : max(lengths)]

    def score(
        self, inputs: Sequence[Text], targets: Sequence[Text], *, mode: str | None = None, max_length: int | None = None
    ) -> list[Score]:
        """Return the log-likelihood of each target after its input, in nats.

        Inputs are laid out as in training: those of an encoder-decoder or a prefix LM with mode token and EOS, those of
        a causal decoder as the beginning of the text. Inputs that are too long keep their end.

        Args:
          mode: Mode token; None for S if the model was trained with it.
          max_length: Tokens of the inputs (in a decoder, of inputs and targets); None: as in training.

        Raises:
          ConfigError: the model is an encoder, or the mode was not trained.
        """
        if len(inputs) != len(targets):
            raise ConfigError(
                [ConfigProblem("targets", f"{len(targets)} of them", f"{len(inputs)}, one for each input")]
            )
        layout = request_format(self.loaded, mode=mode, max_length=max_length)
        return self._scores(layout, [_pair(layout, *texts) for texts in zip(inputs, targets, strict=True)])

    def loss(
        self,
        texts: Sequence[Text],
        targets: Sequence[Text] | None = None,
        *,
        mode: str | None = None,
        max_length: int | None = None,
    ) -> float:
        """Return the mean loss per token in nats: of `targets` after `texts`, or else of the texts themselves.

        A text that is longer than the model reads is scored in windows, each token once. The loss depends on their
        length, which is known for a run only.

        Args:
          mode: See `score`.
          max_length: See `score`; of texts alone, also the tokens of a window that an encoder-decoder scores at once.

        Raises:
          ConfigError: see `score`; or a text is longer than the model reads, the model is not a run, and `max_length`
            is None.
        """
        if targets is not None:
            scores = self.score(texts, targets, mode=mode, max_length=max_length)
        else:
            layout = request_format(self.loaded, mode=mode, max_length=max_length)
            strings = [text if isinstance(text, str) else self.tokenizer.decode(text) for text in texts]
            if max_length is not None:
                layout = dataclasses.replace(layout, targets_length=max_length)
            windows = [layout.rolling(text) for text in strings]
            if max_length is None and self.loaded.kind != "run" and any(len(found) > 1 for found in windows):
                longest = max(sum(len(target_ids) for _, target_ids in found) for found in windows)
                expected = "a number: the lengths of training are known for a run only, and a text is longer than"
                limit = layout.targets_length if layout.form.ends_in_eos else layout.inputs_length
                raise ConfigError(
                    [ConfigProblem("max_length", f"None, and a text of {longest} tokens", f"{expected} {limit}")]
                )
            scores = self._scores(layout, [window for found in windows for window in found])
        tokens = sum(len(score.per_token) for score in scores)
        return -sum(score.sum for score in scores) / max(tokens, 1)

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        """Return the answers to prompts; with `num_samples` of n, n consecutive answers to each.

        Args:
          settings: Fields of `GenerationConfig` (max_new_tokens, seed, stop, choices, ...) and of `Sampling`
            (temperature, top_k, top_p, min_p, repetition_penalty). The default is greedy.

        Raises:
          ConfigError: unknown settings, the model generates no text, or it does not fit the settings.
        """
        known = {*_SAMPLING_FIELDS, *(field.name for field in dataclasses.fields(GenerationConfig))} - {"sampling"}
        problems = []
        for name in sorted(settings.keys() - known):
            near = difflib.get_close_matches(name, known, n=1)
            expected = f"perhaps {near[0]}" if near else f"one of {', '.join(sorted(known))}"
            problems.append(ConfigProblem(f"generate({name}=)", "no such setting", expected))
        if problems:
            raise ConfigError(problems)
        sampling = Sampling(**{name: value for name, value in settings.items() if name in _SAMPLING_FIELDS})
        others = {name: value for name, value in settings.items() if name not in _SAMPLING_FIELDS}
        config = GenerationConfig(sampling=sampling, **others)
        config, formats = settings_and_formats(self.loaded, config)
        generator = TextGenerator(PromptedModel(self.loaded), self.params, formats, config)
        answers = generator([PromptRequest(prompt, {}) for prompt in prompts], 0)
        return [answer.text for samples in answers for answer in samples]

    def encode(
        self,
        texts: Sequence[str],
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        bidirectional: bool | None = None,
        max_length: int | None = None,
        dimensions: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return embeddings, float32 [texts, width]. An encoder-decoder embeds by its encoder.

        Args:
          pooling, normalize, bidirectional, max_length, dimensions: See `embedding.text_encoder.open_encoder`; None: as
            the model was trained or published.
        """
        key = (pooling, normalize, bidirectional, max_length, dimensions)
        if key not in self._encoders:
            self._encoders[key] = open_encoder(
                self.loaded,
                pooling=pooling,
                normalize=normalize,
                bidirectional=bidirectional,
                max_length=max_length,
                dimensions=dimensions,
            )
        return embed(self._encoders[key], texts)

    def _ids(self, text: Text) -> list[int]:
        return self.tokenizer.encode(text) if isinstance(text, str) else list(text)

    def _encoder_ids(self, text: Text) -> list[int]:
        if not isinstance(text, str):
            return list(text)
        # A length that no text exceeds: nothing is truncated.
        return self.tokenizer.encode_with_special_tokens([text], 2**30)[0]

    def _scores(self, layout: RequestFormat, pairs: Sequence[Pair]) -> list[Score]:
        scores = score_tokens(self.program, self.params, pairs, bidirectional=layout.form.bidirectional)
        if not layout.form.sentinels:
            return scores
        # The sentinel in front of the targets is given, not predicted.
        return [Score(sum(one.per_token[1:]), one.per_token[1:], one.is_greedy) for one in scores]


def load(
    model: str | Path, step: int | None = None, *, devices: Devices = "all", trust: Sequence[str] = ()
) -> PretrainedModel:
    """Load the model of a training run, one that `convert --from` wrote, or a Hugging Face directory.

    Args:
      model: Directory, or a string `DIR:STEP`.
      step: Step of the parameters; None for the one in `model`, or else the newest.
      devices: Devices of the model: all, those of this process, or a list.
      trust: Plug-ins and modules that may be imported if the run's config.json names them.

    Raises:
      UserError: there is no model, or its files are malformed.
    """
    plugins.trust(trust)
    return PretrainedModel(open_model(model, step, devices=devices))


def train(
    run: RunConfig | str,
    workdir: str | Path,
    *,
    allow_changes: Sequence[str] = (),
    allow_start_over: bool = False,
    plan: str | Path | None = None,
    trust: Sequence[str] = (),
) -> bool:
    """Train a run up to its last step, from its newest checkpoint if there is one.

    Args:
      run: Configuration, or a recipe as on the command line.
      workdir: Directory of the run, or a URL (`gs://`, `s3://`).
      allow_changes: Training fields that may differ from those of the run in `workdir`.
      allow_start_over: Train from step 0 if `workdir` has records of a run whose checkpoints are gone.
      plan: File of a saved plan (`plan --save`), with which the start is compared.
      trust: Plug-ins and modules that may be imported if the run's config.json names them.

    Returns:
      True when the last step is saved; False when a signal stopped the run after a save, and the same call resumes it.

    Raises:
      UserError: the run cannot start or resume.
    """
    plugins.trust(trust)
    run = with_teacher_model(load_recipe(run) if isinstance(run, str) else run)
    problems = validate(run)
    if problems:
        raise ConfigError(problems)
    directory = path_to_read(str(workdir), "workdir")
    if plan is not None:
        require_local(str(plan), "plan")
    saved_plan = None if plan is None else Path(plan)
    return trainer.train(run, directory, allow_changes, saved_plan, start_over=allow_start_over) == EXIT_OK


def _pair(layout: RequestFormat, inputs: Text, targets: Text) -> Pair:
    if isinstance(inputs, str) and isinstance(targets, str):
        return layout.pair(inputs, targets)
    given, wanted = (layout.tokenizer.encode(text) if isinstance(text, str) else text for text in (inputs, targets))
    return layout.separate_inputs(given, wanted) if layout.form.ends_in_eos else layout.stream(given, wanted)


def _features(stack: str, rows: Sequence[Sequence[int]]) -> dict[str, npt.NDArray[np.int32]]:
    """Return the features of a stack, int32 [rows, length], padded to powers of two so that few shapes are compiled."""
    count, length = _power_of_two(len(rows), 1), _power_of_two(max(map(len, rows), default=0), _SMALLEST_LENGTH)
    tokens = np.zeros((count, length), np.int32)
    segment_ids = np.zeros((count, length), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], segment_ids[index, : len(row)] = row, 1
    return {f"{stack}_input_tokens": tokens, f"{stack}_segment_ids": segment_ids}


def _power_of_two(number: int, smallest: int) -> int:
    return max(smallest, 1 << max(number - 1, 0).bit_length())


@functools.partial(jax.jit, static_argnums=0)
def _logits(program: Program, params: PyTree, features: dict[str, jax.Array]) -> jax.Array:
    with program.mesh_context():
        return program.model(params)(features)
