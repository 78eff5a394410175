"""A briefly trained run, evaluated and decoded by the command line."""

import dataclasses
import json
import math
import random
import shutil

import jax
import pytest
from helpers.small_run import small_run

from t5x_like import run_directory
from t5x_like.cli.main import main
from t5x_like.config import (
    CheckpointConfig,
    CorpusConfig,
    EvaluationConfig,
    MonitoringConfig,
    PrefixLM,
    ScheduleConfig,
    SpanCorruption,
)
from t5x_like.config.serialization import to_json
from t5x_like.data.store.prepare import prepare
from t5x_like.data.store.store_paths import store_paths
from t5x_like.decoding.beam_search import BeamSearch
from t5x_like.decoding.generation_config import GenerationConfig
from t5x_like.decoding.pipeline import TextGenerator
from t5x_like.decoding.prompt_reader import PromptRequest
from t5x_like.decoding.prompted_model import formats_of, open_prompted
from t5x_like.decoding.sampling import Sampling
from t5x_like.errors import EXIT_OK, EXIT_REFUSED, EXIT_USAGE, DataError
from t5x_like.trainer.train import train
from t5x_like.utils.atomic_write import write_atomically

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Write documents that repeat the alphabet from different letters on: the next letter is determined, although all
    letters are equally frequent."""
    root = tmp_path_factory.mktemp("trained")
    (root / "texts").mkdir()
    shift = random.Random(0)
    for number in range(60):
        first = shift.randrange(26)
        (root / "texts" / f"{number}.txt").write_text("".join(ALPHABET[(first + i) % 26] for i in range(300 + number)))
    (root / "test.jsonl").write_text("".join(json.dumps({"text": ALPHABET[::-1] * 12}) + "\n" for _ in range(4)))
    run = small_run(
        root,
        "encoder_decoder",
        (
            SpanCorruption(name="R", mean_noise_span_length=3.0, noise_density=0.15, mode="R"),
            PrefixLM(name="S", mode="S", min_target_fraction=0.5, max_target_fraction=0.5),
        ),
        corpus=CorpusConfig(
            files=(str(root / "texts" / "*.txt"),), test_files=(str(root / "test.jsonl"),), validation_fraction=0.2
        ),
        lengths=(24, 24),
        stack={"num_layers": 2},
        model={"embedding_stddev": 0.2},
        training={
            "num_train_steps": 160,
            "global_batch_size": 16,
            "schedule": ScheduleConfig(kind="cosine", learning_rate=1e-2, warmup_steps=20),
        },
        name="alphabet",
        checkpoints=CheckpointConfig(save_every_steps=80),
        evaluation=EvaluationConfig(num_batches=2),
        monitoring=MonitoringConfig(writers=(), num_decoded_samples=2),
    )
    prepare(run.data, report=lambda line: None)
    assert train(run, root / "run") == EXIT_OK
    return root / "run"


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_trained_model_has_fewer_bits_per_byte_than_compression(trained):
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert evaluation["step"] == 160
    assert {name: scores["loss"] < 0.5 for name, scores in evaluation["objectives"].items()} == {"R": True, "S": True}
    bits = evaluation["prefix_lm"]["bits_per_byte"]
    assert bits < 0.5
    assert evaluation["baselines"]["unigram_bits_per_byte"] == pytest.approx(math.log2(26), abs=0.2)
    assert evaluation["baselines"]["byte_entropy_bits_per_byte"] > 4 * bits
    samples = json.loads((trained / "samples.json").read_text())
    assert [sample["denoiser"] for sample in samples] == ["R", "S"]


def test_eval_of_the_test_split_is_not_recorded_in_the_run(trained, capsys):
    before = (trained / "evaluations.jsonl").read_text()
    assert main(["eval", str(trained), "--split", "test", "--num-batches", "1", "--no-intervals"]) == EXIT_OK
    (result,) = json.loads((trained / "evaluation.test.json").read_text())
    assert result["split"] == "test" and result["objectives"]["S"]["loss"] > 2, "the alphabet backwards"
    assert (trained / "evaluations.jsonl").read_text() == before
    assert main(["eval", str(trained), "--split", "dev"]) == EXIT_USAGE
    assert "found the splits train, validation, test, expected 'dev'" in capsys.readouterr().err


@pytest.mark.slow
def test_eval_of_older_steps_keeps_the_newest_as_the_result(trained, tmp_path, capsys):
    before = json.loads((trained / "evaluation.json").read_text())
    assert main(["eval", f"{trained}:80", "--num-batches", "1"]) == EXIT_OK
    printed = capsys.readouterr().out
    assert "step 80" in printed and "gzip -9" in printed
    assert json.loads((trained / "evaluation.json").read_text()) == before
    assert [record["step"] for record in lines((trained / "evaluations.jsonl").read_text())] == [80, 160]
    assert (trained / "report.html").exists()

    output = tmp_path / "scores.json"
    assert main(["eval", f"{trained}:80,160", "--output", str(output)]) == EXIT_OK
    results = json.loads(output.read_text())
    assert [result["step"] for result in results] == [80, 160]
    intervals = results[1].pop("intervals")
    assert results[1] == before, "the same scores as during training"
    assert set(intervals) == {"loss/R", "loss/S", "accuracy/R", "accuracy/S", "bits_per_byte"}
    for name, value in {
        "loss/S": before["objectives"]["S"]["loss"],
        "bits_per_byte": before["prefix_lm"]["bits_per_byte"],
    }.items():
        assert intervals[name][0] < value < intervals[name][1]
    assert main(["eval", f"{trained}:7"]) == EXIT_USAGE


def test_generate_continues_a_prompt(trained, capsys):
    assert main(["generate", str(trained), "--prompt", ALPHABET[:22], "--max-new-tokens", "6"]) == EXIT_OK
    assert capsys.readouterr().out == "wxyzab\n"


def test_prompt_longer_than_in_training_gives_a_note(trained, capsys):
    assert main(["generate", str(trained), "--prompt", 3 * ALPHABET, "--max-new-tokens", "6"]) == EXIT_OK
    captured = capsys.readouterr()
    assert len(captured.out) > 1
    assert "a prompt has 80 tokens, more than the 24 of training" in captured.err


def test_generate_fills_gaps_in_the_format_of_the_denoiser(trained, capsys):
    prompt = "abcdefghi<extra_id_0>mnopqrstuvwx"
    assert main(["generate", str(trained), "--prompt", prompt, "--mode", "R", "--max-new-tokens", "8"]) == EXIT_OK
    sentinel, span = capsys.readouterr().out.strip().split(">")
    assert sentinel == "<extra_id_0" and len(span) >= 3 and span in 2 * ALPHABET


def test_generate_reads_and_writes_json_lines(trained, tmp_path, capsys):
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
    """Return a function from prompts or requests and settings to completions, with a model that is opened once."""
    model = open_prompted(trained, devices=jax.devices()[:1])
    _, params = model.load(None)

    def answers(rows, **settings):
        rows = [row if isinstance(row, PromptRequest) else PromptRequest(row, {}) for row in rows]
        settings = GenerationConfig(**{"max_new_tokens": 12, **settings})
        return TextGenerator(model, params, formats_of(model.loaded, settings.mode), settings)(rows, 0)

    return answers


START = "efghijklmnopqrstuvwxyz"


@pytest.mark.slow
def test_stop_string_ends_a_completion_and_is_not_part_of_it(ask):
    free, short = ask([START])[0][0], ask([START], stop=("fgh", "de"), return_scores=True)[0][0]
    assert free.text == "abcdefghijkl" and short.text == "abc"
    assert (short.ended_by, short.tokens) == ("stop", 5) and -0.5 < short.log_likelihood < 0
    assert ask([START], stop=("xyz",))[0][0].text == free.text


@pytest.mark.slow
def test_completions_satisfy_choices_and_allowed_characters(ask):
    rows = [START, PromptRequest(START, {}, choices=("abx", "abc", "zzz")), PromptRequest(START, {}, max_new_tokens=2)]
    results = [row[0] for row in ask(rows, choices=("q", "bcd"))]
    assert [answer.text for answer in results[1:]] == ["abc", results[0].text[:2]] and results[0].text in ("q", "bcd")
    assert set(ask([START], allowed_characters="xyz")[0][0].text) <= set("xyz")
    drawn = ask([START] * 8, choices=("ab", "ac", "b"), sampling=Sampling(temperature=9.0))
    assert 1 < len({row[0].text for row in drawn}) <= 3


@pytest.mark.slow
def test_beam_search_finds_the_best_score_and_ranks_choices(ask):
    """With as many beams as choices no choice is pruned: the order is that of their log-likelihoods."""
    choices = ("abc", "abd", "b", "xyz")
    beam = BeamSearch(4, 0.0)
    results = ask([START], beam=beam, num_samples=4, choices=choices, return_scores=True)[0]
    assert results[0].text == "abc" and {answer.text for answer in results} == set(choices)
    assert [a.score for a in results] == sorted((a.score for a in results), reverse=True)
    # The score includes EOS, which is unlikely within the alphabet.
    assert all(answer.score < answer.log_likelihood for answer in results)


@pytest.mark.slow
def test_gaps_are_filled_in_place(ask):
    row = "abcdefghi<mask>mnopqrstuvwx"
    (answer,) = ask([row], return_filled=True)[0]
    assert answer.spans[0] in 2 * ALPHABET and answer.text == f"abcdefghi{answer.spans[0]}mnopqrstuvwx"
    assert ask([row])[0][0].text.startswith(f"<extra_id_0>{answer.spans[0]}")
    plain = ask(["ab<mask>"], raw_text=True)[0][0]
    assert plain.spans is None
    with pytest.raises(DataError, match="not trained to fill gaps under mode S"):
        ask([row], mode="S")


@pytest.mark.slow
def test_row_with_its_own_seed_is_drawn_independently_of_its_index(ask):
    own = PromptRequest(START, {}, seed=11)
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
        (["--prompt", "a", "--beam-size", "2", "--temperature", "1"], "0 with a beam search"),
        (["--prompt", "a", "--output", "x.jsonl"], "give --input FILE"),
    ],
)
def test_invalid_requests_are_refused_with_one_message(trained, capsys, arguments, message):
    assert main(["generate", str(trained), *arguments]) == EXIT_USAGE
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_output_file_of_another_origin_is_unchanged(trained, tmp_path, capsys):
    """This includes its last line without a line break."""
    for name in ("in.txt", "notes.txt"):
        (tmp_path / name).write_text("my only copy")
        command = ["generate", str(trained), "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / name)]
        assert main(command) == EXIT_REFUSED
        assert "was not written by this command" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "my only copy"


def test_changed_store_is_refused(trained, tmp_path, capsys):
    """With another number of sentinels the ids stand for other text."""
    run = run_directory.read_config(trained)
    other = dataclasses.replace(run, data=dataclasses.replace(run.data, store_dir=str(tmp_path / "stores")))
    shorter = dataclasses.replace(other.data, corpus=dataclasses.replace(run.data.corpus, max_documents=50))
    prepare(shorter, report=lambda line: None)
    store_paths(shorter)[0].rename(store_paths(other.data)[0])
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    write_atomically(copied / "config.json", to_json(other))
    assert main(["generate", str(copied), "--prompt", "a"]) == EXIT_REFUSED
    assert "on which the checkpoint was trained" in capsys.readouterr().err
