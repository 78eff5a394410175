"""Temporary memory of a compiled training step by the size of the vocabulary, with whole logits and in chunks.

    python benchmarks/loss_memory.py

The step is that of `train_step_vs_transformers.py` for `llama` (8 rows of 512 tokens, d_model 256, untied head). It is
compiled for one CPU device and not run; XLA reports the bytes of its temporary arrays. The gradients of table and head
are among them, and grow with the vocabulary in any case.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

import train_step_vs_transformers as steps

VOCABULARIES = (32_128, 64_256, 128_512, 257_024)


def temporary_mib(vocabulary: int, chunk_tokens: int | None) -> int:
    import jax

    from t5x_like.program import build_program

    options = argparse.Namespace(case="llama", unrolled=False, full_dropout=False, loss_chunk_tokens=chunk_tokens)
    run = steps.run_of(options)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=vocabulary))
    program = build_program(run, jax.devices()[:1])
    batch = {
        name: {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in features.items()}
        for name, features in program.batch_spec.items()
    }
    analysis = program.train_step.lower(program.abstract_state, batch).compile().memory_analysis()
    return round(analysis.temp_size_in_bytes / 2**20)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    # Buffers do not depend on how LLVM optimizes the code within them.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_llvm_disable_expensive_passes=true".strip()
    for vocabulary in VOCABULARIES:
        gradients = round(2 * 4 * steps.D_MODEL * vocabulary / 2**20)
        row = {"vocabulary": vocabulary, "gradients_of_table_and_head_mib": gradients}
        row |= {f"{name}_mib": temporary_mib(vocabulary, count) for name, count in (("whole", 0), ("chunks", None))}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
