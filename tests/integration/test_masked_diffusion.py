"""An encoder trained by masked diffusion, by the command line: its bound, minimal pairs, generation, and the server."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.small_run import small_run

from t5x_like.api import load
from t5x_like.cli.main import main
from t5x_like.config import CorpusConfig, MaskedDiffusion, ScheduleConfig
from t5x_like.data.store.prepare import prepare
from t5x_like.decoding.unmasking_schedule import DiffusionSampling
from t5x_like.errors import EXIT_OK, EXIT_USAGE
from t5x_like.trainer.train import train

pytestmark = pytest.mark.slow

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on documents that repeat the alphabet: one visible letter determines all others."""
    root = tmp_path_factory.mktemp("diffusion")
    (root / "texts").mkdir()
    shift = random.Random(0)
    for number in range(60):
        first = shift.randrange(26)
        (root / "texts" / f"{number}.txt").write_text("".join(ALPHABET[(first + i) % 26] for i in range(300)))
    run = small_run(
        root,
        "encoder",
        (MaskedDiffusion(),),
        corpus=CorpusConfig(files=(str(root / "texts" / "*.txt"),), validation_fraction=0.2),
        lengths=(24, 0),
        stack={"num_layers": 2},
        model={"embedding_stddev": 0.2},
        training={
            "num_train_steps": 160,
            "global_batch_size": 16,
            "schedule": ScheduleConfig(kind="cosine", learning_rate=1e-2, warmup_steps=20),
        },
    )
    prepare(run.data, report=lambda line: None)
    assert train(run, root / "run") == EXIT_OK
    return root / "run"


def test_the_bound_of_held_out_text_is_learned(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained)]) == EXIT_OK
    assert "given the first half: upper bound" in capsys.readouterr().out
    result = json.loads((trained / "evaluation.json").read_text())
    bound = result["diffusion_bound"]["bits_per_byte"]
    # Letters alone have log2(26) bits. Given the first half, all that is left are the ends of documents.
    assert bound < 0.5 * result["baselines"]["unigram_bits_per_byte"]
    low, high = result["intervals"]["bits_per_byte_bound"]
    assert low <= bound <= high
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    # The weights of a row sum to its length, so that a step of 16 rows of 24 tokens has 384.
    assert records[-1]["loss_tokens"] == pytest.approx(384, rel=1e-4)
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]


def test_the_loss_by_position_has_the_mean_of_the_evaluation(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "positions.json"
    assert main(["eval", str(trained)]) == EXIT_OK
    assert main(["eval", str(trained), "--loss-by-position", "--output", str(output)]) == EXIT_OK
    assert "16 to 23" in capsys.readouterr().out
    bins = json.loads(output.read_text())["objectives"]["masked_diffusion"]
    mean = sum(one["loss"] * one["tokens"] for one in bins) / sum(one["tokens"] for one in bins)
    expected = json.loads((trained / "evaluation.json").read_text())["objectives"]["masked_diffusion"]["loss"]
    assert mean == pytest.approx(expected, rel=1e-4)
    # The rows of this model are too short for a context with four statements.
    assert main(["eval", str(trained), "--retrieval", "200"]) == EXIT_USAGE
    assert "expected at most 18, which" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", str(trained), "--retrieval", "200", "--pairs", str(output)])
    assert "--retrieval takes no --pairs" in capsys.readouterr().err


def test_pairs_are_told_apart(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = []
    for first in range(24):
        good = "".join(ALPHABET[(first + i) % 26] for i in range(16))
        pairs.append({"good": good, "bad": good[:8] + good[9] + good[8] + good[10:]})
    file, output = tmp_path / "pairs.jsonl", tmp_path / "scores.json"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for scoring in ("pseudo_likelihood", "diffusion_bound"):
        command = ["eval", str(trained), "--pairs", str(file), "--pairs-score", scoring, "--output", str(output)]
        assert main(command) == EXIT_OK
        found = json.loads(output.read_text())
        assert found["num_pairs"] == 24 and found["scoring"] == scoring and found["accuracy"] > 0.9
        assert found["interval"][0] > 0.5
    capsys.readouterr()
    file.write_text('{"good": "a"}\n')
    assert main(["eval", str(trained), "--pairs", str(file)]) == EXIT_USAGE
    assert "pairs.jsonl:1: found no field 'bad'" in capsys.readouterr().err


def test_text_is_continued_and_gaps_are_filled(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = ["generate", str(trained)]
    assert main([*generate, "--prompt", "efghij", "--max-new-tokens", "8"]) == EXIT_OK
    assert capsys.readouterr().out == "klmnopqr\n"
    prompts = tmp_path / "prompts.jsonl"
    gapped = ["abcd<mask><mask>ghijk<mask>mnopqrst", "<mask>fghijklmnopqrstu", "efghijklmnopqrst<mask>"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in gapped))
    output = tmp_path / "filled.jsonl"
    command = [*generate, "--input", str(prompts), "--output", str(output), "--return-filled"]
    assert main(command) == EXIT_OK
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["output"] for line in lines] == ["abcdefghijklmnopqrst", "efghijklmnopqrstu", "efghijklmnopqrstu"]
    assert [line["spans"] for line in lines] == [["e", "f", "l"], ["e"], ["u"]]
    # The settings of unmasking are among those that the lines depend on.
    assert main([*command, "--unmask-order", "random"]) != EXIT_OK
    assert "settings.diffusion" in capsys.readouterr().err
    random_order = ["--unmask-order", "random", "--block-length", "4", "--num-steps", "8", "--temperature", "0.3"]
    again = []
    for _ in range(2):
        assert main([*generate, "--prompt", "bcdef<mask>jklmnop", "--gap-tokens", "3", *random_order]) == EXIT_OK
        again.append(capsys.readouterr().out)
    assert again[0] == again[1] and again[0] == "ghi\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--beam-size", "4"], "beam_size: found a model that fills masked positions"),
        (["--repetition-penalty", "1.2", "--return-scores"], "repetition_penalty, return_scores: found a model"),
        (["--block-length", "2", "--prompt-lookup"], "prompt_lookup: found a model"),
    ],
)
def test_options_of_decoding_from_left_to_right_are_refused(
    options: list[str], expected: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(trained), "--prompt", "a", *options]) == EXIT_USAGE
    assert expected in capsys.readouterr().err


def test_the_server_completes_and_inserts_text(trained: Path) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    from helpers.served_model import served

    from t5x_like.decoding.diffusion_sampling import _unmask

    diffusion = DiffusionSampling(block_length=4)
    prompts = ["efghij", "hijklmnopq", "bcdefgh", "klmnop"]
    expected = load(trained).generate(prompts, max_new_tokens=8, diffusion=diffusion)
    with served(trained, slots=3, prompt_length=20, max_new_tokens=12, diffusion=diffusion) as url:
        programs = _unmask._cache_size()

        def post(**fields: Any) -> Any:
            return httpx.post(f"{url}/v1/completions", json={"temperature": 0, **fields}, timeout=120)

        answers = post(prompt=prompts, max_tokens=8).json()["choices"]
        assert [answer["text"] for answer in answers] == expected
        assert {answer["finish_reason"] for answer in answers} == {"length"}
        assert post(prompt="cdefghi", suffix="lmnopqrst", max_tokens=2).json()["choices"][0]["text"] == "jk"
        cut = post(prompt=prompts[0], max_tokens=8, stop=expected[0][3:5]).json()["choices"][0]
        assert cut["text"] == expected[0][:3] and cut["finish_reason"] == "stop"
        with httpx.stream(
            "POST",
            f"{url}/v1/completions",
            json={"prompt": "efghij", "max_tokens": 8, "temperature": 0, "stream": True},
            timeout=120,
        ) as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
        pieces = [choice["text"] for event in events for choice in event["choices"]]
        assert "".join(pieces) == expected[0] and len([piece for piece in pieces if piece]) == 2
        refused = post(prompt="a", logprobs=1, repetition_penalty=1.3)
        assert refused.status_code == 400
        assert "logprobs, repetition_penalty: this model fills masked positions" in refused.json()["error"]["message"]
        dialogue = {"messages": [{"role": "user", "content": "a"}]}
        assert httpx.post(f"{url}/v1/chat/completions", json=dialogue, timeout=120).status_code == 404
        assert _unmask._cache_size() == programs, "a program was compiled for a request"
