"""`check_jobset.py FILE...`: validates JobSets against the schema of JobSet's API, with unknown fields forbidden.

The schema is that of Kubeflow Trainer's Python client, whose classes are generated from the API's Go sources. Run it in
the environment of `tests/launch/requirements.txt`.
"""

from __future__ import annotations

import sys
from typing import Any

import jsonschema
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet


def strict(schema: Any) -> Any:
    """Return the schema with null values and unknown fields forbidden."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items() if key != "default"}
    if "anyOf" in result:
        result["anyOf"] = [choice for choice in result["anyOf"] if choice != {"type": "null"}]
    if result.get("type") == "object" and "properties" in result:
        result["additionalProperties"] = False
    return result


def main(paths: list[str]) -> int:
    schema = strict(JobsetV1alpha2JobSet.model_json_schema(by_alias=True))
    # Wrappers of several types, which pydantic describes by their internal fields.
    for name in ("IoK8sApimachineryPkgApiResourceQuantity", "IoK8sApimachineryPkgUtilIntstrIntOrString"):
        schema["$defs"][name] = {"type": ["string", "integer", "number"]}
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    validator = jsonschema.Draft202012Validator(schema)
    problems = 0
    for path in paths:
        with open(path, encoding="utf-8") as file:
            document = yaml.safe_load(file)
        if document.get("kind") != "JobSet" or document.get("apiVersion") != "jobset.x-k8s.io/v1alpha2":
            print(f"{path}: not a JobSet")
            problems += 1
        for error in validator.iter_errors(document):
            best = jsonschema.exceptions.best_match([error])
            print(f"{path}: {best.json_path}: {best.message}")
            problems += 1
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
