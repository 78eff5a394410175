"""Unmodified seqio Tasks of a user: the store has exactly their ids, or the text they kept, or the Task is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5x_like.config import CorpusConfig, CorpusShareConfig, DataConfig, Supervised, TokenizerConfig
from t5x_like.data.store.prepare import open_stores
from t5x_like.data.store.token_store import Store
from t5x_like.data.tokenizers.train_vocabulary import train_sentencepiece

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.slow
LINES = [f"Line {i} has words that come again, {i * i % 17} of them, and an é." for i in range(90)]

MODULE = """
import functools, os
import numpy as np, seqio, tensorflow as tf, tensorflow_datasets as tfds

FOLDER = os.path.dirname(__file__)
PIECES = seqio.SentencePieceVocabulary(os.path.join(FOLDER, "task.model"), extra_ids=20)
BYTES = seqio.ByteVocabulary(extra_ids=100)

def feature(vocabulary):
    return seqio.Feature(vocabulary, add_eos=True)

def from_slices(split, shuffle_files, seed=None, *, examples):
    return tf.data.Dataset.from_tensor_slices(examples)

def add(name, features, preprocessors, examples=None, source=None):
    source = source or seqio.FunctionDataSource(functools.partial(from_slices, examples=examples), splits=["train"])
    seqio.TaskRegistry.add(name, source, preprocessors=preprocessors, output_features=features)

tokenize = seqio.preprocessors.tokenize
forget = functools.partial(tokenize, copy_pretokenized=False)
eos = seqio.preprocessors.append_eos_after_trim

# Three files, each a shard.
lines = seqio.TextLineDataSource({"train": os.path.join(FOLDER, "lines-*.txt")})
to_targets = lambda dataset: dataset.map(lambda line: {"targets": line})
add("pieces", {"targets": feature(PIECES)}, [to_targets, forget, seqio.CacheDatasetPlaceholder(), eos], source=lines)
add("kept", {"targets": feature(PIECES)}, [to_targets, tokenize, eos], source=lines)

QUESTIONS = {"question": ["one?", "", "three é?"], "answer": ["1", "2", "3"]}
to_pairs = lambda ds: ds.map(lambda x: {"inputs": x["question"], "targets": x["answer"]})
PAIR = {"inputs": feature(BYTES), "targets": feature(BYTES)}
add("pairs", PAIR, [to_pairs, forget, eos], examples=QUESTIONS)
add("pairs_kept", PAIR, [to_pairs, tokenize, eos], examples=QUESTIONS)

IDS = {"targets": seqio.Feature(BYTES, add_eos=False)}
add("padded", IDS, [], examples={"targets": np.array([[5, 6, 1, 0], [358, 8, 9, 1]], np.int32)})
add("holes", IDS, [], examples={"targets": np.array([[5, 0, 6, 7, 1]], np.int32)})
add("beyond", IDS, [], examples={"targets": np.array([[5, 359]], np.int32)})
add("numbers", {"targets": seqio.Feature(seqio.PassThroughVocabulary(30), add_eos=False)}, [],
    examples={"targets": np.array([[5, 9]], np.int32)})
seqio.MixtureRegistry.add("mixed", [("pieces", 3), ("kept", 1)])

class Trivia(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"q": text, "a": text}))
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(40)), "validation": self._generate_examples(range(40, 44))}
    def _generate_examples(self, numbers):
        for i in numbers:
            yield i, {"q": f"question {i} é?", "a": f"answer {i}"}
"""

MAIN = """
import json, sys
import numpy as np
from t5x_like.config import *
from t5x_like.errors import ConfigError, DataError
from t5x_like.data.sources import work_units
from t5x_like.data.store import prepare as preparing
work_units.MIN_UNIT_BYTES = 300
good, bad, spread = {good!r}, {bad!r}, {spread!r}
for config in good:
    preparing.prepare(config, report=lambda line: None)
preparing.SMALL_BYTES = 0
preparing.prepare(spread, report=lambda line: None, workers=2)
for config in bad:
    try:
        preparing.prepare(config, report=lambda line: None)
        print("MADE", config)
    except (DataError, ConfigError) as error:
        print("REFUSED", str(error).replace("\\n", " "))
import seqio, users_tasks

task = seqio.get_mixture_or_task("pieces")
found = []
for shard in range(3):
    info = seqio.ShardInfo(index=shard, num_shards=3)
    dataset = task.get_dataset(None, "train", shuffle=False, num_epochs=1, shard_info=info)
    found += [example["targets"].tolist() for example in dataset.as_numpy_iterator()]
print("IDS", json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "users_tasks.py").write_text(MODULE)
    (folder / "task.model").write_bytes(train_sentencepiece(LINES * 3, 300))
    for number in range(3):
        (folder / f"lines-{number}.txt").write_text("\n".join(LINES[30 * number : 30 * number + 30]) + "\n")
    return folder


def config(folder: Path, tokenizer: TokenizerConfig, *corpora: CorpusConfig) -> DataConfig:
    shares = tuple(CorpusShareConfig(name=str(index), corpus=corpus) for index, corpus in enumerate(corpora))
    return DataConfig(
        corpora=shares,
        tokenizer=tokenizer,
        layout="encoder_decoder",
        mixture=(Supervised(),),
        inputs_length=8,
        targets_length=8,
        store_dir=str(folder / "stores"),
    )


def named(task: str, **fields: Any) -> CorpusConfig:
    return CorpusConfig(task=task, module="users_tasks", **{"validation_fraction": 0.0, **fields})


def documents(store: Store, split: str = "train") -> list[list[int]]:
    """Return the token sequences of a store."""
    part = store.split(split)
    offsets = part.offsets.astype(int).tolist()
    tokens = part.tokens(0, part.num_tokens).tolist()
    return [tokens[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def encoded(store: Store, texts: list[str]) -> list[list[int]]:
    return [store.tokenizer.encode(text) for text in texts]


def test_tasks_keep_their_ids_or_are_refused(folder: Path) -> None:
    """One process prepares all stores, since importing TensorFlow takes longer than the rest."""
    of_tfds: dict[str, Any] = {"tfds": "trivia", "module": "users_tasks", "text_field": "a"}
    of_task, of_bytes = TokenizerConfig(kind="task", num_sentinels=20), TokenizerConfig(kind="bytes", num_sentinels=100)
    pairs: dict[str, Any] = {"inputs_field": "inputs"}
    good = {
        "pieces": config(folder, of_task, named("pieces")),
        "re-encoded": config(folder, of_bytes, named("kept")),
        "pairs": config(folder, of_task, named("pairs", **pairs)),
        "pairs re-encoded": config(folder, of_bytes, named("pairs_kept", **pairs)),
        "padded": config(folder, of_bytes, named("padded")),
        "mixture": config(folder, of_task, named("mixed", validation_fraction=0.1)),
        "tfds": config(folder, of_bytes, CorpusConfig(**of_tfds, inputs_field="q")),
        "first": config(folder, of_bytes, CorpusConfig(**of_tfds, max_documents=3)),
    }
    spread = dataclasses.replace(good["pieces"], store_dir=str(folder / "spread"))
    bad = {
        r"ids of another vocabulary.*'targets' of 'pieces'.*--data.tokenizer.kind task.*copy_pretokenized": config(
            folder, of_bytes, named("pieces")
        ),
        r"found the id 0 inside the feature 'targets' of 'holes', expected padding at the end only": config(
            folder, of_bytes, named("holes")
        ),
        r"found the id 359 inside the feature 'targets' of 'beyond', expected ids below 359": config(
            folder, of_bytes, named("beyond")
        ),
        r"Task 'numbers' with PassThroughVocabulary.*--data.tokenizer.path": config(folder, of_task, named("numbers")),
        r"Tasks whose vocabularies differ \('pieces' of 323 ids, 'pairs' of 362 ids\)": config(
            folder, of_task, named("pieces"), named("pairs", **pairs)
        ),
        r"num_sentinels: found 30, expected at most the 20 extra ids": config(
            folder, TokenizerConfig(kind="task", num_sentinels=30), named("pieces")
        ),
        r"found the features 'targets', expected 'inputs'": config(folder, of_bytes, named("padded", **pairs)),
        r"found the features 'a', 'q', expected 'question'": config(
            folder, of_bytes, CorpusConfig(**of_tfds, inputs_field="question")
        ),
    }
    code = MAIN.format(good=list(good.values()), bad=list(bad.values()), spread=spread)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)]),
        "TFDS_DATA_DIR": str(folder / "tfds"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [line for line in done.stdout.splitlines() if line.startswith(("REFUSED", "MADE"))]
    assert len(answers) == len(bad)
    for pattern, line in zip(bad, answers, strict=True):
        assert re.search(pattern, line), line
    ids = json.loads(done.stdout.split("IDS ")[1])

    stores = {name: open_stores(data)[0] for name, data in good.items()}
    # The ids of the Task, including EOS, and its vocabulary, by one process and by two.
    pieces = stores["pieces"]
    assert documents(pieces) == ids and len(ids) == 90
    assert [pieces.tokenizer.decode(document[:-1]) for document in documents(pieces)] == LINES
    assert (pieces.vocabulary.base_size, pieces.vocabulary.num_sentinels) == (300, 20)
    assert pieces.split("train").num_bytes == sum(len(line.encode()) for line in LINES)
    (other,) = open_stores(spread)
    for file in ("info.json", "tokenizer.model", "train/tokens/c/0", "train/offsets/c/0"):
        assert (Path(str(pieces.path)) / file).read_bytes() == (Path(str(other.path)) / file).read_bytes(), file
    assert documents(stores["re-encoded"]) == [[*line, 1] for line in encoded(stores["re-encoded"], LINES)]

    # Pairs, without EOS between them. A pair with empty inputs would shift the segments of the later pairs of its row.
    sides = ["one?", "1", "three é?", "3"]
    for name in ("pairs", "pairs re-encoded"):
        store = stores[name]
        assert store.sequences_per_document == 2 and store.split("train").num_documents == 2
        assert documents(store) == encoded(store, sides)
        assert store.info["left_out"] == {"empty": 1}
    assert stores["pairs"].vocabulary == stores["pairs re-encoded"].vocabulary

    assert documents(stores["padded"]) == [[5, 6, 1], [358, 8, 9, 1]], "358 is the first of the Task's sentinels"
    # A Mixture: each of its Tasks is read once, and reading continues when the first of them ends.
    both = documents(stores["mixture"]) + documents(stores["mixture"], "validation")
    assert sorted(both) == sorted(ids + ids)
    trivia = stores["tfds"]
    found = [trivia.tokenizer.decode(side) for side in documents(trivia)]
    assert sorted(zip(found[::2], found[1::2], strict=True)) == sorted(
        (f"question {i} é?", f"answer {i}") for i in range(40)
    )
    assert trivia.split("validation").num_documents == 4
    assert stores["first"].split("train").num_documents == stores["first"].split("validation").num_documents == 3
    assert np.all(trivia.split("train").offsets[1:] > trivia.split("train").offsets[:-1])
