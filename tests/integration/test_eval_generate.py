"""A briefly trained run, scored and prompted from its directory through the command line's functions."""

import dataclasses
import json
import math
import random
import shutil

import jax
import pytest

from t5x_like import run_directory
from t5x_like.cli import main
from t5x_like.config import (
    EXIT_OK,
    EXIT_REFUSED,
    EXIT_USAGE,
    AdamW,
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    DataError,
    EvaluationConfig,
    MaskedLM,
    ModelConfig,
    MonitoringConfig,
    PrefixLM,
    RunConfig,
    Schedule,
    SpanCorruption,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.data.prepare import prepare, store_paths
from t5x_like.decoding.answers import Answering, Settings
from t5x_like.decoding.beam import BeamSearch
from t5x_like.decoding.models import formats_of, open_model
from t5x_like.decoding.requests import Request
from t5x_like.decoding.sampling import Sampling
from t5x_like.trainer import train

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Text that goes through the alphabet again and again, each document from another letter on: what follows is known,
    although no letter is more frequent than another."""
    place = tmp_path_factory.mktemp("trained")
    (place / "texts").mkdir()
    shift = random.Random(0)
    for number in range(60):
        first = shift.randrange(26)
        (place / "texts" / f"{number}.txt").write_text("".join(ALPHABET[(first + i) % 26] for i in range(300 + number)))
    stack = StackConfig(num_layers=2, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64, positions="rope")
    run = RunConfig(
        name="alphabet",
        model=ModelConfig(encoder=stack, decoder=stack, vocab_size=288, embedding_stddev=0.2),
        data=DataConfig(
            corpus=CorpusConfig(files=(str(place / "texts" / "*.txt"),), validation_fraction=0.2),
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=16),
            layout="encoder_decoder",
            mixture=(
                SpanCorruption(name="R", mean_noise_span_length=3.0, noise_density=0.15, mode="R"),
                PrefixLM(name="S", mode="S", min_target_fraction=0.5, max_target_fraction=0.5),
            ),
            inputs_length=24,
            targets_length=24,
            store=str(place / "stores"),
        ),
        training=TrainingConfig(
            num_train_steps=300,
            batch_size=16,
            optimizer=AdamW(weight_decay=0.0),
            schedule=Schedule(kind="cosine", learning_rate=1e-2, warmup_steps=20),
        ),
        checkpoints=CheckpointConfig(save_every_steps=150),
        evaluation=EvaluationConfig(num_batches=2),
        monitoring=MonitoringConfig(tensorboard=False, samples=2),
    )
    prepare(run.data, report=lambda line: None)
    assert train(run, place / "run") == EXIT_OK
    return place / "run"


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_the_model_knows_what_no_code_knows(trained):
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert evaluation["step"] == 300
    assert {name: scores["loss"] < 0.5 for name, scores in evaluation["objectives"].items()} == {"R": True, "S": True}
    bits = evaluation["prefix_lm"]["bits_per_byte"]
    assert bits < 0.5
    assert evaluation["baselines"]["unigram_bits_per_byte"] == pytest.approx(math.log2(26), abs=0.2)
    assert evaluation["baselines"]["byte_entropy_bits_per_byte"] > 4 * bits
    samples = json.loads((trained / "samples.json").read_text())
    assert [sample["denoiser"] for sample in samples] == ["R", "S"]


def test_eval_scores_older_steps_and_keeps_the_newest_as_the_result(trained, tmp_path, capsys):
    before = json.loads((trained / "evaluation.json").read_text())
    assert main(["eval", str(trained), "--step", "150", "--num-batches", "1"]) == EXIT_OK
    printed = capsys.readouterr().out
    assert "step 150" in printed and "gzip -9" in printed
    assert json.loads((trained / "evaluation.json").read_text()) == before
    assert [record["step"] for record in lines((trained / "evaluations.jsonl").read_text())] == [150, 300]
    assert (trained / "report.html").exists()

    output = tmp_path / "scores.json"
    assert main(["eval", str(trained), "--step", "150", "300", "--output", str(output)]) == EXIT_OK
    found = json.loads(output.read_text())
    assert [result["step"] for result in found] == [150, 300]
    intervals = found[1].pop("intervals")
    assert found[1] == before, "the same scores as during training"
    assert set(intervals) == {"loss/R", "loss/S", "bits_per_byte"}
    for name, value in {
        "loss/S": before["objectives"]["S"]["loss"],
        "bits_per_byte": before["prefix_lm"]["bits_per_byte"],
    }.items():
        assert intervals[name][0] < value < intervals[name][1]
    assert main(["eval", str(trained), "--step", "7"]) == EXIT_REFUSED


def test_generate_goes_on_with_a_prompt(trained, capsys):
    assert main(["generate", str(trained), "--prompt", ALPHABET[:22], "--max-new-tokens", "6"]) == EXIT_OK
    assert capsys.readouterr().out == "wxyzab\n"


def test_a_prompt_longer_than_any_in_training_is_answered_with_a_word(trained, capsys):
    assert main(["generate", str(trained), "--prompt", 3 * ALPHABET, "--max-new-tokens", "6"]) == EXIT_OK
    captured = capsys.readouterr()
    assert len(captured.out) > 1
    assert "a prompt of 80 tokens, longer than the 24 of training" in captured.err


def test_generate_fills_gaps_in_the_denoisers_own_form(trained, capsys):
    prompt = "abcdefghi<extra_id_0>mnopqrstuvwx"
    assert main(["generate", str(trained), "--prompt", prompt, "--mode", "R", "--max-new-tokens", "8"]) == EXIT_OK
    sentinel, span = capsys.readouterr().out.strip().split(">")
    assert sentinel == "<extra_id_0" and len(span) >= 3 and span in 2 * ALPHABET


def test_generate_answers_lines_of_json(trained, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "efghijklmnopqrstuvwxyz", "id": 1}\n{"prompt": "uvwxyzabcdefghijklmnop", "id": 2}\n')
    arguments = ["generate", str(trained), "--input", str(prompts), "--max-new-tokens", "3"]
    assert main(arguments) == EXIT_OK
    assert lines(capsys.readouterr().out) == [
        {"prompt": "efghijklmnopqrstuvwxyz", "id": 1, "output": "abc"},
        {"prompt": "uvwxyzabcdefghijklmnop", "id": 2, "output": "qrs"},
    ]
    sampled = [*arguments, "--temperature", "8", "--num-samples", "3", "--seed", "5"]
    assert main(sampled) == EXIT_OK
    answers = lines(capsys.readouterr().out)
    assert [(answer["id"], answer["sample"]) for answer in answers] == [(i, s) for i in (1, 2) for s in (0, 1, 2)]
    assert len({answer["output"] for answer in answers}) > 1
    assert main(sampled) == EXIT_OK
    assert lines(capsys.readouterr().out) == answers


@pytest.fixture(scope="module")
def ask(trained):
    """(prompts or rows, settings) -> answers of each, by a model that is opened once."""
    model = open_model(trained, jax.devices()[:1])
    _, params = model.load(None)

    def answers(rows, **settings):
        rows = [row if isinstance(row, Request) else Request(row, {}) for row in rows]
        settings = Settings(**{"max_new_tokens": 12, **settings})
        return Answering(model, params, formats_of(trained, settings.mode), settings)(rows, 0)

    return answers


START = "efghijklmnopqrstuvwxyz"


@pytest.mark.slow
def test_a_stop_string_ends_an_answer_and_is_left_out(ask):
    free, short = ask([START])[0][0], ask([START], stop=("fgh", "de"), scores=True)[0][0]
    assert free.text == "abcdefghijkl" and short.text == "abc"
    assert (short.ended_by, short.tokens) == ("stop", 5) and -0.5 < short.log_likelihood < 0
    assert ask([START], stop=("xyz",))[0][0].text == free.text


@pytest.mark.slow
def test_answers_keep_to_choices_and_characters(ask):
    rows = [START, Request(START, {}, choices=("abx", "abc", "zzz")), Request(START, {}, max_new_tokens=2)]
    found = [row[0] for row in ask(rows, choices=("q", "bcd"))]
    assert [answer.text for answer in found[1:]] == ["abc", found[0].text[:2]] and found[0].text in ("q", "bcd")
    assert set(ask([START], allowed_characters="xyz")[0][0].text) <= set("xyz")
    drawn = ask([START] * 8, choices=("ab", "ac", "b"), sampling=Sampling(temperature=9.0))
    assert 1 < len({row[0].text for row in drawn}) <= 3


@pytest.mark.slow
def test_a_beam_finds_what_scores_best_and_ranks_choices_by_likelihood(ask):
    """With as many beams as choices nothing is cut off: the order is that of their log-likelihoods."""
    choices = ("abc", "abd", "b", "xyz")
    beam = BeamSearch(4, 0.0)
    found = ask([START], beam=beam, num_samples=4, choices=choices, scores=True)[0]
    assert found[0].text == "abc" and {answer.text for answer in found} == set(choices)
    assert [a.score for a in found] == sorted((a.score for a in found), reverse=True)
    # The score counts EOS too, which is unlikely within the alphabet.
    assert all(answer.score < answer.log_likelihood for answer in found)


@pytest.mark.slow
def test_gaps_are_filled_in_place(ask):
    row = "abcdefghi<mask>mnopqrstuvwx"
    (answer,) = ask([row], fill=True)[0]
    assert answer.spans[0] in 2 * ALPHABET and answer.text == f"abcdefghi{answer.spans[0]}mnopqrstuvwx"
    assert ask([row])[0][0].text.startswith(f"<extra_id_0>{answer.spans[0]}")
    plain = ask(["ab<mask>"], literal=True)[0][0]
    assert plain.spans is None
    with pytest.raises(DataError, match="the model fills none under mode S"):
        ask([row], mode="S")


@pytest.mark.slow
def test_a_row_with_its_own_seed_is_drawn_alike_anywhere(ask):
    own = Request(START, {}, seed=11)
    drawn = ask([own, START, START, own], sampling=Sampling(temperature=9.0, min_p=0.001), num_samples=2)
    assert [a.text for a in drawn[0]] == [a.text for a in drawn[3]]
    texts = {answer.text for row in drawn for answer in row}
    assert len(texts) == 6
    penalized = ask([START], sampling=Sampling(repetition_penalty=50.0), max_new_tokens=20)[0][0].text
    assert len(set(penalized)) == len(penalized) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--mode", "X"], "mode: found X, expected one of R, S"),
        (["--prompt", "a", "--num-samples", "2"], "set a temperature"),
        (["--prompt", "a", "--top-p", "0"], "top_p: found 0.0"),
        (["--prompt", "<extra_id_99>", "--mode", "R"], "expected a sentinel below 16"),
        (["--prompt", "a", "--beam-size", "2", "--temperature", "1"], "0 beside a beam search"),
        (["--prompt", "a", "--output", "x.jsonl"], "give --input FILE"),
    ],
)
def test_wrong_requests_are_refused_with_one_message(trained, capsys, arguments, message):
    assert main(["generate", str(trained), *arguments]) == EXIT_USAGE
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_an_output_that_is_another_file_stays_as_it_is(trained, tmp_path, capsys):
    """Also its last line, which has no end."""
    for name in ("in.txt", "notes.txt"):
        (tmp_path / name).write_text("my only copy")
        command = ["generate", str(trained), "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / name)]
        assert main(command) == EXIT_REFUSED
        assert "was not written by this command" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "my only copy"


def test_a_changed_store_is_refused(trained, tmp_path, capsys):
    """With other sentinels the ids would mean something else."""
    run = run_directory.read_config(trained)
    other = dataclasses.replace(run, data=dataclasses.replace(run.data, store=str(tmp_path / "stores")))
    shorter = dataclasses.replace(other.data, corpus=dataclasses.replace(run.data.corpus, max_documents=50))
    prepare(shorter, report=lambda line: None)
    store_paths(shorter)[0].rename(store_paths(other.data)[0])
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    run_directory.write_atomically(copied / "config.json", run_directory.to_json(other))
    assert main(["generate", str(copied), "--prompt", "a"]) == EXIT_REFUSED
    assert "on which the checkpoint was trained" in capsys.readouterr().err


def test_an_encoder_generates_nothing(trained, tmp_path, capsys):
    run = run_directory.read_config(trained)
    data = dataclasses.replace(run.data, layout="encoder", mixture=(MaskedLM(),), targets_length=0)
    encoder = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=None), data=data)
    run_directory.write_atomically(tmp_path / "config.json", run_directory.to_json(encoder))
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == EXIT_USAGE
    assert "an encoder fills masks but generates no text" in capsys.readouterr().err
