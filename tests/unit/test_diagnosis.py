"""`doctor` says what is wrong with a machine, a store, a run and a model, and what to do."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.config_examples import changed, example
from helpers.data_examples import text_store

from t5x_like import diagnosis
from t5x_like.checkpoints.checksums import write_checksums
from t5x_like.cli.main import main
from t5x_like.config.serialization import to_json
from t5x_like.errors import EXIT_OK, EXIT_REFUSED
from t5x_like.utils.jsonl import encode_records

_LINE = "".join(f"{line}\n" for line in encode_records([{"step": 1, "loss": 2.0}]))


def findings(target: Path) -> dict[str, diagnosis.Finding]:
    return {finding.subject: finding for finding in diagnosis.examine(target)}


def test_sound_machine_and_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.subject: finding for finding in diagnosis.examine_machine(tmp_path / "not yet there")}
    assert not any(finding.is_failure for finding in found.values())
    assert {"versions", "devices", "open files", "disk", "permission", "clock", "locks"} <= found.keys()
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    bad = {finding.subject: finding for finding in diagnosis.examine_machine(tmp_path)}
    assert bad["disk"].is_failure and "ulimit -n 4096" in bad["open files"].advice


def test_store_is_read_completely(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_store(tmp_path / "s", ["ab", "c"], ["d"])
    assert main(["doctor", str(tmp_path / "s")]) == EXIT_OK
    assert "2 documents, 5 tokens" in capsys.readouterr().out
    (chunk,) = (path for path in (tmp_path / "s" / "train" / "tokens" / "c").rglob("*") if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(data)
    assert main(["doctor", str(tmp_path / "s")]) == EXIT_REFUSED
    assert "BAD" in capsys.readouterr().out


def _run_with_checkpoint(folder: Path, **document: Any) -> None:
    text_store(folder / "stores" / "x", ["ab"])
    (folder / "config.json").write_text(to_json(changed(example(), "data.store_dir", str(folder / "stores"))))
    step = folder / "checkpoints" / "8"
    step.mkdir(parents=True)
    (step / "data").write_bytes(b"abc")
    write_checksums(step)
    (folder / "metrics.jsonl").write_text(_LINE)
    (folder / "exit.json").write_text(json.dumps({"code": 42, "reason": "SIGTERM", **document}))


def test_run_with_damaged_parts(tmp_path: Path) -> None:
    _run_with_checkpoint(tmp_path)
    found = findings(tmp_path)
    assert found["checkpoint 8"] == diagnosis.Finding("checkpoint 8", "intact")
    assert found["records"].found == "1" and not found["records"].advice
    assert "code 42: SIGTERM" in found["last exit"].found
    (tmp_path / "checkpoints" / "8" / "data").write_bytes(b"abd")
    (tmp_path / "checkpoints" / "9.damaged").mkdir()
    (tmp_path / "metrics.jsonl").write_text(_LINE + '{"st')
    (tmp_path / "exit.json").write_text("[]")
    found = findings(tmp_path)
    assert found["checkpoint 8"].is_failure and "not the content that was saved" in found["checkpoint 8"].found
    assert found["checkpoint 9.damaged"].advice and "1 damaged" in found["records"].found
    assert "malformed" in found["last exit"].found
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    assert "not mounted" in findings(tmp_path)["checkpoints"].advice
    (tmp_path / "config.json").write_text("{")
    assert any(finding.is_failure for finding in findings(tmp_path).values())


@pytest.mark.parametrize("name", ["empty", "file", "none"])
def test_path_without_run_store_or_model_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert main(["doctor", str(tmp_path / name)]) == EXIT_REFUSED
    assert "BAD" in capsys.readouterr().out
