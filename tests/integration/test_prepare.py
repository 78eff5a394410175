"""`prepare` end to end: existing stores, kills, simultaneous calls, changed files, seqio Tasks and TFDS."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t5x_like.config import CorpusConfig, CorpusShareConfig, DataConfig, TokenizerConfig, ul2
from t5x_like.data.sources import python_docs
from t5x_like.data.sources.document import Document
from t5x_like.data.sources.validation_split import assign_splits
from t5x_like.data.store.prepare import open_stores, prepare
from t5x_like.data.store.store_paths import store_paths
from t5x_like.data.store.token_store import Store, is_committed
from t5x_like.errors import DataError, SafetyError

REPOSITORY = Path(__file__).parents[2]
SENTENCES = [f"Sentence number {i} of document {i % 60}, which goes on for {i * i} more words.\n" for i in range(3000)]


def silent(line: str) -> None:
    del line


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Prepare a corpus of 60 documents in two files, with a small trained vocabulary."""
    for part in range(2):
        rows = [{"text": "".join(SENTENCES[i::60])} for i in range(part, 60, 2)]
        (tmp_path / f"part{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataConfig(
        corpus=CorpusConfig(files=(str(tmp_path / "*.jsonl"),), validation_fraction=0.1),
        tokenizer=TokenizerConfig(vocab_size=400, num_sentinels=64),
        layout="encoder_decoder",
        mixture=ul2(),
        inputs_length=64,
        targets_length=64,
        store_dir=str(tmp_path / "stores"),
    )


def documents(store: Store, split: str) -> list[str]:
    part = store.split(split)
    offsets = part.offsets.astype(int)
    tokens = part.tokens(0, part.num_tokens).tolist()
    assert all(tokens[stop - 1] == store.tokenizer.eos_id for stop in offsets[1:])
    return [store.tokenizer.decode(tokens[a : b - 1]) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def in_a_process(data: DataConfig, before: str = "") -> subprocess.Popen[str]:
    code = (
        f"{before}\nfrom t5x_like.config import *\nfrom t5x_like.data.store.prepare import prepare\nprepare({data!r})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_store_has_every_document_in_order_and_is_found_again(data: DataConfig) -> None:
    lines: list[str] = []
    (store,) = prepare(data, report=lines.append)
    texts = [
        json.loads(line)["text"]
        for part in range(2)
        for line in open(Path(data.store_dir).parent / f"part{part}.jsonl")
    ]
    divided = list(assign_splits([Document(text) for text in texts], 0.1))
    for split in ("train", "validation"):
        expected = [document.text for document in divided if document.split == split]
        assert documents(store, split) == expected
        assert store.split(split).num_bytes == sum(len(text.encode()) for text in expected)
    assert store.split("validation").num_documents == 6
    assert any("vocabulary of 467" in line for line in lines)

    before = {path: path.stat().st_mtime_ns for path in Path(data.store_dir).rglob("*")}
    lines.clear()
    Path(f"{store.path}.partial").mkdir()  # Left by a death after the store was renamed.
    (again,) = prepare(data, report=lines.append)
    assert again.fingerprint == store.fingerprint and lines == [f"{store.path}: already prepared"]
    after = {path: path.stat().st_mtime_ns for path in Path(data.store_dir).rglob("*") if path.suffix != ".lock"}
    assert after == {path: time for path, time in before.items() if path.suffix != ".lock"}
    assert open_stores(dataclasses.replace(data, seed=5, prefetch_batches=9))[0].path == store.path


def test_missing_store_error_names_prepare(data: DataConfig) -> None:
    with pytest.raises(DataError, match=r"no token store.*run `t5x-like prepare RECIPE` with the same options first"):
        open_stores(data)[0]


@pytest.mark.parametrize("moment", ["extend", "commit", "rename"])
def test_killed_prepare_resumes_to_the_same_store(data: DataConfig, moment: str) -> None:
    kill = {
        "extend": "token_store.StoreWriter.extend = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
        "commit": "token_store.StoreWriter.commit = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)",
        "rename": "token_store.sync_tree = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    }[moment]
    process = in_a_process(data, f"import os, signal\nfrom t5x_like.data.store import token_store\n{kill}")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    path = store_paths(data)[0]
    assert not path.exists() and path.with_name(path.name + ".partial").exists()
    with pytest.raises(DataError, match="an incomplete token store"):
        open_stores(data)[0]

    (resumed,) = prepare(data, report=silent)
    (undisturbed,) = prepare(dataclasses.replace(data, store_dir=data.store_dir + "2"), report=silent)
    assert resumed.fingerprint == undisturbed.fingerprint
    for file in ("train/tokens/c/0", "train/offsets/c/0", "validation/tokens/c/0", "tokenizer.model", "info.json"):
        assert (resumed.path / file).read_bytes() == (undisturbed.path / file).read_bytes(), file
    assert not path.with_name(path.name + ".partial").exists()


def test_two_simultaneous_calls_make_one_store(data: DataConfig) -> None:
    slow = "import time\nfrom t5x_like.data.store import token_store\nreal = token_store.sync_tree\n"
    slow += "token_store.sync_tree = lambda folder: (time.sleep(1.0), real(folder))"
    processes = [in_a_process(data, slow) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    built = [": prepared in " in output for output, _ in outputs]
    assert sorted(built) == [False, True]
    assert is_committed(store_paths(data)[0])


def test_changed_files_make_a_new_store_and_missing_files_use_the_existing_one(data: DataConfig) -> None:
    (first,) = prepare(data, report=silent)
    changed = Path(data.store_dir).parent / "part1.jsonl"
    text = changed.read_text()
    changed.unlink()
    (other := changed.with_name("part0.jsonl")).rename(changed.with_name("elsewhere"))
    assert open_stores(data)[0].path == first.path
    changed.with_name("elsewhere").rename(other)
    changed.write_text(text + '{"text": "one more document"}\n')
    (second,) = prepare(data, report=silent)
    assert second.path != first.path and second.fingerprint != first.fingerprint
    for path in (changed, other):
        path.unlink()
    with pytest.raises(DataError, match="found no file that matches"):
        open_stores(data)[0]


def test_corpus_too_small_for_its_vocabulary_is_refused_and_leaves_no_files(data: DataConfig) -> None:
    greedy = dataclasses.replace(data, tokenizer=TokenizerConfig(vocab_size=30_000))
    with pytest.raises(DataError, match=r"vocab_size: found 30000, expected at most \d+, which is what the corpus has"):
        prepare(greedy, report=silent)
    assert {path.suffix for path in Path(data.store_dir).iterdir()} <= {".lock", ".json"}


def test_unwritable_folder_is_reported(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written.*--data.store-dir"):
        prepare(dataclasses.replace(data, store_dir=str(tmp_path / "file" / "stores")), report=silent)


def test_mixture_shares_one_tokenizer(data: DataConfig, tmp_path: Path) -> None:
    shares = tuple(
        CorpusShareConfig(
            name=f"part{part}",
            corpus=CorpusConfig(files=(str(tmp_path / f"part{part}.jsonl"),), validation_fraction=0.1),
        )
        for part in range(2)
    )
    mixed = dataclasses.replace(data, corpora=shares)
    lines: list[str] = []
    stores = prepare(mixed, report=lines.append)
    assert [store.path for store in stores] == list(store_paths(mixed))
    assert len({store.tokenizer.fingerprint for store in stores}) == 1
    assert sum("training a SentencePiece" in line for line in lines) == 1
    alone = prepare(dataclasses.replace(data, corpora=shares[:1]), report=silent)
    assert alone[0].path != stores[0].path, "its vocabulary is trained on less text"
    assert [store.path for store in open_stores(mixed)] == [store.path for store in stores]

    # One of the stores is made with another tokenizer.
    shutil.rmtree(stores[1].path)
    other = dataclasses.replace(mixed, tokenizer=TokenizerConfig(vocab_size=380, num_sentinels=64))
    prepare(other, report=silent)[1].path.rename(stores[1].path)
    with pytest.raises(SafetyError, match=r"disagree: found the tokenizers .*of 467 ids.*of 447 ids"):
        open_stores(mixed)


def test_text_files_are_prepared_without_tensorflow(data: DataConfig) -> None:
    check = "import atexit, sys\natexit.register(lambda: print('tensorflow' in sys.modules, 'jax' in sys.modules))"
    output, _ = in_a_process(data, check).communicate()
    assert output.strip().endswith("False False")


MODULE = """
import os
import seqio, tensorflow as tf, tensorflow_datasets as tfds
from t5x_like.data.seqio_.python_docs_task import register_python_docs

TEXTS = {"train": [f"text {i} é" for i in range(30)], "validation": ["held out", ""]}

def dataset(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"targets": TEXTS[split]})

FEATURES = {"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=True)}
register_python_docs("python_docs_small", packages=False)
seqio.TaskRegistry.add("tokenised", seqio.FunctionDataSource(dataset, splits=["train", "validation"]),
    preprocessors=[lambda ds: seqio.preprocessors.tokenize(ds, FEATURES, copy_pretokenized=False),
                   seqio.preprocessors.append_eos], output_features=FEATURES)
seqio.TaskRegistry.add("kept", seqio.FunctionDataSource(dataset, splits=["train", "validation"]),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos], output_features=FEATURES)

def labels(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"label": [[1], [2]]})

LABELS = {"label": seqio.Feature(seqio.PassThroughVocabulary(3), add_eos=False)}
seqio.TaskRegistry.add("other", seqio.FunctionDataSource(labels, splits=["train"]), LABELS, [])
seqio.TaskRegistry.add("corrupting", seqio.FunctionDataSource(dataset, splits=["train"]), FEATURES, [
    seqio.preprocessors.tokenize, lambda ds, sequence_length: ds.take(sequence_length["targets"])])
seqio.MixtureRegistry.add("both", ["tokenised", "kept"], default_rate=1.0)

class TinyTexts(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"body": tfds.features.Text()}))
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(30):
            yield i, {"body": f"text {i} é"}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_tasks.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    return "users_tasks"


@pytest.mark.slow
def test_seqio_tasks_mixtures_and_tfds_are_prepared(data: DataConfig, module: str) -> None:
    """One process prepares all stores, since importing TensorFlow takes longer than the rest."""

    def named(**corpus: object) -> DataConfig:
        corpus = {"module": module, "validation_fraction": 0.0} | corpus
        return dataclasses.replace(data, corpus=CorpusConfig(**corpus), tokenizer=TokenizerConfig(kind="bytes"))

    configs = {
        "tokenised": named(task="tokenised"),
        "kept": named(task="kept"),
        "both": named(task="both"),
        "tfds": named(tfds="tiny_texts", text_field="body"),
        "python_docs": named(task="python_docs_small", validation_fraction=0.02),
    }
    bad = {
        r"found 'absent'.*expected a registered Task or Mixture": named(task="absent"),
        r"found 'no_such_module', which cannot be imported": named(task="kept", module="no_such_module"),
        r"found the features 'label', expected 'targets' or 'text'": named(task="other"),
        r"'corrupting'.*cannot be read without sequence lengths": named(task="corrupting"),
        r"found the features 'body', expected 'text'": named(tfds="tiny_texts"),
        r"data.corpus.tfds: found 'no_such_dataset'": named(tfds="no_such_dataset"),
    }
    code = f"""
from t5x_like.config import *
from t5x_like.errors import ConfigError, DataError
from t5x_like.data.store.prepare import prepare
for config in {list(configs.values())!r}:
    prepare(config)
for config in {list(bad.values())!r}:
    try:
        prepare(config)
    except DataError as error:
        print("REFUSED", str(error).replace("\\n", " "))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    refused = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(refused) == len(bad)
    for pattern, line in zip(bad, refused, strict=True):
        assert re.search(pattern, line), line

    texts = [f"text {i} é" for i in range(30)]
    for name in ("tokenised", "kept"):
        store = open_stores(configs[name])[0]
        assert documents(store, "train") == texts and documents(store, "validation") == ["held out"]
        assert store.info["left_out"] == {"empty": 1}
    assert sorted(set(documents(open_stores(configs["both"])[0], "train"))) == sorted(texts)
    assert sorted(documents(open_stores(configs["tfds"])[0], "train")) == sorted(texts)

    # The embedded corpus gives the same tokens as a Task and directly.
    embedded = dataclasses.replace(
        configs["python_docs"], corpus=CorpusConfig(packages=False, validation_fraction=0.02)
    )
    (direct,), task = prepare(embedded, report=silent), open_stores(configs["python_docs"])[0]
    for split in ("train", "validation"):
        one, two = direct.split(split), task.split(split)
        assert np.array_equal(one.offsets, two.offsets)
        assert np.array_equal(one.tokens(0, one.num_tokens), two.tokens(0, two.num_tokens))
    assert direct.split("train").num_documents + direct.split("validation").num_documents == len(
        python_docs.read(False)
    )
