"""Labelled examples: rows by index, labels by name, and refusal of invalid labels with their line."""

import dataclasses
import json

import numpy as np
import pytest
from helpers.config_examples import changed
from helpers.task_head_examples import LABELS, labeled_run, with_head

from t5x_like.config import LabeledExamples, batch_spec, evaluation_spec
from t5x_like.config.validation import validate
from t5x_like.data.inspection.console_view import inspect, mixture_table
from t5x_like.data.store.prepare import prepare
from t5x_like.data.stream import heldout
from t5x_like.data.stream.labeled_rows import split_labels
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.tokenizers.vocabulary import EOS_ID
from t5x_like.decoding.prompt_format import prompt_format
from t5x_like.errors import ConfigError, DataError

LAYOUTS = ["encoder", "causal_lm", "prefix_lm"]


def prepared(tmp_path, pairs, kind="classification", layout="encoder", **objective):
    """Return the data configuration and the stores of a run over these (text, label) pairs."""
    lines = [json.dumps({"text": text, "label": label}) for text, label in pairs]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    of = {"classification": "label", "token_classification": "token_labels", "regression": "number"}
    run = labeled_run()
    data = dataclasses.replace(
        run.data,
        corpus=dataclasses.replace(
            run.data.corpus,
            files=(str(tmp_path / "texts.jsonl"),),
            target_kind=of.get(kind, "text"),
            labels=LABELS if "classification" in kind else (),
            validation_fraction=0.25,
        ),
        mixture=(LabeledExamples(kind=kind, **objective),),
        layout=layout,
        store_dir=str(tmp_path / "stores"),
    )
    return data, prepare(data, report=lambda line: None)


def texts(stores, features, name="encoder"):
    return [stores[0].tokenizer.decode(row[row != 0].tolist()) for row in features[f"{name}_input_tokens"]]


PAIRS = [(f"text {number} of a colour", LABELS[number % 3]) for number in range(40)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_epoch_contains_every_pair_once_with_its_label(tmp_path, layout):
    data, stores = prepared(tmp_path, PAIRS, layout=layout)
    stream = TrainingStream(stores, data, batch_size=5)
    count = stream.rows_per_epoch["files"]
    name = "encoder" if layout == "encoder" else "decoder"
    first, second = (stream.get_rows(np.arange(count) + epoch * count) for epoch in range(2))
    held_out = list(heldout.objective_batches(stores[0], data, data.sources[0], 4, data.mixture[0], 9))
    weights = np.concatenate([batch["main"]["label_weights"] for batch in held_out])
    assert count + weights.sum() == 40
    for features in (first, second):
        found = list(zip(texts(stores, features, name), features["labels"].tolist(), strict=True))
        assert len(set(found)) == count
        assert {(text, LABELS[label]) for text, label in found} <= set(PAIRS)
        rows = features[f"{name}_input_tokens"]
        assert all(row[row != 0][-1] == EOS_ID for row in rows)
        assert layout == "encoder" or not rows[:, 0].any()
        if layout == "prefix_lm":
            np.testing.assert_array_equal(features["decoder_causal_attention"][:, 1:], rows[:, 1:] != 0)
    assert texts(stores, first, name) != texts(stores, second, name)


@pytest.mark.parametrize("kind", ["classification", "token_classification", "regression", "embedding"])
def test_batches_match_the_batch_spec(tmp_path, kind):
    label = {"token_classification": "red red blue", "regression": 0.5, "embedding": "its pair"}.get(kind, "red")
    data, stores = prepared(tmp_path, [(f"a b {number}", label) for number in range(30)], kind)
    run = dataclasses.replace(labeled_run(), data=data)
    batch = TrainingStream(stores, data, 8).batch(3)
    held_out = next(heldout.objective_batches(stores[0], data, data.sources[0], 8, data.mixture[0], 1))
    for made, spec in ((batch, batch_spec(run)), (held_out, evaluation_spec(run))):
        assert {name: (x.shape, str(x.dtype)) for name, x in made["main"].items()} == {
            name: (x.shape, x.dtype) for name, x in spec["main"].items()
        }
    if kind == "regression":
        assert (batch["main"]["labels"] == 0.5).all()
    if kind == "embedding":
        assert set(texts(stores, batch["main"], "positive")) == {"its pair"}


@pytest.mark.parametrize("kind", ["classification", "embedding"])
def test_examples_that_are_cut_are_counted(tmp_path, kind):
    """Rows hold 31 bytes and EOS. The other text of an embedding is read as well; a label is not."""
    short = [(f"row {number}", "red") for number in range(9)]
    long = [("x" * 31, "red"), ("y" * 32, "red"), ("z", "green" if kind == "classification" else "z" * 32)]
    data, stores = prepared(tmp_path, [*short, *long], kind)
    split = {name: TrainingStream(stores, data, 4, name) for name in ("train", "validation")}
    expected = {"classification": 1, "embedding": 2}[kind]
    assert sum(stream.sources[0].reader.num_truncated for stream in split.values()) == expected
    notes = " ".join(str(mixture_table(stream).caption) for stream in split.values())
    assert "examples have a text that is longer than a row: it is truncated" in notes


def with_negatives(tmp_path, rows, **fields):
    """Return the data configuration and the stores of rows with hard negatives in the field `hard`."""
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = labeled_run()
    corpus = dataclasses.replace(
        run.data.corpus,
        files=(str(tmp_path / "texts.jsonl"),),
        target_kind="text",
        labels=(),
        negative_fields=("hard",),
        validation_fraction=0.25,
        **fields,
    )
    data = dataclasses.replace(
        run.data, corpus=corpus, mixture=(LabeledExamples(kind="embedding"),), store_dir=str(tmp_path / "stores")
    )
    model = dataclasses.replace(with_head("embedding"), vocab_size=300)
    assert not validate(dataclasses.replace(run, model=model, data=data))
    return data, prepare(data, report=lambda line: None)


HARD: list[object] = [["far 0", "other 0"], "far 1", [], None, ["far 4"]]


def test_hard_negatives_are_one_or_several_texts_of_a_row(tmp_path, capsys):
    rows = [{"text": f"row {n}", "label": f"near {n}", "hard": HARD[n % 5]} for n in range(50)]
    data, stores = with_negatives(tmp_path, rows, num_negatives=2)
    run = dataclasses.replace(labeled_run(), data=data)
    stream = TrainingStream(stores, data, 8)
    batch = stream.batch(0)["main"]
    assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in batch_spec(run)["main"].items()
    }
    features = stream.get_rows(np.arange(stream.rows_per_epoch["files"]))
    columns = [texts(stores, features, name) for name in ("encoder", "positive", "negative_1", "negative_2")]
    weights = np.stack([features["negative_1_weights"], features["negative_2_weights"]], axis=1)
    for text, positive, *found, present in zip(*columns, weights, strict=True):
        number = int(text.split()[1])
        expected = HARD[number % 5] or []
        expected = [expected] if isinstance(expected, str) else expected
        assert positive == f"near {number}"
        assert found == [*expected, "", ""][:2] and present.tolist() == [int(bool(text)) for text in found]
    inspect(run, rows=5)
    assert "negative 1 [" in capsys.readouterr().out


@pytest.mark.parametrize(
    "hard, message",
    [
        (["a", "b", "c"], r"texts.jsonl:31: found 3 hard negatives in 'hard', expected at most 2; .*num-negatives 3"),
        (["near"], "texts.jsonl:31: found the text of 'label', 'near', among the hard negatives"),
        ([1], "texts.jsonl:31: found 'hard' of type number, expected a string"),
    ],
)
def test_invalid_hard_negatives_are_refused_with_their_line(tmp_path, hard, message):
    rows = [{"text": f"row {n}", "label": "near", "hard": "far"} for n in range(30)]
    with pytest.raises(DataError, match=message):
        with_negatives(tmp_path, [*rows, {"text": "a", "label": "near", "hard": hard}], num_negatives=2)


def test_pairs_that_differ_in_their_negatives_are_in_one_split(tmp_path):
    rows = [{"text": f"row {n // 4}", "label": "near", "hard": f"far {n}"} for n in range(80)]
    _, stores = with_negatives(tmp_path, rows)
    documents = [stores[0].split(split).num_documents for split in ("train", "validation")]
    assert sum(documents) == 80 and documents[1] and not any(count % 4 for count in documents)


@pytest.mark.parametrize(
    "changes, expected_path",
    [
        ({"num_negatives": 2}, "data.corpus.negative_fields"),
        ({"negative_fields": ("{a",)}, "data.corpus.negative_fields.0"),
        ({"negative_fields": ("hard",)}, "data.corpus.negative_fields"),  # For classification.
    ],
)
def test_hard_negatives_of_other_data_are_refused(changes, expected_path):
    run = labeled_run()
    run = dataclasses.replace(
        run, data=dataclasses.replace(run.data, corpus=dataclasses.replace(run.data.corpus, **changes))
    )
    assert expected_path in [problem.where for problem in validate(run)]


def test_word_label_is_at_first_token_and_truncated_words_have_none(tmp_path):
    data, stores = prepared(tmp_path, [(" ab  c\tdef gh", "red green blue red")] * 30, "token_classification")
    features = TrainingStream(stores, dataclasses.replace(data, inputs_length=11), 2).batch(0)["main"]
    found = [
        (position, LABELS[features["labels"][0, position]]) for position in np.flatnonzero(features["label_weights"][0])
    ]
    assert found == [(1, "red"), (5, "green"), (7, "blue")]


@pytest.mark.parametrize(
    "kind, bad, message",
    [
        ("classification", ("a", "gren"), r"texts.jsonl:31: found the label 'gren' in 'label' \(perhaps 'green'\)"),
        ("token_classification", ("a b", "red"), "texts.jsonl:31: found 1 labels in 'label' for 2 words"),
        ("regression", ("a", "many"), "texts.jsonl:31: found 'many' in 'label', expected a finite number"),
        ("regression", ("a", "nan"), "texts.jsonl:31: found 'nan'"),
    ],
)
def test_invalid_label_is_refused_with_its_line(tmp_path, kind, bad, message):
    good = {"regression": 1}.get(kind, "red")
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, [("a", good)] * 30 + [bad], kind)


def test_labels_are_read_without_their_spaces_if_only_one_sequence_spells_them():
    names = {"o": 0, "b-per": 1, "i-per": 2, "oo": 3}
    assert split_labels("b - per i - per o b - per", names) == [1, 2, 0, 1]
    assert split_labels("", names) == []
    with pytest.raises(DataError, match="'o o', which is several sequences of o, b-per, i-per, oo"):
        split_labels("o o", names)
    with pytest.raises(DataError, match="no sequence"):
        split_labels("b - per" * 2000 + "x", names)


def test_mode_token_precedes_the_text(tmp_path):
    data, stores = prepared(tmp_path, PAIRS, mode="R")
    rows = TrainingStream(stores, data, 4).batch(0)["main"]["encoder_input_tokens"]
    assert (rows[:, 0] == stores[0].vocabulary.mode_id("R")).all()


def test_inspect_shows_rows_with_labels_and_generate_is_refused(tmp_path, capsys):
    data, _ = prepared(tmp_path, PAIRS)
    inspect(dataclasses.replace(labeled_run(), data=data), rows=2)
    assert "label: " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="head of kind classification"):
        prompt_format(data, None)


def test_label_fields_do_not_change_names_of_other_stores():
    corpus = labeled_run().data.corpus
    plain = changed(changed(corpus, "labels", ()), "target_kind", "text")
    assert {"labels", "target_kind"}.isdisjoint(plain.described()) and corpus.described()["labels"] == LABELS
