"""FLOPs and bytes of the dispatch of tokens to experts, counted for a layer's forward pass.

    python benchmarks/expert_dispatch.py [--tokens 4096]
    python benchmarks/expert_dispatch.py --measure [--scale 4 --tokens 1024 --turns 5]

The operations of the program that a TPU would run are counted, as traced: products, sorts, gathers and scatters.
"one-hot" is the dispatch by products with one-hot matrices [tokens, experts, capacity] at a capacity of the mean load,
as in GShard (Lepikhin et al. 2020), which also drops tokens. "sorted" is `kernels/expert_dispatch.py` on a TPU. On CPUs
the rows that its tiles multiply depend on the routing: their number is a mean over drawn routings, even ones and ones
whose expected loads follow a Dirichlet distribution, or a bound for any routing. On GPUs it is the same for any
routing. Shares are relative to the FLOPs of the chosen experts alone.

`--measure` executes the experts of each shape, with widths divided by `--scale`, on a CPU: by tiles as on CPUs and by
blocks as on GPUs, in processes that work in turns (`benchmarks/interleaved.py`).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import interleaved
import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.kernels.expert_dispatch import SLACK, _permute, _sort, _sorted_mlp
from t5x_like.kernels.grouped_mlp import ExpertKernels, grouped_mlp
from t5x_like.kernels.tiled_product import tile_sizes

ROUTINGS = 1000
"""Number of drawn routings."""
CONCENTRATION = 2.0
"""Parameter of the Dirichlet distribution. The largest expected load of 8 experts is then about 9 times the smallest,
of 128 experts 70 times (medians)."""
MOVES = ("gather", "scatter", "scatter-add", "sort")


class Shape(NamedTuple):
    """Layer with experts: width, width of an expert, number of experts, experts per token."""

    d_model: int
    d_ff: int
    experts: int
    chosen: int


SHAPES = {
    "Mixtral 8x7B": Shape(4096, 14336, 8, 2),
    "128 experts, top 8 (Qwen3 30B-A3B)": Shape(2048, 768, 128, 8),
}


class Cost(NamedTuple):
    """FLOPs of products, and bytes that gathers, scatters and sorts read and write."""

    flops: int
    moved_bytes: int


def cost(function: Callable[..., Any], *arguments: Any) -> Cost:
    """Return the cost of a function of arrays of these shapes."""
    flops = moved = 0
    for equation in _equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        inputs = [variable.aval for variable in equation.invars if hasattr(variable.aval, "shape")]
        outputs = [variable.aval for variable in equation.outvars]
        match equation.primitive.name:
            case "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                inner = math.prod(inputs[0].shape[dim] for dim in contracted)
                flops += 2 * inner * math.prod(outputs[0].shape)
            case "ragged_dot_general" | "ragged_dot":
                # Each row is multiplied with the kernel of its own group.
                flops += 2 * math.prod(inputs[0].shape) * inputs[1].shape[-1]
            case name if name in MOVES:
                # A gather reads the rows that it returns, not its whole operand.
                arrays = outputs * 2 if name == "gather" else [*inputs, *outputs]
                moved += sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
            case _:
                pass
    return Cost(flops, moved)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations of a program and of the programs within it."""
    for equation in jaxpr.eqns:
        inner = [value for value in equation.params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
        if inner and equation.primitive.name != "ragged_dot_general":
            for value in inner:
                yield from _equations(getattr(value, "jaxpr", value))
        else:
            yield equation


def one_hot(x: jax.Array, expert: jax.Array, weight: jax.Array, kernels: ExpertKernels) -> jax.Array:
    tokens, chosen = expert.shape
    experts = kernels.wo.shape[0]
    capacity = tokens * chosen // experts
    chosen_TxkxE = jax.nn.one_hot(expert, experts)
    place = jnp.cumsum(chosen_TxkxE.reshape(-1, experts), axis=0).reshape(tokens, chosen, experts) * chosen_TxkxE - 1
    slots_TxExC = jnp.sum(jax.nn.one_hot(place.astype(jnp.int32), capacity, dtype=x.dtype), axis=1)
    weights_TxExC = slots_TxExC * jnp.sum(chosen_TxkxE * weight[..., None], axis=1)[..., None].astype(x.dtype)
    inputs = jnp.einsum("tec,td->ecd", slots_TxExC, x)
    hidden = jax.nn.silu(jnp.einsum("ecd,edf->ecf", inputs, kernels.wi_0))
    out = jnp.einsum("ecf,efd->ecd", hidden * jnp.einsum("ecd,edf->ecf", inputs, kernels.wi_1), kernels.wo)
    return jnp.einsum("ecd,tec->td", out, weights_TxExC)


def sorted_dispatch(
    x: jax.Array, expert: jax.Array, weight: jax.Array, kernels: ExpertKernels, *, platform: str
) -> jax.Array:
    chosen = expert.shape[-1]
    rows = jnp.repeat(x, chosen, axis=0)
    out = _sorted_mlp(rows, expert.reshape(-1), kernels, jax.nn.silu, platform).reshape(*expert.shape, -1)
    return jnp.einsum("tkd,tk->td", out, weight)


def moved_rows(x: jax.Array, expert: jax.Array) -> jax.Array:
    """Return rows sorted by expert and put back: the data movement of the dispatch alone."""
    order, position = _sort(expert.reshape(-1))
    return _permute(_permute(jnp.repeat(x, expert.shape[-1], axis=0), order), position)


def spare_rows(shape: Shape, tokens: int) -> dict[str, float]:
    """Return the rows that CPUs multiply and that are of no use, relative to the rows of the experts."""
    rows, smallest = tokens * shape.chosen, tile_sizes(tokens * shape.chosen, shape.experts)[-1]
    rng = np.random.default_rng(0)
    even = rng.multinomial(rows, np.full(shape.experts, 1 / shape.experts), ROUTINGS)
    loads = rng.dirichlet(np.full(shape.experts, CONCENTRATION), ROUTINGS)
    uneven = np.stack([rng.multinomial(rows, load) for load in loads])
    means = {
        name: float(np.mean(np.sum(-sizes % smallest, axis=1))) for name, sizes in (("even", even), ("uneven", uneven))
    }
    # Rows of an expert's last tile of which one is used.
    return {name: spare / rows for name, spare in {**means, "bound": shape.experts * (smallest - 1)}.items()}


def experts(options: argparse.Namespace, platform: str) -> Callable[[], Any]:
    """Return a forward and backward pass of a shape's experts by the products of a platform."""
    d, f, number, chosen = SHAPES[options.shape]
    d, f, rows = d // options.scale, f // options.scale, options.tokens * chosen
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(0.05 * rng.standard_normal(shape), jnp.float32)

    kernels = ExpertKernels(array(number, d, f), array(number, d, f), array(number, f, d))
    sizes = jnp.asarray(rng.multinomial(rows, rng.dirichlet(np.full(number, CONCENTRATION))), jnp.int32)

    def value(x: jax.Array, kernels: ExpertKernels) -> jax.Array:
        return jnp.sum(jnp.sin(grouped_mlp(x, sizes, kernels, jax.nn.silu, platform)))

    step = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
    x = array(rows, d)
    return lambda: float(jax.block_until_ready(step(x, kernels))[0])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return CPU seconds of forward and backward passes of a shape's experts."""
    ways = {"tiles": "cpu", "blocks": "cuda"}
    records = interleaved.measure(
        {name: functools.partial(experts, platform=platform) for name, platform in ways.items()}, options
    )
    return {
        **{name: record.summary() for name, record in records.items()},
        "tiles to blocks": interleaved.ratio(records, "tiles", "blocks"),
        "load": interleaved.machine()["load_before"],
    }


def report(shape: Shape, tokens: int) -> dict[str, Any]:
    d, f, experts, chosen = shape
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    x, weight = array((tokens, d)), jax.ShapeDtypeStruct((tokens, chosen), jnp.float32)
    expert = jax.ShapeDtypeStruct((tokens, chosen), jnp.int32)
    kernels = ExpertKernels(array((experts, d, f)), array((experts, d, f)), array((experts, f, d)))
    of_experts = 6 * tokens * chosen * d * f
    router = 2 * tokens * d * experts

    def share(flops: int) -> float:
        return round(100 * flops / of_experts, 2)

    before = cost(one_hot, x, expert, weight, kernels)
    after = cost(functools.partial(sorted_dispatch, platform="tpu"), x, expert, weight, kernels)
    blocks = cost(functools.partial(sorted_dispatch, platform="cuda"), x, expert, weight, kernels)
    weighting = share(after.flops - of_experts)
    moved = cost(moved_rows, x, expert)
    return {
        "expert_gflops": round(of_experts / 1e9, 1),
        "router_percent": share(router),
        "dispatch_percent": {
            "one-hot": share(before.flops - of_experts),
            "sorted, TPU": weighting,
            **{
                f"sorted, CPU, {name}": round(weighting + 100 * rows, 2)
                for name, rows in spare_rows(shape, tokens).items()
            },
            "sorted, GPU": share(blocks.flops - of_experts),
        },
        "one_hot_matrix_mib": round(2 * tokens * experts * (tokens * chosen // experts) / 2**20, 1),
        "moved_mib": round(moved.moved_bytes / 2**20, 1),
        "kernel_mib": round(sum(math.prod(x.shape) * 2 for x in kernels) / 2**20, 1),
        "all_to_all_mib_per_device_if_experts_are_split": round(2 * SLACK * tokens * chosen * d * 2 / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a device")
    parser.add_argument("--measure", action="store_true", help="execute the experts on this CPU")
    parser.add_argument("--scale", type=int, default=4, help="divisor of the widths of experts that are executed")
    interleaved.add_options(parser, turns=5)
    options = parser.parse_args()
    for name, shape in SHAPES.items():
        options.shape = name
        found = measure(options) if options.measure else report(shape, options.tokens)
        print(json.dumps({name: found}, indent=1), flush=True)


if __name__ == "__main__":
    main()
