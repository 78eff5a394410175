"""XLA's TPU compiler (libtpu) on a machine without TPUs: the devices that it makes of a topology, and what it says."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from t5x_like.config import ConfigError, Problem, UserError
from t5x_like.planning.topologies import Topology

INSTALL = "pip install 't5x-like[tpu]'"
_ENVIRONMENT = {
    # Or every start waits for the metadata server of a machine in Google's cloud.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Or a second process that compiles is refused.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    # Warnings on stderr, where `compile` reads them, and no files of them.
    "TPU_STDERR_LOG_LEVEL": "1",
    "TPU_MIN_LOG_LEVEL": "1",
    "TPU_LOG_DIR": "disabled",
}


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """The lines that native code writes to stderr meanwhile, in a list that is filled at the end. What is written in
    Python is captured as well."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def compiler_is_installed() -> bool:
    """Whether libtpu, XLA's TPU compiler, is there."""
    return importlib.util.find_spec("libtpu") is not None


def compiler_devices(topology: Topology) -> list[Any]:
    """The devices of a topology, to be given to `program.assemble`, whose program can then be compiled.

    Raises:
      UserError: libtpu is not installed.
      ConfigError: a topology that is not of TPUs, or one that libtpu does not know.
    """
    if topology.accelerator.platform != "tpu":
        expected = "a topology of TPUs: of others XLA compiles only where one is present"
        raise ConfigError([Problem("topology", str(topology), expected)])
    if not compiler_is_installed():
        raise UserError(f"XLA's compiler for TPUs is not installed: found no libtpu; install it by {INSTALL}")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {}
    if topology.accelerator.name == "v4":
        # A chip is one device.
        options["chip_config_name"] = "megacore"
    if topology.chips_per_slice == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    try:
        with captured_stderr():
            described = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    except Exception as error:
        raise ConfigError([Problem("topology", str(topology), f"one that libtpu knows: {error}")]) from None
    devices = list(described.devices)
    assert len(devices) == topology.num_devices, f"{len(devices)} devices for {topology}"
    return devices
