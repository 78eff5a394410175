"""Peak memory of importing a Hugging Face model, relative to the size of its parameters.

    python benchmarks/import_memory.py --layers 24 --directory /tmp/t5_1b

The benchmark writes a random T5 1.1 with 1.0 billion parameters (float32, in files of 500 MB) and imports it twice,
each time in a new process: into memory (`Source.params`), and to a checkpoint as `t5x-like convert --from hf` does.
Memory that the process had before the import (jax, the model's structure) is not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from t5x_like.interop.huggingface import state_dict
from t5x_like.interop.huggingface.checkpoint import import_directory, open_directory
from t5x_like.interop.huggingface.families import get_family
from t5x_like.interop.huggingface.weight_map import tensors
from t5x_like.interop.safetensors_file import Pending, write_sharded
from t5x_like.models import presets
from t5x_like.models.factory import abstract_model


def make(directory: Path, layers: int) -> None:
    model = presets.t5_1_1("large")
    assert model.encoder is not None and model.decoder is not None
    stacks = {name: dataclasses.replace(s, num_layers=layers, d_ff=4096) for name, s in model.stacks.items()}
    model = dataclasses.replace(model, encoder=stacks["encoder"], decoder=stacks["decoder"])
    random = np.random.default_rng(0)

    def pending(name: str, shape: tuple[int, ...]) -> Pending:
        return Pending(name, np.dtype(np.float32), shape, lambda: random.random(shape, np.float32))

    family = get_family("t5")
    pending_tensors = [
        pending(t.name, t.shape) for t in tensors(family.rules, state_dict.shapes_of(abstract_model(model).params))
    ]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "t5", **family.write(model)}))
    write_sharded(directory, pending_tensors, max_bytes=500_000_000)


def resident() -> int:
    """Return the resident anonymous bytes of this process: mapped files, whose pages can be dropped, are left out."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


def measure(directory: Path, *, to_checkpoint: bool) -> dict[str, float]:
    source = open_directory(directory)
    spec = abstract_model(source.model)
    size = 4 * sum(int(np.prod(shape)) for shape in state_dict.shapes_of(spec.params).values())
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    if to_checkpoint:
        import_directory(directory, directory.with_name(directory.name + ".imported"))
    else:
        source.params(spec.params)
    done.set()
    thread.join()
    everything = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "gigabytes": size / 1e9,
        "own_peak_over_size": (peak - before) / size,
        "with_mapped_files_over_size": (everything - before) / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--measure", choices=("memory", "checkpoint"))
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.directory, to_checkpoint=options.measure == "checkpoint")))
        return
    if not (options.directory / "config.json").exists():
        make(options.directory, options.layers)
    for kind in ("memory", "checkpoint"):
        command = [sys.executable, __file__, "--directory", str(options.directory), "--measure", kind]
        print(kind, subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
