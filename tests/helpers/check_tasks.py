"""`check_tasks.py FILE...`: prints tasks as SkyPilot's own parser reads them, as JSON lines; {"refused": ...} on an
error.

Run it in the environment of `tests/launch/requirements.txt`; it uses no network.
"""

from __future__ import annotations

import json
import sys

import sky
import yaml


def parsed(path: str) -> dict[str, object]:
    with open(path, encoding="utf-8") as file:
        secrets = yaml.safe_load(file).get("secrets") or {}
    try:
        task = sky.Task.from_yaml(path)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    # As `--secret NAME` does.
    task.update_secrets([(name, "a value") for name in secrets])
    (resources,) = task.resources
    return {
        "name": task.name,
        "num_nodes": task.num_nodes,
        "accelerators": resources.accelerators,
        "use_spot": resources.use_spot,
        "job_recovery": resources.job_recovery,
        "envs": task.envs,
        "secrets": sorted(task.secrets),
        "run": task.run,
    }


for argument in sys.argv[1:]:
    print(json.dumps(parsed(argument)))
