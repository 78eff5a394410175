"""Checkpoints on servers of both protocols: whatever is killed, what is listed is complete, and nothing else stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.bucket_servers import Server, without_bucket_settings
from helpers.checkpoint_states import abstract, assert_same_bits, make_state

from t5x_like.checkpoints.bucket import BucketCheckpoints
from t5x_like.config import CheckpointConfig
from t5x_like.errors import SafetyError
from t5x_like.storage import locations
from t5x_like.storage.locations import Url, location

pytestmark = pytest.mark.buckets

REPOSITORY = Path(__file__).parents[2]
KILLS = int(os.environ.get("BUCKET_KILLS", "4"))


@pytest.mark.timeout(max(1800, 120 * KILLS))
def test_kills_during_saves_leave_complete_checkpoints_and_nothing_else(server: Server) -> None:
    settings = {**without_bucket_settings(), **server.environment, "PYTHONPATH": str(REPOSITORY)}
    script = REPOSITORY / "tests" / "helpers" / "bucket_kills.py"
    command = [sys.executable, str(script), server.url("kills/checkpoints"), str(KILLS), "0"]
    result = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    seen = [line for line in result.stdout.splitlines() if line.startswith("steps")]
    assert len(seen) == KILLS and len(set(seen)) > 1, result.stdout


@pytest.mark.parametrize("kind", ["params/head/kernel/c/0/0", "files/host", "record"])
def test_flipped_byte_is_found_and_fallen_back_from(server: Server, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    url = location(server.url(f"flipped/{kind}"))
    assert isinstance(url, Url)
    checkpoints = BucketCheckpoints(url, CheckpointConfig(), directory=Path("checkpoints"))
    for step in (1, 2):
        state = make_state(step)
        checkpoints.save(step, state, {}, {"host": b"position"})
        checkpoints.wait()
    (folder,) = locations.children(url / "data", "2.")
    key = url / "committed" / "2.json" if kind == "record" else url / "data" / folder / kind
    data = bytearray(locations.read_bytes(key) or b"")
    data[3] ^= 64
    locations.write_bytes(key, bytes(data))
    with pytest.raises(SafetyError, match="committed/2.json" if kind == "record" else kind.partition("/c/")[0]):
        checkpoints.restore(abstract(state), 2)
    step, restored, _ = checkpoints.restore(abstract(state))
    assert step == 1 and checkpoints.steps() == [1]
    assert_same_bits(restored, make_state(1))
