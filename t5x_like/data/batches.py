"""Where a run's batches come from, a prepared store or a live seqio pipeline: what a session needs to know of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from t5x_like.config.data import DataConfig
from t5x_like.config.errors import RefusedError
from t5x_like.data.features import Features
from t5x_like.data.prefetch import Prefetcher
from t5x_like.data.prepare import open_stores
from t5x_like.data.share import WHOLE, Share
from t5x_like.data.store import Store
from t5x_like.data.stream import Stream


class Batches(Protocol):
    """An endless iterator over the batches of one process, as far as they are of its share."""

    def __next__(self) -> dict[str, Features]: ...

    def state_files(self) -> dict[str, bytes]:
        """What has to be saved so that a resumed run reads the following batches; nothing where rows have numbers."""

    def close(self) -> None: ...


class Source(Protocol):
    """The data of a run in one process."""

    stores: tuple[Store, ...]
    """Prepared stores; none of a live pipeline."""

    @property
    def origin(self) -> str:
        """Where it is, for messages."""

    @property
    def fingerprint(self) -> str:
        """Of everything that decides which batch is which."""

    @property
    def vocab_size(self) -> int:
        """Ids that rows can hold."""

    def epochs(self, first_row: int) -> dict[str, float]:
        """Passes over each corpus that the first so many rows of the run make, as far as they are known."""

    def describe(self, first_row: int, rows: int, max_tokens: int) -> list[Any]:
        """The mixture and its next rows for people, to be printed by rich."""

    def start(self, first_row: int, meta: Mapping[str, str] | None, files: Mapping[str, bytes]) -> Batches:
        """The batches behind the first `first_row` rows of the run.

        Args:
          first_row: Rows that have been read.
          meta: Of the data, as the checkpoint has it; None for a new run.
          files: What `Batches.state_files` of all processes has been.

        Raises:
          RefusedError: the checkpoint belongs to other data.
        """


def open_source(data: DataConfig, batch_size: int, share: Share = WHOLE) -> Source:
    """Opens the training data of a run, of which this process reads a share.

    Raises:
      UserError: it is not prepared, or there is no such Task.
    """
    if data.seqio is not None:
        from t5x_like.data.seqio_live import LiveBatches  # TensorFlow only for those who ask for it.

        return LiveBatches(data, batch_size, host=share.group, hosts=share.groups, keeps_state=share.keeps_state)
    return Prepared(Stream(open_stores(data), data, batch_size, "train"), share)


class Prepared:
    """A stream of rows by number, out of prepared stores."""

    def __init__(self, stream: Stream, share: Share):
        self.stream = stream
        self.stores = stream.stores
        self._share = share

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
        from t5x_like.data.describe import describe_rows, mixture_table

        said = f"rows behind the first {first_row}, each cut at {max_tokens} tokens; `t5x-like inspect` shows more"
        return [mixture_table(self.stream), said, *describe_rows(self.stream, first_row, rows, max_tokens)]

    def start(self, first_row: int, meta: Mapping[str, str] | None, files: Mapping[str, bytes]) -> Prefetcher:
        del files
        if meta is not None and meta["fingerprint"] != self.fingerprint:
            raise RefusedError(
                f"the checkpoint was trained on data with the fingerprint {meta['fingerprint']}, the run's data has "
                f"{self.fingerprint}: another corpus, tokenizer or version of the data, or another batch size under a "
                "schedule of rates, whose steps are then other rows. Bring the prepared store back, "
                "or begin anew in another --workdir."
            )
        return Prefetcher(self.stream, first_row, self._share)
