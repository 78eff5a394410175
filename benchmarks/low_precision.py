"""Loss curves of a small run in float32, in bfloat16, and with products of 8-bit operands, on the same rows.

    python benchmarks/low_precision.py [NAME ...] [--recipe smoke:decoder] [--steps 300] [--seeds 3]

It takes the options of `optimizer_quality.py`. The 8-bit arms set `quantization` of a stack (the extra
`quantization`), with activations in bfloat16. The script compares what is learned: on a CPU, 8 bits save no time.
"""

from __future__ import annotations

import dataclasses

import optimizer_quality

from t5x_like.config import RunConfig


def precision(dtype: str, quantization: str | None = None) -> optimizer_quality.Change:
    def changed(run: RunConfig) -> RunConfig:
        stacks = {
            name: dataclasses.replace(stack, quantization=quantization) for name, stack in run.model.stacks.items()
        }
        return dataclasses.replace(run, model=dataclasses.replace(run.model, dtype=dtype, **stacks))

    return changed


CANDIDATES: dict[str, optimizer_quality.Change] = {
    "float32": precision("float32"),
    "bfloat16": precision("bfloat16"),
    "int8": precision("bfloat16", "int8"),
    "float8": precision("bfloat16", "float8"),
}


if __name__ == "__main__":
    optimizer_quality.compare(CANDIDATES, __doc__)
