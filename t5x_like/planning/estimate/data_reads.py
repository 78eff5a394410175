"""Reads of a host: windows of text per second that a run needs, and those that its storage can deliver.

A token store in an object store has a time of answer (latency) for each window, whatever its size, so what can be read
is the number of simultaneous requests divided by the latency. What is needed is an upper bound: a step that takes the
least time that the peak of the devices allows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from t5x_like.config import RunConfig
from t5x_like.config.mixture_schedule import row_tokens
from t5x_like.data.store.token_arrays import CHUNK_TOKENS
from t5x_like.planning.estimate.tokens import denoiser_tokens
from t5x_like.utils.trusted_urls import STORE_SCHEMES, scheme_of

LATENCY_SECONDS = 0.05
"""Assumed time of an answer of an object store; `benchmarks/object_store_reads.py` injects the same."""
TOKENS_PER_CPU_SECOND = 48e6
"""Raw tokens that one thread made into rows in docs/performance.md. NumPy holds the interpreter lock, so several
threads make no more."""


@dataclasses.dataclass(frozen=True)
class DataReads:
    """Reads of one of several equal hosts.

    Attributes:
      windows_per_step: Windows of a step.
      requests_per_window: Mean number of requests that a window takes, with the indices of the files in memory.
      raw_tokens_per_step: Raw tokens of these windows.
      seconds_per_step: Least time of a step; None if the peak of the devices is unknown.
      request_concurrency: `data.store_request_concurrency`; None for stores on a local disk.
    """

    windows_per_step: float
    requests_per_window: float
    raw_tokens_per_step: float
    seconds_per_step: float | None
    request_concurrency: int | None

    @property
    def needed(self) -> float | None:
        """Windows per second that the devices can consume at most; None if that is unknown."""
        return self.windows_per_step / self.seconds_per_step if self.seconds_per_step else None

    @property
    def available(self) -> float:
        """Windows per second that can be delivered, by the requests and by the thread that makes rows."""
        raw_tokens = self.raw_tokens_per_step / self.windows_per_step
        by_thread = TOKENS_PER_CPU_SECOND / raw_tokens
        if self.request_concurrency is None:
            return by_thread
        return min(by_thread, self.request_concurrency / LATENCY_SECONDS / self.requests_per_window)

    def as_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "windows_per_second_needed": self.needed,
            "windows_per_second_available": self.available,
        }


def data_reads(run: RunConfig, hosts: int, seconds_per_step: float | None) -> DataReads | None:
    """Return the reads of one of `hosts` hosts; None if seqio reads the data.

    Documents that share a row count as one window, of which there may be several.
    """
    data = run.data
    by_name = {objective.name: objective for objective in data.objectives}
    windows = requests = raw = 0.0
    for each in denoiser_tokens(run):
        objective = by_name[each.name]
        number = each.rows * objective.windows_per_row
        length = row_tokens(objective, data) / objective.windows_per_row
        windows += number
        # A window that is in two chunks takes two requests.
        requests += number * (1 + max(length - 1, 0) / CHUNK_TOKENS)
        raw += each.raw_tokens
    if not windows or not raw:
        return None
    is_remote = scheme_of(data.store_dir) in STORE_SCHEMES
    return DataReads(
        windows_per_step=windows / hosts,
        requests_per_window=requests / windows,
        raw_tokens_per_step=raw / hosts,
        seconds_per_step=seconds_per_step,
        request_concurrency=data.store_request_concurrency if is_remote else None,
    )


def verdict(reads: DataReads) -> str:
    """Return a sentence that says whether the data path can feed the devices."""
    where = "a local store" if reads.request_concurrency is None else "the object store"
    available = f"{where} delivers about {reads.available:,.0f} per second"
    if reads.request_concurrency is not None:
        available += (
            f" ({reads.request_concurrency} requests of {1000 * LATENCY_SECONDS:g} ms, "
            f"{reads.requests_per_window:.2f} for each)"
        )
    if reads.needed is None:
        return f"reads: {_number(reads.windows_per_step)} windows per step and host; {available}"
    needed = f"reads: up to {_number(reads.needed)} windows per second and host are needed, {available}"
    if reads.available >= reads.needed:
        return f"{needed}: the data path can feed the machine"
    share = math.floor(100 * reads.available / reads.needed)
    fix = "" if reads.request_concurrency is None else "; raise data.store_request_concurrency, or copy the store"
    return f"{needed}: the data path can feed {share} % of the peak of the machine{fix}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
