"""Rows of dialogues: a loss on the assistant's turns only, packed, and cut without an EOS that was never written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.config_examples import changed, example

from t5x_like.config import CorpusConfig, DataConfig, Dialogues, Supervised, TokenizerConfig
from t5x_like.config.validation import validate
from t5x_like.data.chat.encoding import DialogueEncoder
from t5x_like.data.chat.messages import dialogue_text
from t5x_like.data.store.prepare import open_stores, prepare
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.stream.unpack import segments
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.errors import DataError

LONG = {"role": "user", "content": "a question " * 8}, {"role": "assistant", "content": "an answer " * 8}
DIALOGUES = [
    [
        {"role": "user", "content": "Where is Paris?"},
        {"role": "assistant", "content": "In France."},
        {"role": "user", "content": "And Rome?"},
        {"role": "assistant", "content": "In Italy."},
    ],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ],
    list(LONG),
]
BYTES = ByteTokenizer(0)


def config(folder: Path, as_turns: bool) -> DataConfig:
    return DataConfig(
        corpus=CorpusConfig(
            files=(str(folder / "chat.jsonl"),),
            validation_files=(str(folder / "chat.jsonl"),),
            messages_field="messages",
            messages_as="turns" if as_turns else "dialogue",
        ),
        tokenizer=TokenizerConfig(kind="bytes", num_sentinels=0),
        layout="encoder_decoder" if as_turns else "causal_lm",
        mixture=(Supervised(),) if as_turns else (Dialogues(),),
        example_mode="documents",
        inputs_length=64 if as_turns else 0,
        targets_length=32 if as_turns else 128,
        store_dir=str(folder / "stores"),
    )


def write(folder: Path, dialogues: list[Any] | None = None) -> None:
    rows = DIALOGUES if dialogues is None else dialogues
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


def examples(data: DataConfig) -> list[dict[str, Any]]:
    prepare(data, report=lambda line: None)
    stream = TrainingStream(open_stores(data), data, 1)
    features = stream.get_rows(np.arange(stream.rows_per_epoch["files"]))
    rows = [{name: values[row] for name, values in features.items()} for row in range(len(features["denoiser_ids"]))]
    return [example for row in rows for example in segments(row)]


def text(dialogue: list[dict[str, str]]) -> str:
    return dialogue_text({"messages": dialogue}, "messages", lambda: "")


def test_the_loss_covers_the_turns_of_the_assistant(tmp_path: Path) -> None:
    write(tmp_path)
    found = {}
    for one in examples(config(tmp_path, as_turns=False)):
        targets, scored = one["decoder_target_tokens"], one["decoder_loss_weights"] > 0
        found[BYTES.decode(targets)] = BYTES.decode(targets[scored]), targets[scored].tolist()
        assert one["decoder_input_tokens"].tolist() == [0, *targets[:-1].tolist()]
        assert one["decoder_positions"].tolist() == list(range(len(targets)))
    whole = "user: Where is Paris?\nassistant: In France.user: And Rome?\nassistant: In Italy."
    assert found[whole][0] == "In France.In Italy." and found[whole][1].count(1) == 2
    assert found["system: Be short.\nuser: 2+2?\nassistant: 4"] == ("4", [*BYTES.encode("4"), 1])
    # The long dialogue is cut at the length of its row; its answer does not end in EOS.
    (cut,) = [text for text in found if text.startswith("user: a question")]
    assert len(cut) == 128 and cut.endswith(found[cut][0]) and 1 not in found[cut][1]


def test_dialogues_share_rows_and_cut_ones_are_counted(tmp_path: Path) -> None:
    write(tmp_path)
    data = config(tmp_path, as_turns=False)
    prepare(data, report=lambda line: None)
    stream = TrainingStream(open_stores(data), data, 1)
    assert stream.rows_per_epoch["files"] == 3 - 1, "the two short dialogues are in one row"
    reader = stream.sources[0].reader
    assert (reader.totals.cut_targets, reader.totals.cut_inputs) == (1, 0)
    encoder = DialogueEncoder(BYTES, data.corpus)
    ids = [encoder.sequences(text(dialogue))[0][0] for dialogue in DIALOGUES]
    raw_tokens, _ = reader.row_means(data.mixture[0])
    assert raw_tokens == sum(min(len(row), 128) for row in ids) / 2


def test_an_encoder_reads_the_dialogue_before_each_answer(tmp_path: Path) -> None:
    write(tmp_path)
    found = {}
    for one in examples(config(tmp_path, as_turns=True)):
        found[BYTES.decode(one["decoder_target_tokens"])] = BYTES.decode(one["encoder_input_tokens"]), one
    given, one = found["In Italy."]
    assert "user: Where is Paris?\nassistant: In France.user: And Rome?\nassistant: "[:60] in given
    assert one["decoder_target_tokens"].tolist() == [*BYTES.encode("In Italy."), 1]
    assert found["In France."][0] == "user: Where is Paris?\nassistant: "
    (cut,) = [text for text in found if text.startswith("an answer")]
    assert 1 not in found[cut][1]["decoder_target_tokens"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([{"role": "user", "content": "a"}], "1: found messages of the roles user, expected one of 'assistant'"),
        ([{"content": "a"}], "expected a list of objects with a text 'role'"),
        ("no json", "1: found no JSON in 'messages'"),
    ],
)
def test_rows_without_an_answer_are_refused(tmp_path: Path, row: Any, message: str) -> None:
    write(tmp_path, [row])
    with pytest.raises(DataError, match=message):
        prepare(config(tmp_path, as_turns=False), report=lambda line: None)


def test_objective_and_layout_must_fit_the_dialogues(tmp_path: Path) -> None:
    run = changed(example("causal_lm"), "data", config(tmp_path, as_turns=False))
    assert not validate(run)
    as_pairs = dataclasses.replace(run.data, mixture=(Supervised(),))
    problems = [(problem.found, problem.expected) for problem in validate(changed(run, "data", as_pairs))]
    assert ("supervised for messages as dialogue", "one objective, of kind dialogues") in problems
    run = changed(example(), "data", dataclasses.replace(run.data, layout="encoder_decoder", inputs_length=64))
    assert any("with dialogues" in problem.found for problem in validate(run))
