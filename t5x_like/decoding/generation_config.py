"""Settings of text generation, and the checks that concern several of them."""

from __future__ import annotations

import dataclasses

from t5x_like.decoding.beam_search import BeamSearch
from t5x_like.decoding.prompt_reader import MAX_NEW_TOKENS, is_text
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.unmasking_schedule import DiffusionSampling
from t5x_like.errors import ConfigError, ConfigProblem


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Settings of text generation. They are saved beside an output file, and a resumed command must have the same.

    Attributes:
      mode: Mode token of UL2; None for the default of `prompt_format`.
      max_new_tokens: Largest number of new tokens of a completion, where a prompt has no number of its own.
      sampling: Sampling settings.
      seed: Seed of the draws, which also depend on the prompt's index in the input and on the sample's number. The
        draws of a prompt with its own seed do not depend on its index.
      num_samples: Number of completions per prompt; with a beam search the number of best hypotheses.
      beam: Beam search; None: sampling.
      stop: Strings that end a completion, and are not part of it.
      choices: Texts of which a completion must be one.
      allowed_characters: Characters that completions may contain; None: all.
      raw_text: `<mask>` and `<extra_id_N>` in a prompt are ordinary text.
      return_filled: The completion of a prompt with gaps is the whole text with its gaps filled.
      return_scores: Completions have their log-likelihood and finish reason.
      cache_dtype: See `generate_tokens`.
      draft_model: Directory of a smaller model for speculative decoding.
      prompt_lookup: Speculative decoding with prompt lookup.
      num_draft_tokens: Number of tokens per proposal of the draft.
      batch_size: Number of completions that are decoded at once.
      diffusion: Masked positions are filled in this way, in place of decoding from left to right.
    """

    mode: str | None = None
    max_new_tokens: int = 64
    sampling: Sampling = Sampling()
    seed: int = 0
    num_samples: int = 1
    beam: BeamSearch | None = None
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    allowed_characters: str | None = None
    raw_text: bool = False
    return_filled: bool = False
    return_scores: bool = False
    cache_dtype: str | None = None
    draft_model: str | None = None
    prompt_lookup: bool = False
    num_draft_tokens: int = 4
    batch_size: int = 32
    diffusion: DiffusionSampling | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.diffusion is not None:
            problems += self._unmasking_problems()
        is_random = self.diffusion is not None and self.diffusion.order == "random"
        if self.beam is None and self.sampling.greedy and self.num_samples > 1 and not is_random:
            fix = "greedy completions of a prompt are all equal: set a temperature or a beam size"
            problems.append(ConfigProblem("num_samples", str(self.num_samples), "1 at temperature 0", fix))
        if self.beam is not None and self.num_samples > self.beam.size:
            problems.append(ConfigProblem("num_samples", str(self.num_samples), f"at most the {self.beam.size} beams"))
        if self.beam is not None and not self.sampling.greedy:
            problems.append(ConfigProblem("temperature", repr(self.sampling.temperature), "0 with a beam search"))
        if self.draft_model is not None and self.prompt_lookup:
            problems.append(ConfigProblem("prompt_lookup", "a draft model too", "one of the two"))
        if self.beam is not None and self.speculates:
            problems.append(
                ConfigProblem("draft_model", "a beam search too", "neither draft_model nor prompt_lookup with beams")
            )
        if not 0 < self.max_new_tokens <= MAX_NEW_TOKENS:
            problems.append(ConfigProblem("max_new_tokens", str(self.max_new_tokens), f"from 1 to {MAX_NEW_TOKENS:,}"))
        texts_of_options = {
            "stop": self.stop,
            "choice": self.choices or (),
            "allowed_characters": self.allowed_characters or "",
        }
        for name, texts in texts_of_options.items():
            if not all(map(is_text, texts)):
                problems.append(ConfigProblem(name, "bytes that are not valid UTF-8", "valid UTF-8 text"))
        if self.choices is not None and self.allowed_characters is not None:
            problems.append(ConfigProblem("allowed_characters", repr(self.allowed_characters), "none with choices"))
        if problems:
            raise ConfigError(problems)

    def _unmasking_problems(self) -> list[ConfigProblem]:
        """Return one problem that names all settings without a meaning where masked positions are filled."""
        settings = {
            "mode": self.mode is not None,
            "beam_size": self.beam is not None,
            "draft_model": self.draft_model is not None,
            "prompt_lookup": self.prompt_lookup,
            "choice": self.choices is not None,
            "repetition_penalty": self.sampling.repetition_penalty != 1.0,
            "return_scores": self.return_scores,
            "cache_dtype": self.cache_dtype is not None,
        }
        given = [name for name, is_set in settings.items() if is_set]
        if not given:
            return []
        found = "a model that fills masked positions in any order, which has neither a next token nor a cache"
        return [ConfigProblem(", ".join(given), found, "a model that decodes from left to right", "leave them out")]

    @property
    def speculates(self) -> bool:
        """True if tokens are proposed by a draft model or by prompt lookup."""
        return self.draft_model is not None or self.prompt_lookup
