"""Compiled programs are kept on disk and used again; results do not depend on where a program came from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.config import CompilationCacheConfig
from t5x_like.trainer import compilation_cache as module
from t5x_like.trainer.compilation_cache import compilation_cache


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(module, "MIN_COMPILE_SECONDS", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def _compile(number: int) -> None:
    jax.jit(lambda x: jnp.tanh(x) @ x + number)(jnp.ones((4, 4))).block_until_ready()


def test_program_of_several_devices_is_read_back(tmp_path: Path) -> None:
    """A sharded program with a collective operation is found under its key, and computes the same bits."""
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    rows = jax.device_put(
        jax.random.normal(jax.random.key(0), (16, 8)),
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")),
    )

    def program() -> bytes:
        # A new function each time: jax keeps the programs of a function in memory.
        return np.asarray(jax.jit(lambda x: jax.nn.softmax(x @ x.T).sum(0))(rows)).tobytes()

    expected = program()
    with compilation_cache(CompilationCacheConfig(), tmp_path):
        assert program() == expected
        hits.clear()
        jax.clear_caches()
        assert program() == expected
    assert "/jax/compilation_cache/cache_hits" in hits


def test_size_is_bounded(tmp_path: Path) -> None:
    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.rglob("*-cache"))

    with compilation_cache(CompilationCacheConfig(), tmp_path):
        _compile(0)
    one = size()
    assert one > 0
    with compilation_cache(CompilationCacheConfig(max_bytes=3 * one), tmp_path):
        for number in range(1, 8):
            _compile(number)
    assert one < size() <= 3 * one


def test_folder_where_others_may_write_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "shared"
    config = CompilationCacheConfig(directory=str(folder))
    with compilation_cache(config, tmp_path):
        _compile(10)
    (written,) = folder.iterdir()
    assert (written.stat().st_mode & 0o777) == 0o700 and list(written.glob("*-cache"))
    written.chmod(0o777)
    with compilation_cache(config, tmp_path):
        assert jax.config.jax_compilation_cache_dir is None
    assert "others may write there" in caplog.text


def test_cache_that_the_user_set_for_jax_is_left_alone(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with compilation_cache(CompilationCacheConfig(), tmp_path / "run"):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not (tmp_path / "run").exists()
