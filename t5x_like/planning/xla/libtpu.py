"""XLA's TPU compiler (libtpu) on a machine without TPUs: devices of a topology, and capture of its messages."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from t5x_like.errors import ConfigError, ConfigProblem, UserError
from t5x_like.hardware.topologies import Topology

INSTALL = "pip install 't5x-like[tpu]'"
_ENVIRONMENT = {
    # Without it, every start waits for the metadata server of a Google Cloud machine.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Without it, a second process that compiles is refused.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    # Warnings go to stderr, where `aot_compile` reads them, and to no files.
    "TPU_STDERR_LOG_LEVEL": "1",
    "TPU_MIN_LOG_LEVEL": "1",
    "TPU_LOG_DIR": "disabled",
}


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Capture the lines that native code writes to stderr within the context; the list is filled at its end.

    Output that Python writes to stderr is captured as well.
    """
    lines: list[str] = []
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def compiler_is_installed() -> bool:
    """Return whether libtpu, XLA's TPU compiler, is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compiler_devices(topology: Topology) -> list[Any]:
    """Return the devices of a topology for `build_program`, whose program can then be compiled.

    Raises:
      UserError: libtpu is not installed.
      ConfigError: The topology has no TPUs, or libtpu does not know it.
    """
    if topology.accelerator.platform != "tpu":
        expected = "a topology of TPUs: for other devices XLA compiles only on a machine that has them"
        raise ConfigError([ConfigProblem("topology", str(topology), expected)])
    if not compiler_is_installed():
        raise UserError(f"XLA's TPU compiler is not installed: found no libtpu; install it with {INSTALL}")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {}
    if topology.accelerator.name == "v4":
        # With megacore, the two cores of a chip are one device.
        options["chip_config_name"] = "megacore"
    if topology.chips_per_slice == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    try:
        with captured_stderr():
            described = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    except Exception as error:
        raise ConfigError(
            [ConfigProblem("topology", str(topology), f"a topology that libtpu knows: {error}")]
        ) from None
    devices = list(described.devices)
    assert len(devices) == topology.num_devices, f"{len(devices)} devices for {topology}"
    return devices
