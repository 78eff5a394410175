"""Peak memory of a training step on a TPU with state, gradients and kernels in the memory of the host.

    python benchmarks/host_memory.py [--topology v5e:2x2] [--rows 16 128 416]

Needs the `tpu` extra and no TPU: the step is compiled ahead of time. It trains 16 layers of two kernels of 2,048 x
8,192 by the formula of Adam, with the norm of the whole gradient as a divisor; kernels are split over all devices, and
layers are recomputed. "state" keeps the moments on the host, as `sharding.optimizer_state_memory` does; "state,
gradients and kernels" moves each kernel to the device within its layer, and its gradient back, as a field for
parameters would.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_like.hardware.topologies import parse_topology
from t5x_like.planning.xla.libtpu import compiler_devices
from t5x_like.sharding.host_memory import HOST, on_device

LAYERS, WIDTH, HIDDEN, LENGTH = 16, 2048, 8192, 1024
PLACES = {"nothing": ("device", "device"), "state": ("device", HOST), "state, gradients and kernels": (HOST, HOST)}
"""What is on the host: memory of the kernels and of the moments."""


def loss(kernels: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, kernels: Any) -> tuple[jax.Array, None]:
        kernels = on_device(kernels)
        return x + jax.nn.gelu(x @ kernels["in"].astype(x.dtype)) @ kernels["out"].astype(x.dtype), None

    x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, kernels)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def train(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    value, gradients = jax.value_and_grad(loss)(state["kernels"], x)
    gradients, state = on_device((gradients, state))
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
    gradients = jax.tree.map(lambda g: g / norm, gradients)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], gradients)
    v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, state["v"], gradients)
    kernels = jax.tree.map(lambda p, m, v: p - 1e-3 * m / (jnp.sqrt(v) + 1e-8), state["kernels"], m, v)
    return {"kernels": kernels, "m": m, "v": v}, value


def peaks(topology: str, rows: int, kernels: str, moments: str) -> tuple[float, float]:
    """Return the GiB per device at the peak of the compiled step, and those of the state on its host."""
    mesh = Mesh(np.array(compiler_devices(parse_topology(topology))), ("fsdp",))
    shapes = {"in": (LAYERS, WIDTH, HIDDEN), "out": (LAYERS, HIDDEN, WIDTH)}

    def arrays(memory: str) -> dict[str, jax.ShapeDtypeStruct]:
        split = NamedSharding(mesh, PartitionSpec(None, "fsdp", None), memory_kind=memory)
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split) for name, shape in shapes.items()}

    state = {"kernels": arrays(kernels), "m": arrays(moments), "v": arrays(moments)}
    placed = jax.tree.map(lambda x: x.sharding, state)
    x = jax.ShapeDtypeStruct((rows, LENGTH, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    step = jax.jit(train, out_shardings=(placed, None), donate_argnums=0)
    found = step.lower(state, x).compile().memory_analysis()
    return found.peak_memory_in_bytes / 2**30, found.host_argument_size_in_bytes / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 128, 416], help="multiples of the devices")
    options = parser.parse_args()
    print("| rows | on the host | peak, GiB per device | host, GiB per device |\n|---|---|---|---|")
    for rows in options.rows:
        for name, places in PLACES.items():
            peak, host = peaks(options.topology, rows, *places)
            print(f"| {rows} | {name} | {peak:.2f} | {host:.2f} |", flush=True)


if __name__ == "__main__":
    main()
