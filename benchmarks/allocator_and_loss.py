"""Training steps of t5x_like with and without the settings of the CPU allocator, and with whole logits, in one run.

    python benchmarks/allocator_and_loss.py [t5] [llama] [bert]

It has the same cases as `train_step_vs_transformers.py`. Each variant runs in its own process, in turns
(`interleaved.py`); the ratios are to the step with glibc's usual settings and whole logits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import interleaved
import train_step_vs_transformers as steps


def _changed(
    options: argparse.Namespace, *, usual_allocator: bool, loss_chunk_tokens: int | None
) -> Callable[[], float]:
    values = vars(options) | {"usual_allocator": usual_allocator, "loss_chunk_tokens": loss_chunk_tokens}
    return steps.t5x_like_step(argparse.Namespace(**values))


def usual(options: argparse.Namespace) -> Callable[[], float]:
    return _changed(options, usual_allocator=True, loss_chunk_tokens=0)


def kept_memory(options: argparse.Namespace) -> Callable[[], float]:
    return _changed(options, usual_allocator=False, loss_chunk_tokens=0)


def chunked_loss(options: argparse.Namespace) -> Callable[[], float]:
    return _changed(options, usual_allocator=True, loss_chunk_tokens=512)


def both(options: argparse.Namespace) -> Callable[[], float]:
    return _changed(options, usual_allocator=False, loss_chunk_tokens=512)


VARIANTS = {"usual": usual, "kept memory": kept_memory, "chunked loss": chunked_loss, "both": both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(steps.CASES))
    interleaved.add_options(parser, turns=6)
    steps.add_options(parser)
    options = parser.parse_args()
    print(json.dumps({"machine": interleaved.machine()}), flush=True)
    for case in options.cases:
        records = interleaved.measure(VARIANTS, argparse.Namespace(**vars(options), case=case))
        report = {name: record.summary() for name, record in records.items()}
        for name in report:
            report[name]["ratio"] = interleaved.ratio(records, name, "usual")
            report[name]["loss_last"] = None if records[name].error else round(records[name].turns[-1].result, 4)
        print(json.dumps({case: report}, indent=1), flush=True)


if __name__ == "__main__":
    main()
