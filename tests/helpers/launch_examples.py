"""Examples in `launch/examples`: the rendered files of one recipe for each target.

`python tests/helpers/launch_examples.py` renders them again.
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDER = Path("launch/examples")
RECIPE = "ul2:ul2_20b"
BUCKET = ("--bucket", "gs://my-bucket/t5x-like")
IMAGE = "us-docker.pkg.dev/my-project/images/t5x-like:1"
JOB = ("--secret", "HF_TOKEN", "--env", "TF_CPP_MIN_LOG_LEVEL=1")
EXAMPLES: dict[str, tuple[str, ...]] = {
    "tpu-vm": ("tpu-vm", RECIPE, "--zone", "us-east5-a", "--spot", *BUCKET, *JOB),
    "tpu-vm-multislice": (
        "tpu-vm", RECIPE, "--zone", "us-west4-a", "--topology", "v5e:16x16", "--num-slices", "2", "--reserved",
        "--valid-until", "12h", *BUCKET,
    ),
    "gke": ("gke", RECIPE, "--image", IMAGE, *BUCKET, *JOB),
    "gke-multislice": (
        "gke", RECIPE, "--topology", "v5e:16x16", "--num-slices", "2", *BUCKET, "--unprivileged",
        "--image", IMAGE, "--service-account", "trainer",
    ),
    "gke-gpu": (
        "gke", RECIPE, "--topology", "h100:64", *BUCKET, *JOB,
        "--image", IMAGE,
    ),
    "slurm": (
        "slurm", RECIPE, "--topology", "h100:64", "--time", "1-00:00:00", "--partition", "gpu", "--cpus-per-task", "12",
        "--python", ".venv/bin/python", *JOB,
    ),
    "skypilot": ("skypilot", RECIPE, "--topology", "h100:64", "--spot", *BUCKET, *JOB),
    "skypilot-tpu": ("skypilot", RECIPE, "--infra", "gcp", *BUCKET),
}  # fmt: skip


def command(name: str) -> tuple[str, ...]:
    """Return the arguments of `t5x-like` that render an example."""
    target, recipe, *options = EXAMPLES[name]
    # The nodes of a SLURM cluster share a file system.
    train = ("--", "--data.store-dir", "/shared/stores") if name == "slurm" else ()
    return ("launch", target, recipe, *options, "--output", str(FOLDER / name), *train)


def render(name: str) -> str:
    """Render an example below the current directory and return the printed text."""
    from t5x_like.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(command(name)) == 0
    return printed.getvalue()


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    for example in EXAMPLES:
        render(example)
