"""`predict` and `eval --data` with published task heads, against transformers."""

import json

import numpy as np
import pytest
import tokenizers

torch = pytest.importorskip("torch", reason="parity with transformers needs the hf extra")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs the hf extra")

from helpers.published_models import TOPICS  # noqa: E402

from t5x_like.cli.main import main  # noqa: E402
from t5x_like.errors import EXIT_OK  # noqa: E402
from t5x_like.evaluation import predict_files  # noqa: E402

pytestmark = pytest.mark.hf
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXTS = ["The U.S. list isn't empty", "import Re from the module", "a b", "don't (ever) do that, Ada"] * 3
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Return a function that writes a BERT with a head, whose WordPiece tokenizer splits words at punctuation."""
    folder = tmp_path_factory.mktemp("bert")
    wordpiece = tokenizers.BertWordPieceTokenizer(lowercase=True)
    wordpiece.train_from_iterator(TOPICS, vocab_size=500, show_progress=False)
    wordpiece.save_model(str(folder))

    def write(head: str, labels: tuple[str, ...]):
        torch.manual_seed(0)
        names = dict(enumerate(labels))
        config = transformers.BertConfig(
            vocab_size=500, **SIZE, id2label=names, label2id={n: i for i, n in names.items()}
        )
        model = getattr(transformers, f"BertFor{head}")(config).eval()
        model.classifier.weight.data *= 30  # Otherwise all texts have nearly the same prediction.
        tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
        model.save_pretrained(folder / head)
        tokenizer.save_pretrained(folder / head)
        return folder / head, model, tokenizer

    return write


def write_rows(path, **columns):
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_probabilities_of_a_classifier_equal_transformers(bert, tmp_path, monkeypatch, capsys):
    directory, model, tokenizer = bert("SequenceClassification", ("no", "yes", "maybe"))
    source = write_rows(tmp_path / "in.jsonl", text=TEXTS, id=range(12), label=["yes"] * 12)
    monkeypatch.setattr(predict_files, "ROWS_PER_CHUNK", 5)
    output = tmp_path / "out.jsonl"
    command = ["predict", str(directory), "--input", str(source), "--output", str(output)]
    assert main(command) == EXIT_OK
    rows = read_rows(output)
    with torch.no_grad():
        for row, text in zip(rows, TEXTS, strict=True):
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).numpy()
            np.testing.assert_allclose(list(row["probabilities"].values()), expected, atol=2e-5)
            assert row["prediction"] == model.config.id2label[int(expected.argmax())]
            assert row["probability"] == max(row["probabilities"].values()) and row["text"] == text
    assert [row["id"] for row in rows] == list(range(12))
    # A killed command continues the file, which then equals that of an uninterrupted one.
    whole = output.read_bytes()
    output.write_bytes(whole[: whole.index(b'"id": 7') + 20])
    assert main(command) == EXIT_OK and output.read_bytes() == whole
    source.write_text(source.read_text().replace("Ada", "Eve"))
    assert main(command) == 3 and "has lines of other settings" in capsys.readouterr().err

    scores = tmp_path / "scores.json"
    arguments = ["eval", str(directory), "--data", str(source), "--output", str(scores), "--no-intervals"]
    assert main([*arguments, "--inputs-field", "text", "--target-field", "label"]) == EXIT_OK
    found = json.loads(scores.read_text())
    again = [row["prediction"] == "yes" for row in rows]
    assert found["metrics"]["accuracy/accuracy"] == pytest.approx(100 * np.mean(again))
    assert "calibration/ece" in found["metrics"] and np.sum(found["confusion"]["counts"]) == 12


def test_labels_of_words_equal_transformers(bert, tmp_path):
    directory, model, tokenizer = bert("TokenClassification", TAGS)
    source = tmp_path / "in.tsv"
    source.write_text("\n".join(["body", *TEXTS]) + "\n")
    output = tmp_path / "out.jsonl"
    command = ["predict", str(directory), "--input", str(source), "--output", str(output), "--field", "body"]
    assert main(command) == EXIT_OK
    seen = set()
    for row in read_rows(output):
        words = row["body"].split()
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**encoded).logits[0]
        first = [encoded.word_ids().index(word) for word in range(len(words))]
        assert row["prediction"].split() == [TAGS[int(logits[index].argmax())] for index in first]
        np.testing.assert_allclose(row["probabilities"], logits[first].softmax(-1).max(-1).values, atol=2e-5)
        seen |= {*row["prediction"].split()}
        for span in row["spans"]:
            assert row["body"][span["start"] : span["end"]] == span["text"]
    assert len(seen) > 2


TRAINED = {
    # Kind of the head -> recipe, class of transformers, labels of the texts, options.
    "classification": ("classify", "Sequence", ["no", "yes", "maybe"], ["--model.task-head.transform", "True"]),
    "token_classification": ("tag", "Token", ["B-PER I-PER O O", "O O O O", "O B-LOC I-LOC I-LOC"], []),
    "regression": (
        "classify", "Sequence", [0.5, -3, 7],
        ["--model.task-head.kind", "regression", "--model.task-head.transform", "True",
         "--data.mixture.0.kind", "regression", "--data.corpus.target-kind", "number"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED)
def test_predictions_of_a_trained_head_equal_those_of_its_export_in_transformers(bert, tmp_path, kind):
    recipe, architecture, labels, options = TRAINED[kind]
    # No punctuation, at which WordPiece would split words.
    texts = ["The list is empty", "import Re from Ada", "a b don t"] * 4
    base, *_ = bert("SequenceClassification", ("no", "yes"))
    source = str(write_rows(tmp_path / "in.jsonl", text=texts, label=labels * 4))
    command = ["train", f"finetune:{recipe}", "--from", str(base), "--workdir", str(tmp_path / "run")]
    command += ["--data.corpus.files", source, "--data.corpus.validation-files", source, *options]
    command += ["--data.store-dir", str(tmp_path / "stores"), "--data.inputs-length", "16"]
    command += ["--model.task-head.pooling", "cls", "--training.global-batch-size", "8"]
    command += ["--training.schedule.kind", "constant", "--training.schedule.learning-rate", "0.01"]
    assert main([*command, "--training.num-train-steps", "8"]) == EXIT_OK
    assert main(["convert", "--to", "hf", str(tmp_path / "run"), str(tmp_path / "exported")]) == EXIT_OK
    output = tmp_path / "out.jsonl"
    assert main(["predict", str(tmp_path / "run"), "--input", source, "--output", str(output)]) == EXIT_OK
    rows = read_rows(output)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    class_ = getattr(transformers, f"AutoModelFor{architecture}Classification")
    model = class_.from_pretrained(tmp_path / "exported").eval()
    seen = set()
    for row, text in zip(rows, texts, strict=True):
        with torch.no_grad():
            encoded = tokenizer(text.split(), is_split_into_words=True, return_tensors="pt")
            logits = model(**encoded).logits[0]
        names = model.config.id2label
        match kind:
            case "classification":
                found, expected = list(row["probabilities"].values()), logits.softmax(-1)
                assert list(row["probabilities"]) == list(names.values())
                assert row["prediction"] == names[int(logits.argmax())]
            case "token_classification":
                first = [encoded.word_ids().index(word) for word in range(4)]
                found, expected = row["probabilities"], logits[first].softmax(-1).max(-1).values
                assert row["prediction"].split() == [names[int(logits[index].argmax())] for index in first]
            case "regression":
                found, expected = [row["prediction"]], logits
            case _:
                raise AssertionError(kind)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)
        seen.add(str(np.round(found, 4)))
    assert len(seen) == 3


def test_models_that_predict_nothing_are_refused(bert, tmp_path, capsys):
    source = write_rows(tmp_path / "in.jsonl", text=TEXTS)
    directory = tmp_path / "lm"
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=500, **SIZE)).save_pretrained(directory)
    command = ["predict", str(directory), "--input", str(source), "--output", str(tmp_path / "out.jsonl")]
    assert main(command) == 2
    assert "found a model without a task head, expected one with a head; `generate`" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    directory, *_ = bert("SequenceClassification", ("no", "yes"))
    (tmp_path / "empty.jsonl").write_text("")
    command = ["predict", str(directory), "--input", str(tmp_path / "empty.jsonl"), "--output", str(tmp_path / "o")]
    assert main(command) == 2 and "found no rows" in capsys.readouterr().err
