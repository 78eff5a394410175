"""An encoder-decoder trained by block diffusion, by the command line: its bound, generation, and the server."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.small_run import small_run

from t5x_like.api import load
from t5x_like.cli.main import main
from t5x_like.config import BlockDiffusion, CorpusConfig, ScheduleConfig
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK, EXIT_USAGE
from t5x_like.trainer.train import train

pytestmark = pytest.mark.slow

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
BLOCK = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on documents that repeat the alphabet: one visible letter determines all others."""
    root = tmp_path_factory.mktemp("blocks")
    (root / "texts").mkdir()
    shift = random.Random(0)
    for number in range(60):
        first = shift.randrange(26)
        (root / "texts" / f"{number}.txt").write_text("".join(ALPHABET[(first + i) % 26] for i in range(300)))
    run = small_run(
        root,
        "encoder_decoder",
        (BlockDiffusion(block_length=BLOCK),),
        corpus=CorpusConfig(files=(str(root / "texts" / "*.txt"),), validation_fraction=0.2),
        lengths=(24, BLOCK + 1),
        stack={"num_layers": 2},
        model={"embedding_stddev": 0.2},
        training={
            "num_train_steps": 240,
            "global_batch_size": 32,
            "schedule": ScheduleConfig(kind="cosine", learning_rate=1e-2, warmup_steps=20),
        },
    )
    prepare(run.data, report=lambda line: None)
    assert train(run, root / "run") == EXIT_OK
    return root / "run"


def test_the_bound_of_held_out_text_is_learned(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained), "--continuation", "10", "10"]) == EXIT_OK
    assert "given the first half: upper bound" in capsys.readouterr().out
    result = json.loads((trained / "evaluation.json").read_text())
    bound = result["diffusion_bound"]["bits_per_byte"]
    # Letters alone have log2(26) bits. Given the first half, all that is left are the ends of documents.
    assert bound < 0.5 * result["baselines"]["unigram_bits_per_byte"]
    low, high = result["intervals"]["bits_per_byte_bound"]
    assert low <= bound <= high
    assert result["continuation"]["is_bound"] and result["continuation"]["bits_per_byte"] < 2
    samples = json.loads((trained / "samples.json").read_text()) if (trained / "samples.json").exists() else []
    assert all(sample["denoiser"] == "block_diffusion" for sample in samples)


def test_text_is_continued_block_by_block(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate = ["generate", str(trained), "--prompt"]
    for prompt, options, expected in (
        ("efghij", ["--max-new-tokens", "8"], "klmnopqr"),
        ("b", ["--max-new-tokens", "5"], "cdefg"),
        ("abcdefghijk", ["--max-new-tokens", "6", "--num-steps", "3"], "lmnopq"),
        ("qrst", ["--max-new-tokens", "4", "--block-length", "4"], "uvwx"),
        ("efghij", ["--max-new-tokens", "8", "--stop", "no"], "klm"),
    ):
        assert main([*generate, prompt, *options]) == EXIT_OK
        assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--prompt", "a", "--block-length", "2"], "block_length: found 2, expected 4, the length of the blocks"),
        (["--prompt", "ab<mask>d"], "found a gap, but the model was not trained to fill gaps"),
        (["--prompt", "a", "--beam-size", "4"], "beam_size: found a model that fills masked positions"),
    ],
)
def test_what_the_blocks_cannot_do_is_refused(
    options: list[str], expected: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(trained), *options]) != EXIT_OK
    assert expected in capsys.readouterr().err


def test_pairs_are_not_scored(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"good": "abc", "bad": "acb"}\n')
    assert main(["eval", str(trained), "--pairs", str(pairs)]) == EXIT_USAGE
    assert "found an encoder-decoder of block diffusion" in capsys.readouterr().err


def test_the_server_completes_text(trained: Path) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    from helpers.served_model import served

    from t5x_like.decoding.diffusion_sampling import _unmask

    prompts = ["efghij", "hijklmnopq", "bcdefgh", "klmnop"]
    # Two blocks, of which the last one is not wanted as a whole.
    expected = load(trained).generate(prompts, max_new_tokens=7)
    with served(trained, slots=3, prompt_length=20, max_new_tokens=12) as url:
        programs = _unmask._cache_size()

        def post(**fields: Any) -> Any:
            return httpx.post(f"{url}/v1/completions", json={"temperature": 0, **fields}, timeout=120)

        answers = post(prompt=prompts, max_tokens=7).json()["choices"]
        assert [answer["text"] for answer in answers] == expected
        assert {answer["finish_reason"] for answer in answers} == {"length"} and {*map(len, expected)} == {7}
        refused = post(prompt="cdefghi", suffix="lmnopqrst", max_tokens=2)
        assert refused.status_code == 400 and "suffix" in refused.json()["error"]["message"]
        assert _unmask._cache_size() == programs, "a program was compiled for a request"
