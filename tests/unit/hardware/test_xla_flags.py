"""Compiler flags by platform: what is applied, and that XLA knows the flags for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.hardware.xla_flags import FLAGS, apply_flags, detect_platform, options_to_run_once

DOCUMENT = Path(__file__).parents[3] / "docs" / "operating.md"


def test_flags_of_the_user_are_kept() -> None:
    own = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/tmp/dump"
    environment = {"XLA_FLAGS": own, "NCCL_PROTO": "SIMPLE", "HOME": "/home/user"}
    applied = list(apply_flags(environment, "gpu"))
    assert environment["XLA_FLAGS"].startswith(f"{own} --xla_gpu_all_gather")
    assert environment["XLA_FLAGS"].count("latency_hiding") == 1 and environment["NCCL_PROTO"] == "SIMPLE"
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9" and "LIBTPU_INIT_ARGS" not in environment
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9" in applied and not any("PROTO" in line for line in applied)
    assert not list(apply_flags(environment, "gpu")), "a second call changes nothing"


def test_flags_depend_on_platform_and_generation() -> None:
    v5e: dict[str, str] = {}
    v6e: dict[str, str] = {}
    list(apply_flags(v5e, "tpu", "v5e"))
    list(apply_flags(v6e, "tpu", "v6e"))
    assert v6e["LIBTPU_INIT_ARGS"] == v5e["LIBTPU_INIT_ARGS"] + " --xla_tpu_scoped_vmem_limit_kib=98304"
    assert list(v5e) == list(v6e) == ["LIBTPU_INIT_ARGS"]
    nothing: dict[str, str] = {}
    assert not list(apply_flags(nothing, "cpu")) and not nothing


def test_platform_is_read_from_the_devices_of_the_host(tmp_path: Path) -> None:
    assert detect_platform({"JAX_PLATFORMS": "cpu"}, tmp_path) == ("cpu", "")
    assert detect_platform({"JAX_PLATFORMS": "cuda"}, tmp_path) == ("gpu", "")
    for name, vendor, device in (("0", "0x8086", "0x006f"), ("1", "0x1ae0", "0x006f")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "device").write_text(f"{device}\n")
    assert detect_platform({}, tmp_path) == ("tpu", "v6e")
    assert detect_platform({"JAX_PLATFORMS": "cpu"}, tmp_path) == ("cpu", "")


def test_xla_knows_the_flags_for_gpus() -> None:
    """XLA ends the process for a flag that it does not know."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    list(apply_flags(environment, "gpu"))
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, check=True)


def test_initial_values_have_the_same_bits_at_the_level_that_compiles_them_faster() -> None:
    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = jax.random.split(key)
        return 0.02 * jax.random.normal(first, (64, 96)), jnp.tanh(jax.random.normal(second, (33,)))

    key = jax.random.key(0)
    fast = options_to_run_once("cpu", {})
    assert fast is not None
    compiled = [jax.jit(draw).lower(key).compile(compiler_options=one) for one in (fast, {name: 3 for name in fast})]
    for one, other in zip(*(each(key) for each in compiled), strict=True):
        assert np.array_equal(np.asarray(one).view(np.int32), np.asarray(other).view(np.int32))
    # What the user has set, and other platforms, are left as they are.
    assert options_to_run_once("cpu", {"XLA_FLAGS": "--xla_backend_optimization_level=0"}) is None
    assert options_to_run_once("tpu", {}) is None


def test_documentation_lists_every_flag() -> None:
    text = DOCUMENT.read_text()
    for flag in FLAGS:
        assert f"`{flag.name or flag.variable}`" in text and flag.source.partition(" ")[0] in text
