"""FLOPs and bytes of the dispatch of tokens to experts, counted for a layer's forward pass.

    python benchmarks/expert_dispatch.py [--tokens 4096]

The operations of the program that a TPU would run are counted, as traced: products, sorts, gathers and scatters.
"one-hot" is the dispatch by products with one-hot matrices [tokens, experts, capacity] at a capacity of the mean load,
as in GShard (Lepikhin et al. 2020), which also drops tokens. "sorted" is `kernels/expert_dispatch.py` on a TPU. On CPUs
and GPUs the rows that the tiles multiply depend on the routing: their number is a mean over drawn routings, even ones
and ones whose expected loads follow a Dirichlet distribution, or a bound for any routing. The gradient of the kernels
on GPUs has tiles of its own. Shares are relative to the FLOPs of the chosen experts alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.kernels.expert_dispatch import SLACK, _permute, _sort, _sorted_mlp
from t5x_like.kernels.grouped_mlp import ExpertKernels
from t5x_like.kernels.tiled_product import tile_sizes
from t5x_like.kernels.triton_product import FEWEST_ROWS, tile_rows

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


def sorted_dispatch(x: jax.Array, expert: jax.Array, weight: jax.Array, kernels: ExpertKernels) -> jax.Array:
    chosen = expert.shape[-1]
    rows = jnp.repeat(x, chosen, axis=0)
    out = _sorted_mlp(rows, expert.reshape(-1), kernels, jax.nn.silu, "tpu").reshape(*expert.shape, -1)
    return jnp.einsum("tkd,tk->td", out, weight)


def moved_rows(x: jax.Array, expert: jax.Array) -> jax.Array:
    """Return rows sorted by expert and put back: the data movement of the dispatch alone."""
    order, position = _sort(expert.reshape(-1))
    return _permute(_permute(jnp.repeat(x, expert.shape[-1], axis=0), order), position)


def smallest_tiles(shape: Shape, tokens: int) -> dict[str, int]:
    """Return the rows of the smallest tile, up to a multiple of which the rows of each expert are multiplied."""
    size = tokens * shape.chosen, shape.experts
    return {
        "CPU": tile_sizes(*size)[-1],
        "GPU": tile_rows(*size)[-1],
        "GPU, gradient of the kernels": FEWEST_ROWS,
    }


def spare_rows(shape: Shape, tokens: int, smallest: int) -> dict[str, float]:
    """Return the rows that are multiplied in tiles and that are of no use, relative to the rows of the experts."""
    rows = tokens * shape.chosen
    rng = np.random.default_rng(0)
    even = rng.multinomial(rows, np.full(shape.experts, 1 / shape.experts), ROUTINGS)
    loads = rng.dirichlet(np.full(shape.experts, CONCENTRATION), ROUTINGS)
    uneven = np.stack([rng.multinomial(rows, load) for load in loads])
    means = {
        name: float(np.mean(np.sum(-sizes % smallest, axis=1))) for name, sizes in (("even", even), ("uneven", uneven))
    }
    # Rows of an expert's last tile of which one is used.
    return {name: spare / rows for name, spare in {**means, "bound": shape.experts * (smallest - 1)}.items()}


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
    after = cost(sorted_dispatch, x, expert, weight, kernels)
    weighting = share(after.flops - of_experts)
    moved = cost(moved_rows, x, expert)
    return {
        "expert_gflops": round(of_experts / 1e9, 1),
        "router_percent": share(router),
        "dispatch_percent": {
            "one-hot": share(before.flops - of_experts),
            "sorted, TPU": weighting,
            **{
                f"sorted, {product}, {name}": round(weighting + 100 * rows, 2)
                for product, smallest in smallest_tiles(shape, tokens).items()
                for name, rows in spare_rows(shape, tokens, smallest).items()
            },
        },
        "one_hot_matrix_mib": round(2 * tokens * experts * (tokens * chosen // experts) / 2**20, 1),
        "moved_mib": round(moved.moved_bytes / 2**20, 1),
        "kernel_mib": round(sum(math.prod(x.shape) * 2 for x in kernels) / 2**20, 1),
        "all_to_all_mib_per_device_if_experts_are_split": round(2 * SLACK * tokens * chosen * d * 2 / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a device")
    options = parser.parse_args()
    for name, shape in SHAPES.items():
        print(json.dumps({name: report(shape, options.tokens)}, indent=1), flush=True)


if __name__ == "__main__":
    main()
