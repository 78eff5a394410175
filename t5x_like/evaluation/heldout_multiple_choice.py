"""Multiple-choice task from a run's held-out text: which of four continuations follows a given beginning?

It serves models for which no other benchmark is available without a network. The questions are built deterministically
from the store's validation split, and lm-eval reads them as a local task. The wrong continuations come from other
held-out documents, so that chance accuracy is one in four.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from t5x_like.data.store.token_store import Store
from t5x_like.errors import DataError
from t5x_like.utils.atomic_write import write_atomically

TASK = "docs_choice"
CHOICES = 4
_BEGINNING, _CONTINUATION = 40, 14
"""Numbers of words. A continuation begins with the space before its first word."""
_MAX_DRAWS = 1000
"""Largest number of draws for the wrong answers of a question. If they do not suffice, the question is left out."""
_WORD = re.compile(r"\s*\S+")

_YAML = """\
# Which of {choices} continuations follows the beginning? From held-out text, by t5x_like; chance is {chance:.0%}.
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: beginning
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
  - metric: acc_mutual_info
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def write_docs_choice(store: Store, folder: Path, *, questions: int = 400, seed: int = 0) -> str:
    """Write docs_choice.jsonl and docs_choice.yaml, for `--include-path`.

    Args:
      questions: Largest number of questions; each excerpt of text is used for one question.

    Returns:
      The name of the task.

    Raises:
      DataError: there is too little held-out text, or all of it is equal.
    """
    excerpts = list(_excerpts(store))
    documents = {number for number, _, _ in excerpts}
    if len(documents) <= CHOICES:
        found = f"{len(documents)} held-out documents of at least {_BEGINNING + _CONTINUATION} words"
        raise DataError(f"{store.path}: found {found}, expected more than {CHOICES}")
    rng = np.random.default_rng(seed)
    lines = []
    for index in rng.permutation(len(excerpts))[:questions]:
        document, beginning, right = excerpts[index]
        wrong: list[str] = []
        for _ in range(_MAX_DRAWS):
            other, _, text = excerpts[rng.integers(len(excerpts))]
            if other != document and text != right and text not in wrong:
                wrong.append(text)
            if len(wrong) == CHOICES - 1:
                break
        else:
            continue
        label = int(rng.integers(CHOICES))
        choices = [*wrong[:label], right, *wrong[label:]]
        lines.append(json.dumps({"beginning": beginning, "choices": choices, "label": label}) + "\n")
    if not lines:
        raise DataError(f"{store.path}: found held-out documents that are all equal, expected different ones")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{TASK}.jsonl"
    write_atomically(path, "".join(lines))
    description = _YAML.format(choices=CHOICES, chance=1 / CHOICES, task=TASK, path=json.dumps(str(path.absolute())))
    write_atomically(folder / f"{TASK}.yaml", description)
    return TASK


def _excerpts(store: Store) -> Iterator[tuple[int, str, str]]:
    """Yield (document number, beginning, continuation) of consecutive excerpts."""
    split = store.split("validation")
    # The sequences of (inputs, targets) pairs are not documents.
    has_documents = store.sequences_per_document == 1
    offsets = split.offsets.astype(np.int64) if has_documents else np.zeros(1, np.int64)
    for document, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        text = store.tokenizer.decode(split.tokens(first, last).tolist())
        words = _WORD.findall(text)
        for start in range(0, len(words) - _BEGINNING - _CONTINUATION + 1, _BEGINNING + _CONTINUATION):
            middle, end = start + _BEGINNING, start + _BEGINNING + _CONTINUATION
            yield document, "".join(words[start:middle]).lstrip(), "".join(words[middle:end])
