"""A run is exported by the command line, and its loader continues prompts as `generate` does."""

import json
import subprocess
import sys

import pytest

from t5x_like.cli import main
from t5x_like.config import (
    EXIT_OK,
    EXIT_REFUSED,
    EXIT_USAGE,
    AdamW,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    MonitoringConfig,
    PrefixLM,
    RunConfig,
    Schedule,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.data.prepare import open_stores, prepare
from t5x_like.trainer import train

pytestmark = pytest.mark.slow

PROMPTS = ["abcab", "cabc", "b"]
RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from loader import load
print(json.dumps(load().generate(json.loads(sys.argv[2]), 8)))
"""


@pytest.fixture(scope="module", params=["prefix_lm", "encoder_decoder"])
def trained(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    (place / "texts").mkdir()
    for number in range(30):
        (place / "texts" / f"{number}.txt").write_text("abc" * (50 + number))
    stack = StackConfig(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64, positions="rope")
    run = RunConfig(
        name="abc",
        model=ModelConfig(
            encoder=stack if request.param == "encoder_decoder" else None,
            decoder=stack,
            vocab_size=288,
            embedding_stddev=0.2,
        ),
        data=DataConfig(
            corpus=CorpusConfig(files=(str(place / "texts" / "*.txt"),), validation_fraction=0.2),
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=16),
            layout=request.param,
            mixture=(PrefixLM(name="S", mode="S", min_target_fraction=0.5, max_target_fraction=0.5),),
            inputs_length=16,
            targets_length=16,
            store=str(place / "stores"),
        ),
        training=TrainingConfig(
            num_train_steps=60,
            batch_size=8,
            optimizer=AdamW(weight_decay=0.0),
            schedule=Schedule(kind="constant", learning_rate=1e-2, warmup_steps=5),
        ),
        evaluation=EvaluationConfig(num_batches=1),
        monitoring=MonitoringConfig(tensorboard=False, samples=1),
    )
    prepare(run.data, report=lambda line: None)
    assert train(run, place / "run") == EXIT_OK
    return run, place / "run"


def test_the_exported_run_answers_as_generate_does(trained, tmp_path, capsys):
    run, folder = trained
    out = tmp_path / "out"
    assert main(["export", str(folder), str(out), "--max-new-tokens", "8", "--platforms", "cpu"]) == EXIT_OK
    capsys.readouterr()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["--input", str(tmp_path / "prompts.txt"), "--max-new-tokens", "8"]
    assert main(["generate", str(folder), *arguments]) == EXIT_OK
    expected = [json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()]
    assert any(expected)
    manifest = json.loads((out / "manifest.json").read_text())
    tokenizer = open_stores(run.data)[0].tokenizer
    before, after = manifest["prompt"]["before"], manifest["prompt"]["after"]
    ids = [[*before, *map(int, tokenizer.encode(text)), *after] for text in PROMPTS]
    command = [sys.executable, "-c", RUN, str(out), json.dumps(ids)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [tokenizer.decode(row) for row in json.loads(done.stdout)] == expected
    assert (out / "tokenizer.json").exists()
    assert main(["export", str(folder), str(out)]) == EXIT_REFUSED


def test_what_int8_costs_is_measured_and_said(trained, tmp_path, capsys):
    _, folder = trained
    sizes = {}
    for dtype in ("float32", "int8"):
        out = tmp_path / dtype
        arguments = ["--dtype", dtype, "--platforms", "cpu", "--max-new-tokens", "4", "--num-batches", "1"]
        assert main(["export", str(folder), str(out), *arguments]) == EXIT_OK
        sizes[dtype] = (out / "weights.safetensors").stat().st_size
    printed = capsys.readouterr().out
    assert "what int8 weights cost" in printed
    losses = json.loads((tmp_path / "int8" / "manifest.json").read_text())["cost"]["loss"]
    for name, loss in losses.items():
        assert loss["float32"] != loss["int8"], f"{name}: nothing was quantised"
        assert abs(loss["float32"] - loss["int8"]) < 0.05 * max(loss["float32"], 0.2), name
    assert sizes["int8"] < 0.35 * sizes["float32"]


def test_refusals(trained, tmp_path, capsys):
    _, folder = trained
    with pytest.raises(SystemExit) as leaving:
        main(["export", str(folder), str(tmp_path / "a"), "--to", "hf", "--dtype", "int8"])
    assert leaving.value.code == EXIT_USAGE
    assert main(["export", str(folder), str(tmp_path / "b"), "--mode", "X"]) == EXIT_USAGE
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "c")]) == EXIT_USAGE
    assert not any(tmp_path.iterdir())
