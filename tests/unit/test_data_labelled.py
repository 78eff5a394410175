"""Labelled examples: rows by index, labels by name, and what is refused with its line."""

import dataclasses
import json

import numpy as np
import pytest
from config_examples import changed
from test_heads import LABELS, labelled_run

from t5x_like.config import DataError, Labelled, batch_spec, evaluation_spec
from t5x_like.config.errors import ConfigError
from t5x_like.data import validation
from t5x_like.data.describe import inspect
from t5x_like.data.prepare import prepare
from t5x_like.data.stream import Stream
from t5x_like.data.vocabulary import EOS_ID
from t5x_like.decoding.prompts import prompt_format

LAYOUTS = ["encoder", "causal_lm", "prefix_lm"]


def prepared(tmp_path, pairs, kind="classification", layout="encoder", **objective):
    """The data of a run over these (text, label) pairs, with its stores."""
    lines = [json.dumps({"text": text, "label": label}) for text, label in pairs]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    of = {"classification": "label", "token_classification": "token_labels", "regression": "number"}
    run = labelled_run()
    data = dataclasses.replace(
        run.data,
        corpus=dataclasses.replace(
            run.data.corpus,
            files=(str(tmp_path / "texts.jsonl"),),
            target_kind=of.get(kind, "text"),
            labels=LABELS if "classification" in kind else (),
            validation_fraction=0.25,
        ),
        mixture=(Labelled(kind=kind, **objective),),
        layout=layout,
        store=str(tmp_path / "stores"),
    )
    return data, prepare(data, report=lambda line: None)


def texts(stores, features, name="encoder"):
    return [stores[0].tokenizer.decode(row[row != 0].tolist()) for row in features[f"{name}_input_tokens"]]


PAIRS = [(f"text {number} of a colour", LABELS[number % 3]) for number in range(40)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_epoch_has_every_pair_once_with_its_label(tmp_path, layout):
    data, stores = prepared(tmp_path, PAIRS, layout=layout)
    stream = Stream(stores, data, batch_size=5)
    count = stream.rows_per_epoch["files"]
    name = "encoder" if layout == "encoder" else "decoder"
    first, second = (stream.rows(np.arange(count) + epoch * count) for epoch in range(2))
    held_out = list(validation.objective_batches(stores[0], data, data.sources[0], 4, data.mixture[0], 9))
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
def test_batches_are_those_of_the_specification(tmp_path, kind):
    label = {"token_classification": "red red blue", "regression": 0.5, "embedding": "its pair"}.get(kind, "red")
    data, stores = prepared(tmp_path, [(f"a b {number}", label) for number in range(30)], kind)
    run = dataclasses.replace(labelled_run(), data=data)
    batch = Stream(stores, data, 8).batch(3)
    held_out = next(validation.objective_batches(stores[0], data, data.sources[0], 8, data.mixture[0], 1))
    for made, spec in ((batch, batch_spec(run)), (held_out, evaluation_spec(run))):
        assert {name: (x.shape, str(x.dtype)) for name, x in made["main"].items()} == {
            name: (x.shape, x.dtype) for name, x in spec["main"].items()
        }
    if kind == "regression":
        assert (batch["main"]["labels"] == 0.5).all()
    if kind == "embedding":
        assert set(texts(stores, batch["main"], "positive")) == {"its pair"}


def test_a_words_label_stands_at_its_first_token_and_cut_words_have_none(tmp_path):
    data, stores = prepared(tmp_path, [(" ab  c\tdef gh", "red green blue red")] * 30, "token_classification")
    features = Stream(stores, dataclasses.replace(data, inputs_length=11), 2).batch(0)["main"]
    found = [(place, LABELS[features["labels"][0, place]]) for place in np.flatnonzero(features["label_weights"][0])]
    assert found == [(1, "red"), (5, "green"), (7, "blue")]


@pytest.mark.parametrize(
    "kind, bad, told",
    [
        ("classification", ("a", "gren"), r"texts.jsonl:31: found the label 'gren' in 'label' \(perhaps 'green'\)"),
        ("token_classification", ("a b", "red"), "texts.jsonl:31: found 1 labels in 'label' for 2 words"),
        ("regression", ("a", "many"), "texts.jsonl:31: found 'many' in 'label', expected a finite number"),
        ("regression", ("a", "nan"), "texts.jsonl:31: found 'nan'"),
    ],
)
def test_a_label_that_cannot_be_is_refused_with_its_line(tmp_path, kind, bad, told):
    good = {"regression": 1}.get(kind, "red")
    with pytest.raises(DataError, match=told):
        prepared(tmp_path, [("a", good)] * 30 + [bad], kind)


def test_a_mode_token_can_stand_in_front(tmp_path):
    data, stores = prepared(tmp_path, PAIRS, mode="R")
    rows = Stream(stores, data, 4).batch(0)["main"]["encoder_input_tokens"]
    assert (rows[:, 0] == stores[0].vocabulary.mode_id("R")).all()


def test_rows_are_shown_with_their_labels_and_nothing_is_generated(tmp_path, capsys):
    data, _ = prepared(tmp_path, PAIRS)
    inspect(dataclasses.replace(labelled_run(), data=data), rows=2)
    assert "label: " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="head of kind classification"):
        prompt_format(data, None)


def test_the_stores_of_other_corpora_keep_their_names():
    corpus = labelled_run().data.corpus
    plain = changed(changed(corpus, "labels", ()), "target_kind", "text")
    assert {"labels", "target_kind"}.isdisjoint(plain.described()) and corpus.described()["labels"] == LABELS
