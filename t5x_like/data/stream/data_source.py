"""Data source of a run: prepared stores or a live seqio pipeline with one interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from t5x_like.config.batch_sizes import BatchSizes
from t5x_like.config.data import DataConfig
from t5x_like.data.store.prepare import open_stores
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.feature_converters import Features
from t5x_like.data.stream.host_shard import WHOLE, HostShard
from t5x_like.data.stream.prefetch import Prefetcher
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.errors import SafetyError
from t5x_like.utils.type_aliases import IntArray


class BatchIterator(Protocol):
    """Endless iterator over the rows of each batch that one process loads."""

    def __next__(self) -> dict[str, Features]: ...

    def last_indices(self) -> dict[str, IntArray]:
        """Return the indices, by sub-batch, of the rows of the last batch; empty if rows have no indices."""

    def state_files(self) -> dict[str, bytes]:
        """Return the files to save so that a resumed run reads the following batches; none if rows have indices."""

    def close(self) -> None: ...


class DataSource(Protocol):
    """The data of a run in one process."""

    stores: tuple[Store, ...]
    """Prepared stores; none for a live pipeline."""

    @property
    def origin(self) -> str:
        """Location of the data, for messages."""

    @property
    def fingerprint(self) -> str:
        """Digest of everything that determines the batches."""

    @property
    def vocab_size(self) -> int:
        """Number of ids that rows can contain."""

    def epochs(self, first_row: int) -> dict[str, float]:
        """Return the epochs of each corpus after the first `first_row` rows of the run; empty if they are unknown."""

    def describe(self, first_row: int, rows: int, max_tokens: int) -> list[Any]:
        """Return a description of the mixture and of its next rows, as renderables of rich."""

    def start(
        self, first_row: int, meta: Mapping[str, str] | None, files: Mapping[str, bytes], first_step: int = 0
    ) -> BatchIterator:
        """Return the batches after the first `first_row` rows of the run.

        Args:
          first_row: Number of rows that have been read.
          first_step: Step of the first batch, which decides its size.
          meta: Metadata of the data in the checkpoint; None for a new run.
          files: Result of `BatchIterator.state_files` of all processes at the checkpoint.

        Raises:
          SafetyError: the checkpoint belongs to other data.
        """


def open_data_source(data: DataConfig, batch_size: int | BatchSizes, host_shard: HostShard = WHOLE) -> DataSource:
    """Open the training data of a run, of which this process reads `host_shard`.

    `batch_size` is the number of rows of a step, or of each step; live seqio data have one size.

    Raises:
      UserError: the data is not prepared, or the seqio Task does not exist.
    """
    if data.seqio is not None:
        from t5x_like.data.seqio_.live_dataset import LiveBatches  # Imports TensorFlow.

        return LiveBatches(
            data,
            batch_size if isinstance(batch_size, int) else batch_size.final,
            host=host_shard.group,
            hosts=host_shard.groups,
            keeps_state=host_shard.keeps_state,
        )
    return PreparedSource(TrainingStream(open_stores(data), data, batch_size, "train"), host_shard)


class PreparedSource:
    """Training stream over prepared stores."""

    def __init__(self, stream: TrainingStream, host_shard: HostShard):
        self.stream = stream
        self.stores = stream.stores
        self._host_shard = host_shard

    @property
    def origin(self) -> str:
        return str(self.stores[0].path)

    @property
    def fingerprint(self) -> str:
        return self.stream.fingerprint

    @property
    def vocab_size(self) -> int:
        return self.stream.vocabulary.vocab_size

    def epochs(self, first_row: int) -> dict[str, float]:
        return self.stream.epochs(first_row)

    def describe(self, first_row: int, rows: int, max_tokens: int) -> list[Any]:
        from t5x_like.data.inspection.console_view import describe_rows, mixture_table

        which = f"rows from row {first_row} on" if first_row else "the first rows"
        note = f"{which}, each cut at {max_tokens} tokens; `t5x-like inspect` shows more"
        return [mixture_table(self.stream), note, *describe_rows(self.stream, first_row, rows, max_tokens)]

    def start(
        self, first_row: int, meta: Mapping[str, str] | None, files: Mapping[str, bytes], first_step: int = 0
    ) -> Prefetcher:
        del files
        if meta is not None and meta["fingerprint"] != self.fingerprint:
            raise SafetyError(
                f"the checkpoint was trained on data with the fingerprint {meta['fingerprint']}, the run's data has "
                f"{self.fingerprint}. The corpus, the tokenizer or the version of the data differs, or the batch size "
                "differs while data.rate_schedule or a mask_rate_schedule is set. Restore the prepared store, or start "
                "a new run in another --workdir."
            )
        return Prefetcher(self.stream, first_row, self._host_shard, first_step)
