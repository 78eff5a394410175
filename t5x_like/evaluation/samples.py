"""Held-out examples beside what the model makes of them, as text, for people."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config import DataConfig, Objective
from t5x_like.data import validation
from t5x_like.data.store import Store
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.data.vocabulary import PAD_ID
from t5x_like.decoding.generate import generate_tokens
from t5x_like.decoding.prompts import objective_format
from t5x_like.decoding.sampling import restrict
from t5x_like.evaluation.heads import head_samples
from t5x_like.program import Program

Tree = Any
Features = Mapping[str, npt.NDArray[Any]]
Sample = dict[str, str]


def decode_samples(program: Program, params: Tree, stores: Sequence[Store], *, count: int) -> list[Sample]:
    """At least `count` held-out examples in all, as many of each objective, decoded greedily.

    Returns:
      denoiser: Name of the objective.
      inputs, targets: As text, with sentinels and mode tokens spelled out. Causal LM: the two halves of the window.
        Masked LM: every chosen token is shown as a sentinel of its own, whatever the masking put there.
      prediction: What the model says in place of the targets.
    """
    if not stores:
        return []  # Read live: there is no tokenizer to spell with.
    data = program.run.data
    if data.labelled is not None:
        return head_samples(program, params, stores, count)
    kinds = [
        (share, store, objective)
        for share, store in zip(data.sources, stores, strict=True)
        for objective in data.objectives_of(share)
    ]
    each = -(-count // len(kinds))
    if each == 0:
        return []
    samples = []
    for share, store, objective in kinds:
        rows = program.run.training.batch_size
        for batch in validation.objective_batches(store, data, share, rows, objective, num_batches=1):
            decode = _infill if data.layout == "encoder" else functools.partial(_generate, objective)
            found = decode(program, params, batch["main"], each, store)
            samples += [{"denoiser": objective.name, **sample} for sample in found]
    return samples


def _generate(
    objective: Objective, program: Program, params: Tree, features: Features, count: int, store: Store
) -> list[Sample]:
    data, tokenizer = program.run.data, store.tokenizer
    prompt_form = objective_format(objective, data)
    examples = list(_examples(features, data, count, halve=not prompt_form.ends_in_eos))
    predictions = generate_tokens(
        program,
        params,
        [inputs for inputs, _ in examples],
        allowed_V=prompt_form.allowed(store.vocabulary, program.run.model.vocab_size),
        # One limit for all objectives, so that they share what is compiled.
        max_new_tokens=data.targets_length or data.row_length,
        bidirectional=prompt_form.bidirectional,
    )
    return [
        {
            "inputs": tokenizer.decode(inputs),
            "targets": tokenizer.decode(targets),
            "prediction": tokenizer.decode(prediction),
        }
        for (inputs, targets), prediction in zip(examples, predictions, strict=True)
    ]


def _examples(
    features: Features, data: DataConfig, count: int, *, halve: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """(inputs, targets) of the first rows, without padding. `halve`: what is all targets is cut in the middle."""
    for row in range(count):
        stream = features["decoder_target_tokens"][row]
        scored = features["decoder_loss_weights"][row] > 0
        if not scored.any():
            return
        targets = stream[scored].tolist()
        if data.layout == "encoder_decoder":
            inputs = features["encoder_input_tokens"][row]
            yield inputs[inputs != PAD_ID].tolist(), targets
        elif halve:
            middle = len(targets) // 2
            yield targets[:middle], targets[middle:]
        else:
            yield stream[~scored & (stream != PAD_ID)].tolist(), targets


def _infill(program: Program, params: Tree, features: Features, count: int, store: Store) -> list[Sample]:
    """A masked LM's most likely pieces of text at the chosen positions."""
    text_V = np.arange(program.run.model.vocab_size) < store.vocabulary.base_size
    placed = program.put_whole({"main": features})["main"]
    prediction_NxL = np.asarray(_most_likely(program, params, placed, text_V))
    samples = []
    for row in range(count):
        tokens, chosen = features["encoder_target_tokens"][row], features["encoder_loss_weights"][row] > 0
        if not chosen.any():
            break
        present = tokens != PAD_ID
        gaps = chosen[present]
        samples.append(
            {
                "inputs": _with_gaps(tokens[present].tolist(), gaps, store.tokenizer),
                "targets": _in_gaps(tokens[present][gaps].tolist(), store.tokenizer),
                "prediction": _in_gaps(prediction_NxL[row][present][gaps].tolist(), store.tokenizer),
            }
        )
    return samples


@functools.partial(jax.jit, static_argnums=0)
def _most_likely(program: Program, params: Tree, features: Mapping[str, jax.Array], allowed_V: jax.Array) -> jax.Array:
    with program.activations():
        tokens_BxL = restrict(program.model(params)(features), allowed_V).argmax(axis=-1)
        return jax.lax.with_sharding_constraint(tokens_BxL, NamedSharding(program.mesh, PartitionSpec()))


def _with_gaps(tokens: Sequence[int], gaps: Sequence[bool] | npt.NDArray[np.bool_], tokenizer: Tokenizer) -> str:
    """The text with `<extra_id_k>` for its k-th gap, however many sentinels the vocabulary has."""
    parts, number = [], 0
    for token, gap in zip(tokens, gaps, strict=True):
        parts.append(f"<extra_id_{number}>".encode() if gap else tokenizer.to_bytes([token]))
        number += bool(gap)
    return b"".join(parts).decode("utf-8", errors="replace")


def _in_gaps(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """`<extra_id_k>` and the k-th token, for all k."""
    return "".join(f"<extra_id_{number}>{tokenizer.decode([token])}" for number, token in enumerate(tokens))
