"""Held-out examples with the model's predictions, as text."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config import DataConfig, Objective
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream import heldout
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.decoding.engine import generate_tokens
from t5x_like.decoding.prompt_format import objective_format
from t5x_like.decoding.sampling import restrict
from t5x_like.evaluation.task_head_metrics import head_samples
from t5x_like.program import Program
from t5x_like.utils.type_aliases import Features, PyTree

Sample = dict[str, str]


def decode_samples(program: Program, params: PyTree, stores: Sequence[Store], *, count: int) -> list[Sample]:
    """Decode at least `count` held-out examples in all, equally many of each objective, greedily.

    Returns:
      denoiser: Name of the objective.
      inputs, targets: Text with sentinels and mode tokens written out. Causal LM: the two halves of the window.
        Masked LM: each selected token is shown as a sentinel of its own, whatever it was replaced by.
      prediction: The model's prediction of the targets.
    """
    if not stores:
        return []  # Data is read live, without a tokenizer of ours.
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
        rows = program.run.training.global_batch_size
        for batch in heldout.objective_batches(store, data, share, rows, objective, num_batches=1):
            decode = _infill if objective.predicts_in_place else functools.partial(_generate, objective)
            decoded = decode(program, params, batch["main"], each, store)
            samples += [{"denoiser": objective.name, **sample} for sample in decoded]
    return samples


def _generate(
    objective: Objective, program: Program, params: PyTree, features: Features, count: int, store: Store
) -> list[Sample]:
    data, tokenizer = program.run.data, store.tokenizer
    prompt_form = objective_format(objective, data)
    halve = not prompt_form.ends_in_eos and objective.example_source != "preferences"
    examples = list(_examples(features, data, count, store.vocabulary.pad_id, halve=halve))
    predictions = generate_tokens(
        program,
        params,
        [inputs for inputs, _ in examples],
        allowed_V=prompt_form.allowed(store.vocabulary, program.run.model.vocab_size),
        # One limit for all objectives, so that they share the compiled program.
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
    features: Features, data: DataConfig, count: int, pad_id: int, *, halve: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (inputs, targets) of the first rows, without padding. `halve`: targets without inputs are split in two."""
    for row in range(count):
        stream = features["decoder_target_tokens"][row]
        scored = features["decoder_loss_weights"][row] > 0
        if not scored.any():
            return
        targets = stream[scored].tolist()
        if data.layout == "encoder_decoder":
            inputs = features["encoder_input_tokens"][row]
            yield inputs[inputs != pad_id].tolist(), targets
        elif halve:
            middle = len(targets) // 2
            yield targets[:middle], targets[middle:]
        else:
            yield stream[~scored & (stream != pad_id)].tolist(), targets


def _infill(program: Program, params: PyTree, features: Features, count: int, store: Store) -> list[Sample]:
    """Return a masked LM's most likely tokens with text at the selected positions."""
    text_V = np.arange(program.run.model.vocab_size) < store.vocabulary.base_size
    placed = program.shard_global_batch({"main": features})["main"]
    prediction_NxL = np.asarray(_argmax_tokens(program, params, placed, text_V))
    stack, samples = program.run.data.target_stack, []
    for row in range(count):
        tokens, chosen = features[f"{stack}_target_tokens"][row], features[f"{stack}_loss_weights"][row] > 0
        if not chosen.any():
            break
        present = tokens != store.vocabulary.pad_id
        gaps = chosen[present]
        before = ""
        if stack == "decoder" and "encoder_input_tokens" in features:
            # The text before the block, which ends in EOS.
            given = features["encoder_input_tokens"][row]
            before = store.tokenizer.decode(given[given != store.vocabulary.pad_id][:-1].tolist())
        samples.append(
            {
                "inputs": before + _with_gaps(tokens[present].tolist(), gaps, store.tokenizer),
                "targets": _in_gaps(tokens[present][gaps].tolist(), store.tokenizer),
                "prediction": _in_gaps(prediction_NxL[row][present][gaps].tolist(), store.tokenizer),
            }
        )
    return samples


@functools.partial(jax.jit, static_argnums=0)
def _argmax_tokens(
    program: Program, params: PyTree, features: Mapping[str, jax.Array], allowed_V: jax.Array
) -> jax.Array:
    with program.mesh_context():
        tokens_BxL = restrict(program.model(params)(features), allowed_V).argmax(axis=-1)
        return jax.lax.with_sharding_constraint(tokens_BxL, NamedSharding(program.mesh, PartitionSpec()))


def _with_gaps(tokens: Sequence[int], gaps: Sequence[bool] | npt.NDArray[np.bool_], tokenizer: Tokenizer) -> str:
    """Return the text with `<extra_id_k>` for its k-th gap; k may exceed the number of sentinels of the vocabulary."""
    parts, number = [], 0
    for token, gap in zip(tokens, gaps, strict=True):
        parts.append(f"<extra_id_{number}>".encode() if gap else tokenizer.to_bytes([token]))
        number += bool(gap)
    return b"".join(parts).decode("utf-8", errors="replace")


def _in_gaps(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return `<extra_id_k>` followed by the k-th token, for all k."""
    return "".join(f"<extra_id_{number}>{tokenizer.decode([token])}" for number, token in enumerate(tokens))
