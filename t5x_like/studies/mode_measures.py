"""Losses of the denoisers of a mixture under the mode token of each other kind, and what a prompt does under each.

UL2's mixtures have denoisers of three kinds, each with a mode token at the start of its inputs (Tay et al. 2022). The
same held-out windows are scored under all three tokens: a mode token occupies one position, whatever its kind, so that
nothing else of a row changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.config import DataConfig, Objective
from t5x_like.config.objectives import MODES, Mode, PrefixLM
from t5x_like.data.stream.heldout import cut_windows, objective_batches
from t5x_like.decoding.engine import generate_tokens
from t5x_like.decoding.prompt_format import objective_format
from t5x_like.decoding.sampling import Sampling
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.evaluation.per_example_loss import row_losses
from t5x_like.model_loading import LoadedModel, open_model
from t5x_like.studies.kept_measures import measure_once
from t5x_like.utils.type_aliases import PyTree

FILE = "modes.json"
"""File of a run directory with what was measured."""
PROMPTS, PROMPT, NEW = 64, 128, 192
"""Prompts without sentinels, the tokens of text of each, and the most tokens that continue it."""


def measure_modes(run: EvaluatedCheckpoint, kinds: Sequence[Mode]) -> dict[str, float]:
    """Return scores of the model of a run under each mode token.

    Args:
      run: A checkpoint of a run on one corpus, all of whose objectives have a mode token.
      kinds: Kind of each objective of its mixture, whichever mode token it was trained with.

    Returns:
      I_under_J: for all pairs of kinds, the held-out loss of the denoisers of kind I under the token of kind J: nats
        per scored token, the mean over the denoisers of this kind. `eval` uses the same windows and noise.
      largest_cost_I: I_under_J - I_under_I for the J whose token costs most.
      least_cost: The least of these differences over all I and all J other than I.
      stop_rate_under_J: Fraction of prompts without sentinels whose continuation under the token of J ends in EOS
        within `NEW` tokens. Prompts are held-out text in the form of the mixture's prefix LM, tokens are sampled at
        temperature 1, and sentinels are allowed under each token.
      new_tokens_under_J: Mean number of the new tokens before EOS, at most `NEW`.

    Raises:
      ConfigError: an objective of the run has no mode token, or there is not one kind for each of them.
    """
    return measure_once(run, FILE, f"modes of {'-'.join(kinds)}", lambda: _measured(run, kinds))


def _measured(run: EvaluatedCheckpoint, kinds: Sequence[Mode]) -> dict[str, float]:
    loaded = open_model(CheckpointRef(run.path), run.step)
    data = loaded.run.data
    _require_modes(data, kinds)
    params = loaded.params()[1]
    loss = {mode: _losses(loaded, params, under_mode(data, mode), kinds) for mode in MODES}
    scores = {f"{kind}_under_{mode}": loss[mode][kind] for kind in MODES for mode in MODES}
    costs = {kind: [loss[mode][kind] - loss[kind][kind] for mode in MODES if mode != kind] for kind in MODES}
    scores |= {f"largest_cost_{kind}": max(some) for kind, some in costs.items()}
    scores["least_cost"] = min(min(some) for some in costs.values())
    for mode in MODES:
        lengths = _continuation_lengths(loaded, params, mode)
        # EOS is not part of a continuation that it ends.
        scores[f"stop_rate_under_{mode}"] = sum(length < NEW for length in lengths) / len(lengths)
        scores[f"new_tokens_under_{mode}"] = sum(lengths) / len(lengths)
    return scores


def _require_modes(data: DataConfig, kinds: Sequence[Mode]) -> None:
    if without := [one.name for one in data.mixture if one.mode is None]:
        raise ConfigError([ConfigProblem("data.mixture", f"no mode in {', '.join(without)}", "a mode in each")])
    if len(kinds) != len(data.mixture) or set(kinds) != set(MODES):
        expected = f"one for each of the {len(data.mixture)} objectives, and each of {', '.join(MODES)}"
        raise ConfigError([ConfigProblem("kinds", ", ".join(kinds), expected)])


def under_mode(data: DataConfig, mode: Mode) -> DataConfig:
    """Return the data with the token of one mode in place of that of each objective."""
    mixture: tuple[Objective, ...] = tuple(dataclasses.replace(one, mode=mode) for one in data.mixture)
    return dataclasses.replace(data, mixture=mixture)


def _losses(loaded: LoadedModel, params: PyTree, data: DataConfig, kinds: Sequence[Mode]) -> dict[Mode, float]:
    """Return the mean loss of the denoisers of each kind."""
    (share,), (store,) = data.sources, loaded.stores
    rows, num_batches = loaded.run.training.global_batch_size, loaded.run.evaluation.num_batches
    found: dict[Mode, list[float]] = {mode: [] for mode in MODES}
    for objective, kind in zip(data.mixture, kinds, strict=True):
        batches = objective_batches(store, data, share, rows, objective, num_batches)
        losses = row_losses(loaded.program, params, batches, store.tokenizer)
        found[kind].append(sum(row["loss"] for row in losses) / sum(row["tokens"] for row in losses))
    return {kind: sum(losses) / len(losses) for kind, losses in found.items()}


def _continuation_lengths(loaded: LoadedModel, params: PyTree, mode: Mode) -> list[int]:
    """Return the number of new tokens of each prompt."""
    data, store = loaded.run.data, loaded.stores[0]
    prefix_lm = next(one for one in data.mixture if isinstance(one, PrefixLM))
    form = dataclasses.replace(objective_format(prefix_lm, data), mode=mode, sentinels=True)
    (texts, _), *_ = cut_windows(store.split("validation"), PROMPT, PROMPTS, 1)
    continuations = generate_tokens(
        loaded.program,
        params,
        [form.ids(text, store.vocabulary) for text in texts.tolist()],
        allowed_V=form.allowed(store.vocabulary, loaded.model.vocab_size),
        max_new_tokens=NEW,
        bidirectional=form.bidirectional,
        sampling=Sampling(temperature=1.0),
        batch_size=PROMPTS,
    )
    return [len(tokens) for tokens in continuations]
