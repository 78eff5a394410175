"""All comparisons with transformers on CPUs in one table: training steps, decoding and embedding, measured in turns.

    pip install -e '.[hf]'
    python benchmarks/run.py --output results.json
    python benchmarks/run.py --compare benchmarks/baselines/intel-xeon-6-167.json
    python benchmarks/run.py --results results.json --compare benchmarks/baselines/intel-xeon-6-167.json

Each row runs this project and its peers (eager transformers and, for training steps, torch.compile) on the same shapes,
one process each, in turns. The table has medians with the smallest and largest value. `--output` writes the results as
JSON with the CPU, its load and the versions. `--compare` shows how the ratios to transformers differ from earlier
results, and exits with 1 if one of CPU seconds or memory is worse by more than `--tolerance`, if this project failed in
a row, or if a row of `--rows` that they have is missing: ratios of neighboring turns depend less on the load of the
machine than seconds do, but they do depend on the maker of the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import decode_vs_transformers
import embed_vs_transformers
import interleaved
import train_step_vs_transformers
from rich import box
from rich.console import Console
from rich.table import Table

ROWS = {
    "t5_step": "T5 1.1 training step",
    "llama_step": "Llama-style training step",
    "bert_step": "BERT-like training step",
    "llama_greedy": "greedy decoding, decoder",
    "t5_greedy": "greedy decoding, encoder-decoder",
    "beam_4": "beam search, 4 beams",
    "embedding": "embedding of texts",
}
DECODED = {"llama_greedy": "llama", "t5_greedy": "t5", "beam_4": "beam"}
OURS, PEER = "t5x_like", "transformers"


def measure(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the measurements of a row by library, and the ratios of this project to each peer."""
    if row in DECODED:
        records, _ = decode_vs_transformers.compare(DECODED[row], options)
    elif row == "embedding":
        records = interleaved.measure(embed_vs_transformers.LIBRARIES, options)
    else:
        named = argparse.Namespace(**vars(options), case=row.removesuffix("_step"))
        records = interleaved.measure(train_step_vs_transformers.LIBRARIES, named)
    peers = [name for name in records if name != OURS]
    return {
        "libraries": {name: record.summary() for name, record in records.items()},
        "ratios": {peer: interleaved.ratio(records, OURS, peer) for peer in peers},
    }


def table(rows: Mapping[str, Any], machine: Mapping[str, Any]) -> Table:
    """Return the results as a table."""
    cpu = machine["cpu"]
    title = f"{cpu['name']}, family {cpu['family']} model {cpu['model']}, {machine['cores']} cores"
    shown = Table("row", "library", "CPU s", "wall s", "first call, CPU s", "peak MiB", "CPU ratio", box=box.SIMPLE)
    shown.title = title
    for row, results in rows.items():
        for name, found in results["libraries"].items():
            if "error" in found:
                shown.add_row(ROWS[row], name, f"failed: {found['error'][:60]}")
                continue
            of_peer = results["ratios"].get(name)
            cpu_range, wall_range = found["cpu_seconds_range"], found["wall_seconds_range"]
            shown.add_row(
                ROWS[row],
                name,
                f"{found['cpu_seconds']} ({cpu_range[0]} to {cpu_range[1]})",
                f"{found['wall_seconds']} ({wall_range[0]} to {wall_range[1]})",
                str(found["first_call_cpu_seconds"]),
                str(found["peak_mib"]),
                "" if of_peer is None else f"{of_peer['cpu']}",
            )
    return shown


def differences(
    found: Mapping[str, Any], baseline: Mapping[str, Any], tolerance: float, rows: Sequence[str] = tuple(ROWS)
) -> tuple[list[str], bool]:
    """Return lines that compare the ratios to transformers with those of a baseline, and whether this project is worse.

    It is worse if a ratio exceeds that of the baseline by more than the tolerance, if it failed, or if one of `rows`
    that the baseline has was not measured.
    """
    lines, is_worse = [], False
    for name in ("maker", "family", "model"):
        here, there = (results["machine"]["cpu"].get(name) for results in (found, baseline))
        if here != there:
            lines.append(f"another CPU than the baseline's: {name} {here}, not {there}")
    for row in rows:
        if row in baseline["rows"] and row not in found["rows"]:
            is_worse = True
            lines.append(f"{row}: not measured, but in the baseline, worse")
    for row, results in found["rows"].items():
        if error := results["libraries"][OURS].get("error"):
            is_worse = True
            lines.append(f"{row}: {OURS} failed, worse: {error}")
            continue
        now = results["ratios"].get(PEER)
        then = baseline["rows"].get(row, {}).get("ratios", {}).get(PEER)
        if now is None or then is None:
            lines.append(f"{row}: cannot be compared")
            continue
        parts = []
        for measure in ("cpu", "wall", "peak_memory"):
            change = now[measure] / then[measure] - 1.0
            # Wall clock depends on the load too much to decide anything.
            worse = measure != "wall" and change > tolerance
            is_worse |= worse
            parts.append(
                f"{measure} {now[measure]} (baseline {then[measure]}, {change:+.0%}{', worse' if worse else ''})"
            )
        lines.append(f"{row}: {'; '.join(parts)}")
    return lines, is_worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--output", type=Path, help="file for the results")
    parser.add_argument("--results", type=Path, help="read these results of --output and measure nothing")
    parser.add_argument("--compare", type=Path, help="results of an earlier run")
    parser.add_argument("--tolerance", type=float, default=0.1, help="relative difference that counts (default 0.1)")
    interleaved.add_options(parser, turns=8)
    train_step_vs_transformers.add_options(parser)
    options = parser.parse_args()
    console = Console()
    if options.results:
        found = json.loads(options.results.read_text())
    else:
        found = {"machine": interleaved.machine(), "turns": options.turns, "rows": {}}
        for row in options.rows:
            found["rows"][row] = measure(row, options)
            # After each row, so that a run that is stopped has its results.
            if options.output:
                options.output.write_text(json.dumps(found, indent=2) + "\n")
            console.print(f"measured: {ROWS[row]}", highlight=False)
    console.print(table(found["rows"], found["machine"]))
    if options.compare is None:
        return 0
    lines, is_worse = differences(found, json.loads(options.compare.read_text()), options.tolerance, options.rows)
    for line in lines:
        console.print(line, highlight=False, markup=False)
    return int(is_worse)


if __name__ == "__main__":
    sys.exit(main())
