"""Choice of an attention backend for `ModelConfig.attention = "auto"`: a table of candidates per platform.

The first candidate of a platform whose limits hold and that supports the request is chosen. The choice depends on the
platform, the lengths and the features of an attention only, so that a resumed run makes the same one. Backends of
plug-ins are not candidates: they are named explicitly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from t5x_like.kernels.attention import AUTO, get_backend
from t5x_like.kernels.attention_backend import AttentionRequest


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Backend that "auto" may choose, within limits of the longer one of queries and keys.

    Attributes:
      backend: Name of a registered backend.
      min_length: Smallest length for which it is chosen. Where devices split a sequence, half of the part of a device
        has to be of this length, which is a chunk under a causal mask.
      max_length: Largest length for which it is chosen; None: any.
    """

    backend: str
    min_length: int = 0
    max_length: int | None = None

    def refuses(self, request: AttentionRequest) -> str | None:
        """Return None, or why the candidate is not chosen for a request."""
        length = max(request.q_length, request.kv_length)
        min_length = self.min_length * (1 if request.split is None else 2 * request.split.devices)
        if length < min_length:
            on = "" if request.split is None else f" on {request.split.devices} devices"
            return f"chosen from a length of {min_length}{on}"
        if self.max_length is not None and length > self.max_length:
            return f"chosen up to a length of {self.max_length}"
        reason = get_backend(self.backend).supports(request)
        # Reasons end with advice for those who named the backend themselves.
        return None if reason is None else reason.partition(";")[0]


# From 1024 "blockwise" takes less CPU time and a quarter of the memory (benchmarks/attention_by_length.py). At 512 the
# two take the same time with a bias, and runs of short rows keep the numbers of the reference.
_PORTABLE = (Candidate("reference", max_length=512), Candidate("blockwise"), Candidate("reference"))
CANDIDATES: Mapping[str, tuple[Candidate, ...]] = {
    # Scores of shorter rows take little time, and runs of them keep the numbers of the reference.
    "cpu": (Candidate("rowwise", min_length=128), *_PORTABLE),
    # A row that is shorter than a tile of 128 would be padded to one.
    "tpu": (Candidate("splash", min_length=128), Candidate("flash", min_length=128), *_PORTABLE),
    # "cudnn" has to be named: JAX compiles it only where queries and keys are split over devices alike, and it needs an
    # NVIDIA GPU from Ampere on, which the name of the platform does not tell.
    "gpu": _PORTABLE,
}
"""Candidates by platform of JAX, best first. The last one supports every request."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Backend of an attention.

    Attributes:
      backend: Its name.
      passed_over: Name of each candidate before it, with the reason.
    """

    backend: str
    passed_over: tuple[tuple[str, str], ...] = ()


def choose(name: str, platform: str | None, request: AttentionRequest) -> Choice:
    """Return the backend of an attention; one that is named explicitly is returned whether it supports it or not.

    Args:
      name: `ModelConfig.attention`.
      platform: Platform of JAX that the program is for; None: any, so that the backend must be portable.
      request: Properties of the attention.

    Raises:
      ValueError: no candidate supports the request.
    """
    if name != AUTO:
        return Choice(name)
    passed_over: list[tuple[str, str]] = []
    for candidate in _PORTABLE if platform is None else CANDIDATES.get(platform, _PORTABLE):
        reason = candidate.refuses(request)
        if reason is None:
            return Choice(candidate.backend, tuple(passed_over))
        passed_over.append((candidate.backend, reason))
    raise ValueError(f"no attention backend for platform {platform!r} supports {request}")
