"""The parts of a store by an Apache Beam pipeline, for corpora beyond one machine: the same units, the same function
and so the same bytes as with processes. Needs the extra `beam`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

from t5x_like.config.errors import DataError
from t5x_like.data import locations, parts
from t5x_like.data.parts import Job
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.data.units import Unit

Told = Callable[[int, int, int], None]


def make_parts_by(options: Sequence[str]) -> Callable[[Job, Sequence[tuple[int, Unit]], Told], None]:
    """What `prepare` takes as `make_parts`.

    Args:
      options: Of the pipeline, as `--runner=DataflowRunner --project=...`. None: Beam's runner on this machine.

    Raises:
      DataError: Apache Beam is not installed.
    """
    try:
        import apache_beam  # noqa: F401
    except ImportError as error:
        raise DataError(f"--beam: found no Apache Beam ({error}), expected it; pip install 't5x-like[beam]'") from None
    return functools.partial(_make_parts, list(options))


def _make_parts(options: list[str], job: Job, todo: Sequence[tuple[int, Unit]], told: Told) -> None:
    """Runs the pipeline.

    Raises:
      DataError: of the first unit that has one; or a part is not where this process can see it.
    """
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions

    work = functools.partial(_work, json.dumps(job.to_json()))
    with apache_beam.Pipeline(options=PipelineOptions(options)) as pipeline:
        items = [json.dumps([index, unit.to_json()]) for index, unit in todo]
        _ = pipeline | apache_beam.Create(items) | apache_beam.Reshuffle() | apache_beam.Map(work)
    for index, unit in todo:
        if parts.is_made(job, index, unit):
            told(0, 0, unit.size)
            continue
        why = locations.read_bytes(_refusal(job, index))
        if why is not None:
            raise DataError(why.decode())
        raise DataError(
            f"{job.marker(index)}: found no part after the pipeline, expected one; the workers and this machine must "
            "see one place: name a shared folder or an object store by --data.store"
        )


@functools.lru_cache(maxsize=2)
def _tokenizer(job: Job) -> Tokenizer:
    return job.load_tokenizer()


def _work(job_json: str, item: str) -> None:
    """Makes one part. Input that cannot be used is told by a file: by an exception, Beam would try it again."""
    job = Job.from_json(json.loads(job_json))
    index, unit = _item(item)
    locations.remove(_refusal(job, index))
    try:
        parts.make(job, index, unit, _tokenizer(job))
    except DataError as error:
        locations.write_bytes(_refusal(job, index), str(error).encode())


def _item(item: str) -> tuple[int, Unit]:
    index, unit = json.loads(item)
    return index, Unit.from_json(unit)


def _refusal(job: Job, index: int) -> Any:
    return locations.location(job.folder) / f"{index:06d}.refused"
