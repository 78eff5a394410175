"""Commands whose outputs are in a bucket write there what they write on a disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from helpers.bucket_servers import Server
from helpers.model_examples import parameters
from helpers.saved_state import saved_state
from helpers.task_head_examples import labeled_run

from t5x_like import run_directory
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.cli.main import main
from t5x_like.config import CheckpointConfig
from t5x_like.data.store.prepare import open_stores, prepare
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.errors import EXIT_OK, EXIT_USAGE
from t5x_like.interop.huggingface.checkpoint import write_directory
from t5x_like.models import presets
from t5x_like.program import build_program
from t5x_like.storage import locations
from t5x_like.storage.locations import Url, location
from t5x_like.storage.mirror import local_copy

pytestmark = pytest.mark.buckets


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an untrained classifier, the run `labels`, and a Llama in Hugging Face's format, `llama`."""
    directory = tmp_path_factory.mktemp("outputs")
    (directory / "llama").mkdir()
    llama = presets.llama_3("8b")
    assert llama.decoder is not None
    sizes = {"num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "d_ff": 24}
    stack = dataclasses.replace(llama.decoder, **sizes)
    llama = dataclasses.replace(llama, decoder=stack, vocab_size=31, dtype="float32", remat="none")
    write_directory(directory / "llama", llama, parameters(llama), "llama")
    texts = [json.dumps({"text": f"text {number}", "label": ("red", "green")[number % 2]}) for number in range(40)]
    (directory / "texts.jsonl").write_text("\n".join(texts))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(directory)
        run = labeled_run()
        prepare(run.data, report=lambda line: None)
        (directory / "labels").mkdir()
        run_directory.claim_config(run_directory.RunRecord(directory / "labels"), run)
        program = build_program(run, jax.devices()[:1])
        manager = CheckpointManager(directory / "labels" / run_directory.CHECKPOINTS, CheckpointConfig())
        rows = TrainingStream(open_stores(run.data), run.data, run.training.global_batch_size)
        manager.save(1, program.checkpointable_state(program.init()), {"data": {"fingerprint": rows.fingerprint}})
        manager.close()
    return directory


@pytest.fixture
def bucket(server: Server, local: Path, monkeypatch: pytest.MonkeyPatch) -> Url:
    """A place in the bucket; the current directory is that of the runs."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(local)
    url = location(server.url(f"outputs/{local.name}"))
    assert isinstance(url, Url)
    return url


def files_below(place: Path | Url) -> dict[str, bytes | None]:
    if isinstance(place, Url):
        return {name: locations.read_bytes(place / name) for name in locations.keys(place)}
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def once(out: Path, *arguments: str) -> None:
    """Run a command that writes `out`, unless the test with another server has done so."""
    if not out.exists():
        assert main(list(arguments)) == EXIT_OK


def test_conversions(local: Path, bucket: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hugging Face directory is imported and written again, from and to URLs; what describes an output comes last."""
    written: list[str] = []
    write: Callable[..., None] = locations.write_bytes

    def recorded(path: Url, *data: bytes) -> None:
        written.append(str(path))
        write(path, *data)

    monkeypatch.setattr(locations, "write_bytes", recorded)
    once(local / "imported", "convert", "--from", "hf", "llama", "imported")
    assert main(["convert", "--from", "hf", "llama", f"{bucket}/imported"]) == EXIT_OK
    assert written[-1] == f"{bucket}/imported/model.json"
    copied = saved_state(local_copy(f"{bucket}/imported", "MODEL"), 0)
    expected = saved_state(local / "imported", 0)
    assert copied.keys() == expected.keys()
    assert all(copied[path].tobytes() == expected[path].tobytes() for path in expected)
    once(local / "hf", "convert", "--to", "hf", "imported", "hf")
    assert main(["convert", "--to", "hf", f"{bucket}/imported", f"{bucket}/hf"]) == EXIT_OK
    assert written[-1] == f"{bucket}/hf/config.json"
    found, expected_files = files_below(bucket / "hf"), files_below(local / "hf")
    assert found.keys() == expected_files.keys()
    assert [name for name in found if found[name] != expected_files[name]] in ([], ["README.md"]), "it names the source"
    # The same from a Hugging Face directory at a URL; a URL that is not free is refused.
    assert main(["convert", "--from", "hf", f"{bucket}/hf", f"{bucket}/again"]) == EXIT_OK
    assert main(["convert", "--to", "hf", "imported", f"{bucket}/hf"]) == EXIT_USAGE


def test_export(local: Path, bucket: Url) -> None:
    once(local / "exported", "export", "labels", "exported", "--platforms", "cpu")
    assert main(["export", "labels", f"{bucket}/exported", "--platforms", "cpu"]) == EXIT_OK
    found, expected = files_below(bucket / "exported"), files_below(local / "exported")
    assert found.keys() == expected.keys() and "manifest.json" in found
    assert all(found[name] == expected[name] for name in expected if name.endswith(".safetensors"))


@pytest.mark.parametrize("command, output", [("embed", "vectors.npy"), ("predict", "predicted.jsonl")])
def test_lines_and_vectors(local: Path, bucket: Url, command: str, output: str) -> None:
    locations.write_bytes(bucket / "texts.jsonl", (local / "texts.jsonl").read_bytes())
    once(local / output, command, "labels", "--input", "texts.jsonl", "--output", output)
    source = f"{bucket}/texts.jsonl" if command == "embed" else "texts.jsonl"
    assert main([command, "labels", "--input", source, "--output", f"{bucket}/{output}"]) == EXIT_OK
    assert locations.read_bytes(bucket / output) == (local / output).read_bytes()
