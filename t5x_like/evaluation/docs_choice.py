"""A multiple-choice task out of a run's own held-out text: which of four continuations belongs to a beginning?

For models whose other benchmarks need a network: the questions are made from the store's validation split, always the
same ones, and lm-eval reads them as a local task. The wrong continuations are cut from other held-out documents in the
same way, so that chance is one in four.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from t5x_like.config import DataError
from t5x_like.data.store import Store
from t5x_like.run_directory import write_atomically

TASK = "docs_choice"
CHOICES = 4
_BEGINNING, _CONTINUATION = 40, 14
"""Words. A continuation begins with the space in front of its first word."""
_TRIES = 1000
"""For the wrong answers of a question; where all text is alike there are none, and it is left out."""
_WORD = re.compile(r"\s*\S+")

_YAML = """\
# Which of {choices} continuations belongs to the beginning? Made of held-out text by t5x_like; chance is {chance:.0%}.
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
    """Writes docs_choice.jsonl and docs_choice.yaml, for `--include-path`.

    Args:
      questions: At most; every stretch of text is used once.

    Returns:
      The task's name.

    Raises:
      DataError: the held-out text is too little for a question.
    """
    pieces = list(_pieces(store))
    documents = {number for number, _, _ in pieces}
    if len(documents) <= CHOICES:
        found = f"{len(documents)} held-out documents of at least {_BEGINNING + _CONTINUATION} words"
        raise DataError(f"{store.path}: found {found}, expected more than {CHOICES}")
    rng = np.random.default_rng(seed)
    lines = []
    for place in rng.permutation(len(pieces))[:questions]:
        document, beginning, right = pieces[place]
        wrong: list[str] = []
        for _ in range(_TRIES):
            other, _, text = pieces[rng.integers(len(pieces))]
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
        raise DataError(f"{store.path}: found held-out documents that are all alike, expected different ones")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{TASK}.jsonl"
    write_atomically(path, "".join(lines))
    described = _YAML.format(choices=CHOICES, chance=1 / CHOICES, task=TASK, path=json.dumps(str(path.absolute())))
    write_atomically(folder / f"{TASK}.yaml", described)
    return TASK


def _pieces(store: Store) -> Iterator[tuple[int, str, str]]:
    """(document, beginning, continuation), one after the other."""
    split = store.split("validation")
    offsets = split.offsets.astype(np.int64) if store.parts == 1 else np.zeros(1, np.int64)  # pairs are no documents
    for document, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        text = store.tokenizer.decode(split.tokens(first, last).tolist())
        words = _WORD.findall(text)
        for start in range(0, len(words) - _BEGINNING - _CONTINUATION + 1, _BEGINNING + _CONTINUATION):
            middle, end = start + _BEGINNING, start + _BEGINNING + _CONTINUATION
            yield document, "".join(words[start:middle]).lstrip(), "".join(words[middle:end])
