"""Corpora in buckets and on the Hugging Face Hub are prepared to the stores of the same files on a disk.

The clients gcsfs, s3fs and huggingface_hub (the extra `remote`) talk to servers on this machine.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers.bucket_servers import Server, without_bucket_settings
from helpers.hub_server import hub_serving

pytestmark = [pytest.mark.external, pytest.mark.slow]

PREPARE = """
import json, sys
from t5x_like.config import CausalLM, CorpusConfig, DataConfig, TokenizerConfig
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import UserError
from t5x_like.utils.trusted_urls import trust
files, store_dir, text_field = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
trust(files)
data = DataConfig(
    corpus=CorpusConfig(files=tuple(files), text_field=text_field), tokenizer=TokenizerConfig(kind="bytes"),
    store_dir=store_dir, layout="causal_lm", mixture=(CausalLM(),), inputs_length=8, targets_length=8,
)
try:
    (store,) = prepare(data, report=lambda line: None, workers=1)
    print(json.dumps([store.info["content_fingerprint"], store.info["source_fingerprint"]]))
except UserError as error:
    print(json.dumps(str(error)))
"""


def files() -> dict[str, bytes]:
    """Return files of several formats, one of which is read in byte ranges and one by row groups."""
    rows = [{"text": f"document {number} " + "and so on " * (number % 50)} for number in range(3000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:100]), buffer, row_group_size=30)
    zstd = pyarrow.compress(lines[: lines.index(b"\n") + 1], codec="zstd", asbytes=True)
    return {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines[:9000].rpartition(b"\n")[0]),
        "c.json.zst": zstd,
        "d.parquet": buffer.getvalue().to_pybytes(),
    }


def prepared(names: list[str], store_dir: Path, environment: Mapping[str, str], text_field: str = "text") -> object:
    """Return what a process that prepares the files prints: the fingerprints of the store, or the error."""
    command = [sys.executable, "-c", PREPARE, json.dumps(names), str(store_dir), text_field]
    variables = {**without_bucket_settings(), **environment}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True, text=True, timeout=240)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Fingerprints of the store of the same files on a disk."""
    folder = tmp_path_factory.mktemp("files")
    for name, data in files().items():
        (folder / name).write_bytes(data)
    return prepared([str(folder / "*")], folder.parent / "stores", {})


def check_formats_and_errors(url: str, environment: Mapping[str, str], expected: object, folder: Path) -> None:
    """Check the store of the files below `url`, and the messages for a missing file and a missing field."""
    names = [f"{url}/*.jsonl", f"{url}/b.jsonl.gz", f"{url}/[cd].*"]
    assert prepared(names, folder / "stores", environment) == expected
    assert "found no file that matches" in str(prepared([f"{url}/*.csv"], folder / "stores", environment))
    assert "unreadable" in str(prepared([f"{url}/missing.jsonl"], folder / "stores", environment))
    wrong = str(prepared([f"{url}/d.parquet"], folder / "stores", environment, "content"))
    assert "found the fields 'text', expected 'content'" in wrong


def test_files_in_a_bucket(direct: Server, expected: object, tmp_path: Path) -> None:
    pytest.importorskip("s3fs" if direct.scheme == "s3" else "gcsfs", reason="the extra `remote` is not installed")
    environment = {**direct.environment, "STORAGE_EMULATOR_HOST": direct.endpoint}
    upload(direct, environment)
    check_formats_and_errors(direct.url("corpus"), environment, expected, tmp_path)


def upload(server: Server, environment: Mapping[str, str]) -> None:
    """Write the files by this package's own storage, in a process that has the settings of the server."""
    code = (
        "import sys; from t5x_like.storage import locations\n"
        "for line in sys.stdin: name, data = line.split(); locations.write_bytes(locations.location(name),"
        " bytes.fromhex(data))"
    )
    lines = "".join(f"{server.url('corpus/' + name)} {data.hex()}\n" for name, data in files().items())
    variables = {**without_bucket_settings(), **environment}
    subprocess.run([sys.executable, "-c", code], input=lines, env=variables, check=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with hub_serving("someone/texts", files()) as address:
        yield address


def test_files_on_the_hub(hub: str, expected: object, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="the extra `remote` is not installed")
    environment = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    check_formats_and_errors("hf://datasets/someone/texts", environment, expected, tmp_path)
    other = str(prepared(["hf://datasets/someone/else/a.jsonl"], tmp_path / "stores", environment))
    assert "unreadable" in other
