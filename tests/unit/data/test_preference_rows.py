"""Rows of preference pairs: both answers laid out as supervised targets, and refusal of pairs that say nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.config_examples import changed, example

from t5x_like.config import CorpusConfig, DataConfig, Preference, RunConfig, Supervised, TokenizerConfig, batch_spec
from t5x_like.config.objectives import Layout
from t5x_like.config.validation import validate
from t5x_like.data.chat.encoding import encode_rendered, load_template
from t5x_like.data.inspection.console_view import describe_rows, mixture_table, store_table
from t5x_like.data.objectives.supervised import pair_examples
from t5x_like.data.store.prepare import open_stores, prepare
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream import first_fit, heldout, preference_rows, reference_log_probs, row_stream
from t5x_like.data.stream.feature_converters import convert
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.errors import ConfigError, DataError, SafetyError
from t5x_like.planning.estimate.tokens import token_positions

BYTES = ByteTokenizer(0)
PAIRS = [(f"question {n % 9}", f"a good answer {n}", f"bad {n}") for n in range(30)]
INPUTS, TARGETS = 16, 20


def config(folder: Path, layout: Layout = "encoder_decoder", **corpus: Any) -> DataConfig:
    fields: dict[str, Any] = {"inputs_field": "prompt", "text_field": "chosen", "rejected_field": "rejected"}
    return DataConfig(
        corpus=CorpusConfig(files=(str(folder / "pairs.jsonl"),), **(fields | {"validation_fraction": 0.3} | corpus)),
        tokenizer=TokenizerConfig(kind="bytes", num_sentinels=0),
        layout=layout,
        mixture=(Preference(),),
        inputs_length=INPUTS,
        targets_length=TARGETS,
        store_dir=str(folder / "stores"),
    )


def write(folder: Path, rows: list[Any]) -> None:
    names = ("prompt", "chosen", "rejected")
    objects = [row if isinstance(row, dict) else dict(zip(names, row, strict=True)) for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects))


def prepared(folder: Path, rows: list[Any], layout: Layout = "encoder_decoder") -> tuple[DataConfig, Store]:
    write(folder, rows)
    data = config(folder, layout)
    (store,) = prepare(data, report=lambda line: None)
    return data, store


def run_with(data: DataConfig) -> RunConfig:
    return dataclasses.replace(example(data.layout), data=data)


def texts(store: Store, name: str) -> list[tuple[str, ...]]:
    """Return the three texts of each pair of a split."""
    split = store.split(name)
    bounds = split.offsets.astype(int).tolist()
    found = [BYTES.decode(split.tokens(*pair)) for pair in zip(bounds[:-1], bounds[1:], strict=True)]
    return list(zip(found[0::3], found[1::3], found[2::3], strict=True))


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm", "causal_lm"])
def test_an_epoch_has_every_pair_once_as_supervised_pairs_with_its_reference(tmp_path: Path, layout: Layout) -> None:
    data, store = prepared(tmp_path, PAIRS, layout)
    pairs = texts(store, "train")
    assert sorted(pairs + texts(store, "validation")) == sorted(PAIRS)
    values = reference_log_probs.missing_values(data, [store])
    values["files/train"][:] = np.arange(2 * len(pairs)).reshape(-1, 2)
    reference_log_probs.attach(values, data, [store])
    stream = TrainingStream([store], data, 4)
    assert stream.rows_per_epoch == {"files": len(pairs)}
    features = stream.get_rows(np.arange(len(pairs)))
    assert {name: str(x.dtype) for name, x in features.items()} == {
        name: spec.dtype for name, spec in batch_spec(run_with(data))["main"].items()
    }
    order = (features["chosen_reference"] / 2).astype(int)
    assert sorted(order) == list(range(len(pairs))) and order.tolist() != sorted(order)
    np.testing.assert_array_equal(features["rejected_reference"], features["chosen_reference"] + 1)
    for side, prefix in ((1, ""), (2, "rejected_")):
        encoded = [(BYTES.encode(pairs[n][0]), BYTES.encode(pairs[n][side])) for n in order]
        expected = convert(pair_examples(encoded, Supervised(), BYTES.vocabulary), layout, INPUTS, TARGETS)
        for name, values_ in expected.items():
            shared = prefix if name.startswith("decoder") else ""
            np.testing.assert_array_equal(features[shared + name], values_, err_msg=shared + name)


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm", "causal_lm"])
def test_packed_rows_have_each_pair_once_as_segments(tmp_path: Path, layout: Layout) -> None:
    """The segments of a pair have the same number in the rows of the prompts and of both answers."""
    data, store = prepared(tmp_path, [*PAIRS, *((f"q{n}", "y" * (1 + n % 3), "no") for n in range(45))], layout)
    values = reference_log_probs.missing_values(data, [store])
    values["files/train"][:] = np.arange(values["files/train"].size).reshape(-1, 2)
    reference_log_probs.attach(values, data, [store])
    alone = TrainingStream([store], data, 4)
    single = alone.get_rows(np.arange(alone.rows_per_epoch["files"]))
    data = dataclasses.replace(data, mixture=(Preference(pairs_per_row=3),))
    stream = TrainingStream([store], data, 4)
    count = stream.rows_per_epoch["files"]
    packed = stream.get_rows(np.arange(count))
    assert {name: (x.shape[1:], str(x.dtype)) for name, x in packed.items()} == {
        name: (spec.shape[1:], spec.dtype) for name, spec in batch_spec(run_with(data))["main"].items()
    }
    assert packed["decoder_segment_ids"].max() == 3 and count < len(single["chosen_reference"])
    found = []
    for row in range(count):
        for number in range(1, int(packed["decoder_segment_ids"][row].max()) + 1):
            reference = packed["chosen_reference"][row, number - 1]
            assert packed["rejected_reference"][row, number - 1] == reference + 1
            (pair,) = np.flatnonzero(single["chosen_reference"] == reference)
            found.append(pair)
            for name, values_ in packed.items():
                stack = next(
                    (stack for stack in ("encoder", "rejected_decoder", "decoder") if name.startswith(stack)), None
                )
                if stack is None:
                    continue
                segment = values_[row][packed[f"{stack}_segment_ids"][row] == number]
                if name.endswith("_positions"):
                    assert segment.tolist() == list(range(len(segment)))
                elif not name.endswith("_segment_ids"):
                    expected = single[name][pair]
                    assert segment.tolist() == expected[: len(segment)].tolist(), name
                    # The input after the last target is read by no position of the segment.
                    assert not expected[len(segment) + 1 :].any()
    assert sorted(found) == list(range(len(single["chosen_reference"])))
    assert len(describe_rows(stream, 0, 2)) == 2 * sum(int(packed["decoder_segment_ids"][row].max()) for row in (0, 1))
    assert mixture_table(stream).row_count == 1
    other = stream.get_rows(np.arange(count, 2 * count))["chosen_reference"]
    assert not np.array_equal(other, packed["chosen_reference"])
    assert sorted(map(tuple, other)) == sorted(map(tuple, packed["chosen_reference"]))


def test_fingerprint_has_the_packing_of_pairs_only_where_it_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, store = prepared(tmp_path, PAIRS)
    packed = dataclasses.replace(data, mixture=(Preference(pairs_per_row=3),))
    described = []
    monkeypatch.setattr(row_stream, "json_digest", lambda identity: described.append(identity) or "")

    def identity(of: DataConfig) -> tuple[Any, Any]:
        _ = TrainingStream([store], of, 4).fingerprint
        return described[-1]["objectives"][0][0], described[-1]["packed"][0]

    fields, packing = identity(data)
    assert "pairs_per_row" not in fields and packing == {"preferences": 1}
    fields, packing = identity(packed)
    assert fields["pairs_per_row"] == 3 and packing == {"preferences": 1, "pairs_per_row": 3}
    monkeypatch.setattr(preference_rows, "DOCUMENTS_PER_PART", 8)
    assert identity(packed)[1] == {"preferences": 1, "pairs_per_row": 3, "documents": 8, "lanes": first_fit.LANES}


def test_the_same_prompt_is_in_one_split(tmp_path: Path) -> None:
    _, store = prepared(tmp_path, PAIRS)
    train, held_out = ({prompt for prompt, _, _ in texts(store, name)} for name in ("train", "validation"))
    assert train and held_out and not train & held_out


def test_long_answers_are_cut_without_eos_and_prompts_never(tmp_path: Path) -> None:
    long = "x" * 25
    data, store = prepared(tmp_path, [("ask", long, "short"), *PAIRS])
    (split,) = [name for name in ("train", "validation") if ("ask", long, "short") in texts(store, name)]
    stream = TrainingStream([store], data, 4, split)
    features = stream.get_rows(np.arange(len(texts(store, split))))
    (row,) = np.flatnonzero((features["decoder_target_tokens"] == BYTES.encode("x")[0]).any(1))
    assert features["decoder_target_tokens"][row].tolist() == BYTES.encode(long)[:TARGETS]
    assert features["decoder_loss_weights"][row].sum() == TARGETS
    assert features["rejected_decoder_loss_weights"][row].sum() == len("short") + 1
    assert "1 preference pairs have an answer that is longer" in str(mixture_table(stream).caption)


def test_prompts_longer_than_a_row_are_refused_together(tmp_path: Path) -> None:
    for layout in ("encoder_decoder", "causal_lm"):
        data, store = prepared(tmp_path, [*PAIRS, ("a question too long for rows", "yes", "no")] * 2, layout)
        data = dataclasses.replace(data, corpus=dataclasses.replace(data.corpus, validation_fraction=0.3))
        with pytest.raises(DataError, match=r"found \d of \d+ prompts longer .*29 tokens.*set --data.inputs-length 29"):
            for name in ("train", "validation"):
                TrainingStream([store], data, 4, name)


def test_answers_that_are_equal_within_a_row_are_refused(tmp_path: Path) -> None:
    same = "x" * TARGETS
    data, store = prepared(tmp_path, [("q", same + "a", same + "b"), ("p", same + "a", same + "b")])
    with pytest.raises(DataError, match="1 of 1 pairs whose two answers have the same tokens within a row"):
        TrainingStream([store], data, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "rejected": "no"},
            r"pairs.jsonl:31: found the fields 'prompt', 'rejected', expected 'chosen'",
        ),
        (("q", "same", "same"), r"pairs.jsonl:31: found the same answer 'same' in 'chosen' and 'rejected'"),
        (("q", "yes", " "), r"pairs.jsonl:31: found no text in 'rejected', expected a prompt and two answers"),
        (("", "yes", "no"), r"pairs.jsonl:31: found no text in 'prompt'"),
    ],
)
def test_bad_rows_are_refused_with_their_line(tmp_path: Path, row: Any, message: str) -> None:
    write(tmp_path, [*PAIRS, row])
    with pytest.raises(DataError, match=message):
        prepare(config(tmp_path), report=lambda line: None)
    (store,) = prepare(config(tmp_path, max_bad_records=1), report=lambda line: None)
    assert store.info["left_out"] == {"quarantined": 1}


def test_rows_without_a_reference_are_shown_and_not_scored(tmp_path: Path) -> None:
    data, store = prepared(tmp_path, PAIRS)
    stream = TrainingStream([store], data, 4)
    assert np.isnan(stream.batch(0)["main"]["chosen_reference"]).all()
    assert len(describe_rows(stream, 0, 2)) == 4 and store_table(store).row_count
    with pytest.raises(DataError, match="without the log-probabilities of the reference"):
        next(heldout.objective_batches(store, data, data.sources[0], 4, data.mixture[0], 1))


def test_log_probabilities_are_read_back_with_the_same_bits(tmp_path: Path) -> None:
    data, store = prepared(tmp_path, PAIRS)
    values = reference_log_probs.missing_values(data, [store])
    random = np.random.default_rng(0)
    lines = [reference_log_probs.format_header({"data": reference_log_probs.data_identity(data, [store])})]
    for name, array in values.items():
        array[:] = random.normal(-50, 20, array.shape).astype(np.float32)
        lines += [reference_log_probs.format_line(name, n, array[n : n + 4]) for n in range(0, len(array), 4)]
    file = tmp_path / reference_log_probs.FILE
    file.write_text("\n".join(lines[:-1]) + "\n")
    reference_log_probs.attach_from(tmp_path, data, [store])
    assert store.split("train").reference_log_probs is None, "a file that is not complete is not used"
    file.write_text("\n".join(lines) + "\n")
    reference_log_probs.attach_from(tmp_path, data, [store])
    for name, array in values.items():
        np.testing.assert_array_equal(store.split(name.partition("/")[2]).reference_log_probs, array)
    other = dataclasses.replace(data, targets_length=TARGETS + 1)
    with pytest.raises(SafetyError, match="found pairs with the digest"):
        reference_log_probs.attach_from(tmp_path, other, [store])
    file.write_text(lines[0] + "\n" + lines[1][:-5] + "\n")
    with pytest.raises(SafetyError, match="cannot be read"):
        reference_log_probs.attach_from(tmp_path, data, [store])


def test_configurations_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run = run_with(config(tmp_path))
    assert validate(run) == []
    cases = {
        "data.mixture": ("data.mixture", (Supervised(),), "supervised for preference pairs"),
        "data.corpus.rejected_field": ("data.corpus.rejected_field", None, "none"),
        "data.example_mode": ("data.example_mode", "documents", "documents for preference pairs"),
        "training.label_smoothing": ("training.label_smoothing", 0.1, "0.1"),
        "data.mixture.0.label_smoothing": ("data.mixture.0.label_smoothing", 0.5, "0.5"),
    }
    for where, (path, value, found) in cases.items():
        problems = [problem for problem in validate(changed(run, path, value)) if problem.where == where]
        assert [problem.found for problem in problems] == [found], where
    both = changed(run, "data.mixture", (Preference(), Supervised()))
    assert any("the objectives dpo, supervised" in problem.found for problem in validate(both))
    stored = open_stores(prepared(tmp_path, PAIRS)[0])
    assert stored[0].sequences_per_document == 3
    assert token_positions(run) == {"encoder": 8 * INPUTS, "decoder": 2 * 8 * TARGETS}
    with pytest.raises(ConfigError, match="rejected_field"):
        raise ConfigError(validate(changed(run, "data.corpus.rejected_field", "chosen")))


# Dialogues.

TURNS = [
    [
        {"role": "user", "content": f"Question {n}?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Sure?"},
    ]
    for n in range(8)
]


def of_dialogues(folder: Path, layout: Layout) -> DataConfig:
    as_turns = layout == "encoder_decoder"
    data = config(
        folder, layout, inputs_field=None, messages_field="prompt", messages_as="turns" if as_turns else "dialogue"
    )
    return dataclasses.replace(data, mixture=(Preference(dialogues=not as_turns),), inputs_length=80, targets_length=40)


@pytest.mark.parametrize("layout", ["encoder_decoder", "causal_lm"])
def test_dialogues_are_laid_out_by_their_template(tmp_path: Path, layout: Layout) -> None:
    """An answer is a text, the message, or the whole dialogue with it."""
    rows = []
    for n, turns in enumerate(TURNS):
        chosen, rejected = ({"role": "assistant", "content": f"{text} {n}."} for text in ("Of course", "Go away"))
        forms = [
            (chosen["content"], rejected["content"]),
            ([chosen], [rejected]),
            ([*turns, chosen], [*turns, rejected]),
        ]
        rows.append((turns, *forms[n % 3]))
    write(tmp_path, rows)
    data = of_dialogues(tmp_path, layout)
    assert validate(run_with(data)) == []
    (store,) = prepare(data, report=lambda line: None)
    stream = TrainingStream([store], data, 4)
    features = stream.get_rows(np.arange(stream.rows_per_epoch["files"]))
    template = load_template(BYTES, None)
    for row in range(len(features["denoiser_ids"])):
        for prefix, text in (("", "Of course"), ("rejected_", "Go away")):
            targets, weights = (features[f"{prefix}decoder_{name}"][row] for name in ("target_tokens", "loss_weights"))
            answer = BYTES.decode([token for token in targets[weights > 0].tolist() if token != BYTES.eos_id])
            number = int(answer.removeprefix(text).strip(" ."))
            assert answer == f"{text} {number}." and targets[weights > 0][-1] == BYTES.eos_id
            last = {"role": "assistant", "content": answer}
            if layout == "causal_lm":
                ids, _ = encode_rendered(BYTES, template.dialogue([*TURNS[number], last]))
                assert targets[: len(ids)].tolist() == ids and not targets[len(ids) :].any()
            else:
                ids, _ = encode_rendered(BYTES, template.render(TURNS[number], add_generation_prompt=True))
                inputs = features["encoder_input_tokens"][row]
                assert inputs[inputs != 0].tolist() == [*ids, BYTES.eos_id]


def test_answers_to_other_messages_are_refused(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "Yes."}
    for chosen, message in (
        ([*TURNS[1], answer], "expected a text, or the messages of the prompt followed by one of the assistant"),
        ([{"role": "user", "content": "Yes."}], "expected a text, or the messages"),
        ("No.", "found the same answer 'No.'"),
        ("", "found no text in 'chosen'"),
    ):
        write(tmp_path, [(TURNS[0], chosen, "No.")])
        with pytest.raises(DataError, match=message):
            prepare(of_dialogues(tmp_path, "causal_lm"), report=lambda line: None)
    run = run_with(of_dialogues(tmp_path, "causal_lm"))
    (problem,) = validate(changed(run, "data.mixture.0.dialogues", False))
    assert problem.where == "data.mixture.0.dialogues"
