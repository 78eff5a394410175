"""Shards of a store made by an Apache Beam pipeline, for corpora that are too large for one machine.

Local processes use the same work units and the same function for a shard, so the store has the same bytes.
Needs the extra `beam`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from t5x_like.data.sources.work_units import WorkUnit
from t5x_like.data.store import shards
from t5x_like.data.store.shards import MakeShards, ProgressCallback, ShardJob
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.errors import DataError
from t5x_like.storage import locations


def beam_shard_maker(options: Sequence[str]) -> MakeShards:
    """Return a function that `prepare` takes as `make_shards`.

    Args:
      options: Pipeline options, for example `--runner=DataflowRunner --project=...`. Without any, Beam's runner on this
        machine is used.

    Raises:
      DataError: Apache Beam is not installed.
    """
    try:
        import apache_beam  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"--beam: Apache Beam cannot be imported ({error}); install it by pip install 't5x-like[beam]'"
        ) from None
    return functools.partial(_make_shards, list(options))


def _make_shards(
    options: list[str], job: ShardJob, todo: Sequence[tuple[int, WorkUnit]], progress: ProgressCallback
) -> None:
    """Run the pipeline.

    Raises:
      DataError: a unit cannot be read (the first such unit is reported), or a shard is not visible to this process.
    """
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions

    work = functools.partial(_make_one, json.dumps(job.to_json()))
    with apache_beam.Pipeline(options=PipelineOptions(options)) as pipeline:
        items = [json.dumps([index, unit.to_json()]) for index, unit in todo]
        # Reshuffle lets the runner distribute the items: without it, they stay fused with Create in one worker.
        _ = pipeline | apache_beam.Create(items) | apache_beam.Reshuffle() | apache_beam.Map(work)
    # In the order of the corpus, so that the first error is the same as that of the local processes.
    for index, unit in todo:
        if shards.is_shard_complete(job, index, unit):
            progress(0, 0, unit.size)
            continue
        message = locations.read_bytes(_error_file(job, index))
        if message is not None:
            raise DataError(message.decode())
        raise DataError(
            f"{job.marker(index)}: found no shard after the pipeline ended, expected one; the workers and this machine "
            "must share storage: set --data.store-dir to a shared folder or an object store"
        )


@functools.lru_cache(maxsize=2)
def _tokenizer(job: ShardJob) -> Tokenizer:
    return job.load_tokenizer()


def _make_one(job_json: str, item: str) -> None:
    """Make one shard. Unusable input is recorded in a file, since Beam would retry after an exception."""
    job = ShardJob.from_json(json.loads(job_json))
    index, unit = _parse_item(item)
    # A message of an earlier attempt would be reported although this one may succeed.
    locations.remove(_error_file(job, index))
    try:
        shards.make_shard(job, index, unit, _tokenizer(job))
    except DataError as error:
        locations.write_bytes(_error_file(job, index), str(error).encode())


def _parse_item(item: str) -> tuple[int, WorkUnit]:
    index, unit = json.loads(item)
    return index, WorkUnit.from_json(unit)


def _error_file(job: ShardJob, index: int) -> Any:
    return locations.location(job.folder) / f"{index:06d}.refused"
