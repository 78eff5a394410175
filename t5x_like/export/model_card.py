"""Model card: README.md of an exported Hugging Face directory, written from the run."""

from __future__ import annotations

import json
from collections.abc import Iterator

from t5x_like import __version__
from t5x_like.data.store.prepare import open_stores
from t5x_like.data.store.token_store import Store
from t5x_like.errors import DataError
from t5x_like.evaluation import results_store
from t5x_like.model_loading import LoadedModel

_TASKS = {"encoder_decoder": "text2text-generation", "decoder": "text-generation", "encoder": "fill-mask"}
"""Pipelines of the hub by architecture."""


def model_card(loaded: LoadedModel, step: int, num_parameters: int, family: str, license_id: str | None) -> str:
    """Return the text of the card: what the run knows about data, training and scores, and nothing else.

    Args:
      loaded: A training run.
      step: Step of the parameters.
      num_parameters: Number of parameters.
      family: Model family of the export.
      license_id: Licence of the weights as the hub names it, such as "apache-2.0"; None: not stated.
    """
    run = loaded.run
    header = {
        "license": license_id or "unknown",
        "library_name": "transformers",
        "pipeline_tag": _TASKS[run.model.architecture],
        "tags": [family, "t5x_like"],
    }
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in header.items()), "---", "", f"# {run.name}", ""]
    lines += [
        f"A {run.model.architecture.replace('_', '-')} of {num_parameters:,} parameters, written as {family} by "
        f"t5x_like {__version__} from step {step:,} of {run.training.num_train_steps:,}.",
        "",
        "## Data",
        "",
        *_data(loaded),
        "",
        "## Training",
        "",
        *_training(loaded),
        "",
        "## Scores",
        "",
        *_scores(loaded, step),
        "",
    ]
    return "\n".join(lines)


def _data(loaded: LoadedModel) -> Iterator[str]:
    data = loaded.run.data
    if data.seqio is not None:
        yield f"The seqio Task or Mixture `{data.seqio.mixture_or_task}`."
        return
    stores: tuple[Store | None, ...]
    try:
        stores = open_stores(data)
    except DataError:
        stores = (None,) * len(data.sources)
    yield "| corpus | documents | tokens | bytes |"
    yield "|---|---|---|---|"
    for share, store in zip(data.sources, stores, strict=True):
        counts = ["unknown"] * 3
        if store is not None:
            split = store.split("train")
            counts = [f"{count:,}" for count in (split.num_documents, split.num_tokens, split.num_bytes)]
        yield f"| {' | '.join([share.name, *counts])} |"


def _training(loaded: LoadedModel) -> Iterator[str]:
    run = loaded.run
    data, training = run.data, run.training
    lengths = f"{data.inputs_length} + {data.targets_length}" if data.targets_length else f"{data.inputs_length}"
    names = ", ".join(f"{objective.name} (rate {objective.rate:g})" for objective in data.objectives)
    yield f"- objectives: {names or 'those of the Task'}; layout {data.layout}"
    yield f"- {training.global_batch_size:,} rows of {lengths} token positions in each step"
    yield f"- optimizer {training.optimizer.kind}, learning rate {training.schedule.learning_rate:g}"
    yield f"- seed of the data {data.seed}"


def _scores(loaded: LoadedModel, step: int) -> Iterator[str]:
    scores = results_store.scalars(results_store.read_evaluations(loaded.path).get(step, {}))
    if not scores:
        yield "No evaluation of this step is recorded."
        return
    yield "On the held-out text of the run:"
    yield ""
    yield "| score | value |"
    yield "|---|---|"
    for name, value in scores.items():
        yield f"| {name} | {value:.4g} |"
