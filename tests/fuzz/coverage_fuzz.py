"""Fuzzing that is guided by the code which each input reaches, by atheris: `make fuzz-coverage FUZZ_SECONDS=60`.

An input is a file of one kind of `helpers.foreign_files`, and is changed as in `fuzz.py`. Inputs that reach further
code of the package are kept and changed again, so that files which differ from the valid ones in several places are
read as well. Each kind has a process of its own. An exception other than `UserError`, more than 10 seconds for one
input, and 2 GiB of memory more than for the valid files end it: the input is kept in `build/fuzz-coverage`, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import atheris  # noqa: E402

with atheris.instrument_imports(include=["t5x_like"], enable_loader_override=False):
    from helpers.foreign_files import KINDS
    from helpers.mutations import edited, files_of, read

HANG_SECONDS = 10
MAX_GROWTH = 2048
"""MiB of resident memory above that after the valid files were read."""


def fuzz_kind(name: str, found: Path, seconds: int) -> None:
    """Read inputs of a kind for some seconds. This does not return: libFuzzer ends the process."""
    kind, folder = KINDS[name], Path(tempfile.mkdtemp())
    # Modules that are imported on use are instrumented, too.
    with atheris.instrument_imports(include=["t5x_like"], enable_loader_override=False):
        kind.make(folder)
        kind.read(folder)
    files = files_of(folder)
    found.mkdir(parents=True, exist_ok=True)
    inputs = found / "inputs"
    inputs.mkdir(exist_ok=True)
    for file, data in files.items():
        (inputs / file.replace("/", "__")).write_bytes(file.encode() + b"\0" + data)

    def read_input(data: bytes) -> None:
        file, _, content = data.partition(b"\0")
        path = file.decode(errors="replace")
        if path in files:
            (folder / path).write_bytes(content)
            try:
                read(kind, folder)
            finally:
                (folder / path).write_bytes(files[path])

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        file, _, content = data.partition(b"\0")
        return (file + b"\0" + edited(content, Random(seed)))[:max_size]

    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    limits = (f"-max_total_time={seconds}", f"-timeout={HANG_SECONDS}", f"-rss_limit_mb={resident + MAX_GROWTH}")
    options = [*limits, f"-artifact_prefix={found}/", "-max_len=1000000", "-len_control=0", str(inputs)]
    atheris.Setup([sys.argv[0], *options], read_input, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="time for each kind")
    parser.add_argument("--found", type=Path, default=Path("build/fuzz-coverage"), help="folder for what is found")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--in-this-process", action="store_true", help="read the only kind in this process")
    options = parser.parse_args()
    if options.in_this_process:
        (name,) = options.kinds
        fuzz_kind(name, options.found / name.replace("/", " "), options.seconds)
    failed = []
    for name in options.kinds:
        command = [sys.executable, __file__, "--in-this-process", "--seconds", str(options.seconds)]
        done = subprocess.run(
            [*command, "--found", options.found, "--kinds", name], capture_output=True, text=True, errors="replace"
        )
        lines = [line for line in done.stderr.splitlines() if line.startswith(("#", "Done", "SUMMARY", "==", " === "))]
        print(f"{name}: {lines[-1] if lines else done.stderr[-300:]}", flush=True)
        if done.returncode:
            failed.append(name)
    print(f"{len(options.kinds)} kinds, findings in {len(failed)}: {', '.join(failed) or 'no kind'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
