"""Compiler and communication settings by platform, applied to the environment before jax starts.

`FLAGS` is the whole table; every entry has its source. A variable or flag that the user has set is left as it is.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Literal

Platform = Literal["tpu", "gpu"]

MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext (benchmarks/xla_flags_library.py)"
TRILLIUM = "https://github.com/AI-Hypercomputer/tpu-recipes (training/trillium)"
JAX_GPU = "https://docs.jax.dev/en/latest/gpu_performance_tips.html"
NVIDIA = "https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance"


@dataclasses.dataclass(frozen=True)
class Flag:
    """Setting of a platform.

    Attributes:
      platform: Platform that it applies to.
      variable: Environment variable. LIBTPU_INIT_ARGS and XLA_FLAGS hold several flags.
      name: Flag within the variable; empty if the value is the variable's.
      value: Value.
      purpose: What it is for.
      source: Where it is recommended.
      generations: TPU generations, as in "v6e"; empty for all.
    """

    platform: Platform
    variable: str
    name: str
    value: str
    purpose: str
    source: str
    generations: tuple[str, ...] = ()


def _tpu(
    name: str, purpose: str, source: str = MAXTEXT, value: str = "true", generations: tuple[str, ...] = ()
) -> Flag:
    return Flag("tpu", "LIBTPU_INIT_ARGS", name, value, purpose, source, generations)


def _gpu(name: str, purpose: str, source: str, value: str = "true") -> Flag:
    return Flag("gpu", "XLA_FLAGS", name, value, purpose, source)


_COMBINED_BYTES = str(128 * 2**20)
FLAGS = (
    _tpu("--xla_enable_async_all_gather", "gather parameters while computing"),
    _tpu("--xla_tpu_enable_async_collective_fusion", "fuse collective operations with computation"),
    _tpu("--xla_tpu_enable_async_collective_fusion_fuse_all_gather", "the same for all-gather"),
    _tpu("--xla_tpu_enable_async_collective_fusion_multiple_steps", "the same over several fusions"),
    _tpu("--xla_tpu_overlap_compute_collective_tc", "overlap collective operations and computation"),
    _tpu("--xla_tpu_enable_data_parallel_all_reduce_opt", "overlap the gradients' all-reduce between slices"),
    _tpu("--xla_tpu_data_parallel_opt_different_sized_ops", "the same for operations of different sizes"),
    _tpu("--xla_tpu_scoped_vmem_limit_kib", "larger fusions", TRILLIUM, "98304", ("v6e",)),
    _gpu("--xla_gpu_enable_latency_hiding_scheduler", "overlap communication and computation", JAX_GPU),
    _gpu("--xla_gpu_all_gather_combine_threshold_bytes", "fewer, larger operations", NVIDIA, _COMBINED_BYTES),
    _gpu("--xla_gpu_reduce_scatter_combine_threshold_bytes", "fewer, larger operations", NVIDIA, _COMBINED_BYTES),
    _gpu("--xla_gpu_all_reduce_combine_threshold_bytes", "fewer, larger operations", NVIDIA, _COMBINED_BYTES),
    Flag("gpu", "XLA_PYTHON_CLIENT_MEM_FRACTION", "", "0.9", "share of the memory that jax reserves", NVIDIA),
    Flag("gpu", "NCCL_LL128_BUFFSIZE", "", "-2", "NCCL's low-latency protocol", JAX_GPU),
    Flag("gpu", "NCCL_LL_BUFFSIZE", "", "-2", "NCCL's low-latency protocol", JAX_GPU),
    Flag("gpu", "NCCL_PROTO", "", "SIMPLE,LL,LL128", "NCCL's protocols", JAX_GPU),
)
_LEVEL = "xla_backend_optimization_level"
_TPU_IDS = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "v7x"}
"""Generations by PCI device id, as in jax's hardware_utils."""
_GOOGLE = "0x1ae0"


def detect_platform(environment: Mapping[str, str], devices: Path = Path("/sys/bus/pci/devices")) -> tuple[str, str]:
    """Return platform and TPU generation of this host: ("tpu", "v6e"), ("gpu", "") or ("cpu", "")."""
    wanted = environment.get("JAX_PLATFORMS", "").split(",")[0]
    for device in sorted(devices.glob("*")) if wanted in ("", "tpu") else ():
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "device"))
        except OSError:
            continue
        if vendor == _GOOGLE and kind in _TPU_IDS:
            return "tpu", _TPU_IDS[kind]
    if wanted in ("cuda", "gpu") or (not wanted and glob.glob("/dev/nvidia[0-9]*")):
        return "gpu", ""
    return wanted or "cpu", ""


def apply_flags(environment: MutableMapping[str, str], platform: str, generation: str = "") -> Iterator[str]:
    """Add the flags of a platform to the environment, and yield each as text.

    Flags and variables that are set already keep their values.
    """
    for flag in FLAGS:
        if flag.platform != platform or (flag.generations and generation not in flag.generations):
            continue
        present = environment.get(flag.variable)
        if not flag.name:
            if present is None:
                environment[flag.variable] = flag.value
                yield f"{flag.variable}={flag.value}"
        elif flag.name not in {word.partition("=")[0] for word in (present or "").split()}:
            environment[flag.variable] = f"{present or ''} {flag.name}={flag.value}".strip()
            yield f"{flag.name}={flag.value}"


def options_to_run_once(platform: str, environment: Mapping[str, str]) -> dict[str, int] | None:
    """Return options of XLA for a program that runs once, such as that of the initial values; None: the usual ones.

    On CPUs the usual level of optimization takes three times as long as level 1 to compile the kernels of random
    numbers, for the same bits. A level that the user has set in XLA_FLAGS is left as it is.
    """
    if platform != "cpu" or _LEVEL in environment.get("XLA_FLAGS", ""):
        return None
    return {_LEVEL: 1}
