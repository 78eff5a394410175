"""A run is exported by the command line, and the loader continues prompts as `generate` does."""

import json
import subprocess
import sys

import pytest
from helpers.small_run import small_run

from t5x_like.cli.main import main
from t5x_like.config import CorpusConfig, MonitoringConfig, PrefixLM, ScheduleConfig
from t5x_like.data.store.prepare import open_stores, prepare
from t5x_like.errors import EXIT_OK, EXIT_USAGE
from t5x_like.trainer.train import train

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
    root = tmp_path_factory.mktemp("trained")
    (root / "texts").mkdir()
    for number in range(30):
        (root / "texts" / f"{number}.txt").write_text("abc" * (50 + number))
    run = small_run(
        root,
        request.param,
        (PrefixLM(name="S", mode="S", min_target_fraction=0.5, max_target_fraction=0.5),),
        corpus=CorpusConfig(files=(str(root / "texts" / "*.txt"),), validation_fraction=0.2),
        lengths=(16, 16),
        model={"embedding_stddev": 0.2},
        training={
            "num_train_steps": 60,
            "schedule": ScheduleConfig(kind="constant", learning_rate=1e-2, warmup_steps=5),
        },
        name="abc",
        monitoring=MonitoringConfig(writers=(), num_decoded_samples=1),
    )
    prepare(run.data, report=lambda line: None)
    assert train(run, root / "run") == EXIT_OK
    return run, root / "run"


def test_exported_run_gives_the_completions_of_generate(trained, tmp_path, capsys):
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
    assert main(["export", str(folder), str(out)]) == EXIT_USAGE


def test_cost_of_int8_is_measured_and_reported(trained, tmp_path, capsys):
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


def test_invalid_exports_are_refused(trained, tmp_path, capsys):
    _, folder = trained
    with pytest.raises(SystemExit) as leaving:
        main(["export", str(folder), str(tmp_path / "a"), "--dtype", "int4"])
    assert leaving.value.code == EXIT_USAGE
    assert main(["export", str(folder), str(tmp_path / "b"), "--mode", "X"]) == EXIT_USAGE
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "c")]) == EXIT_USAGE
    assert not any(tmp_path.iterdir())
