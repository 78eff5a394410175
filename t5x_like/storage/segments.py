"""Files that grow, in an object store, which has no append: the first bytes under the file's name, and segments.

    <name>                      the first bytes
    segments/<name>/<offset>    the bytes from an offset on

A reader joins the segments up to the first gap. An upload writes one object with what was added, which also takes over
the segments before it that are not longer. So a file has at most about log2(length) segments, and a byte is written
about that often, however often the file is uploaded. A file that was cut, as that of a resumed run is, loses the
segments after the cut before others are written, so that a reader never sees lines of both.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from t5x_like.faults import STORAGE_FAILED, FaultError
from t5x_like.storage import locations
from t5x_like.storage.locations import Url

FOLDER = "segments/"
"""Beginning of the keys of segments in a run directory."""
_ATTEMPTS = 3
_LOG = logging.getLogger(__name__)


class Segment(NamedTuple):
    """Bytes of a file that are one object, their CRC-32, and the object's generation; empty if it was not read."""

    start: int
    end: int
    checksum: int
    generation: bytes = b""


def grouped(keys: Iterable[str]) -> dict[str, list[int]]:
    """Return the offsets of the segments among some keys, ascending, by the name of the file."""
    found: dict[str, list[int]] = {}
    for key in keys:
        name, _, start = key.removeprefix(FOLDER).rpartition("/")
        if key.startswith(FOLDER) and name and start.isdecimal():
            found.setdefault(name, []).append(int(start))
    return {name: sorted(starts) for name, starts in found.items()}


def read(
    url: Url, name: str, starts: Sequence[int], before: bytes = b"", known: Sequence[Segment] = ()
) -> tuple[bytes | None, list[Segment], list[int]]:
    """Return the content of a file, its segments, and the offsets of objects that do not belong to it any more.

    Args:
      url: The run directory.
      name: Name of the file; the content is None if it does not exist.
      starts: Offsets of its segments in the list of keys. If the writer has taken over one of them since, they are
        listed again.
      before: Content of the file when it was read before.
      known: Its segments then. Those that have not changed are not transferred again.

    Raises:
      FaultError: the writer has replaced segments between the list and the reads, several times in a row.
    """
    by_start = {segment.start: segment for segment in known}

    def object_at(start: int) -> tuple[bytes | None, bytes]:
        segment, key = by_start.get(start), url / _key(name, start)
        if segment is None or not segment.generation:
            return locations.read_key(key)
        changed = locations.read_key_if_changed(key, segment.generation)
        return (before[segment.start : segment.end], segment.generation) if changed is None else changed

    for _ in range(_ATTEMPTS):
        content, generation = object_at(0)
        if content is None:
            return None, [], list(starts)
        data, found, stale, is_complete = bytearray(content), [_segment(content, 0, generation)], [], True
        for start in starts:
            # A segment that begins earlier was taken over by one before it, whose writer was killed then.
            part, generation = object_at(start) if start == len(data) else (None, b"")
            is_complete = is_complete and (start != len(data) or part is not None)
            if part is None:
                stale.append(start)
            else:
                data += part
                found.append(_segment(part, start, generation))
        if is_complete:
            if stale and stale[-1] > len(data):
                _LOG.warning(
                    "%s: found no segment at byte %d, expected one before byte %d; read up to there",
                    url / name,
                    len(data),
                    stale[-1],
                )
            return bytes(data), found, stale
        starts = listed(url, name)
    raise FaultError(
        f"{url / name}: found segments that were replaced while they were read, {_ATTEMPTS} times in a row; run the "
        "same command again",
        STORAGE_FAILED,
    )


def read_file(url: Url, name: str) -> bytes | None:
    """Return the content of a file in a run directory; None if it does not exist."""
    return read(url, name, listed(url, name))[0]


def listed(url: Url, name: str) -> list[int]:
    """Return the offsets of the segments of a file, ascending."""
    folder = url / FOLDER.rstrip("/") / name
    return sorted(int(key) for key in locations.keys_between(folder, "", "") if key.isdecimal())


def upload(
    url: Url, name: str, data: bytes, known: Sequence[Segment], stale: Sequence[int], *, is_whole: bool
) -> list[Segment]:
    """Make the objects of a file those of `data`, and return its segments.

    Args:
      url: The run directory.
      name: Name of the file.
      data: Its content.
      known: Segments that exist.
      stale: Offsets of other objects, which are removed.
      is_whole: Write a single object.
    """
    unchanged = _unchanged(data, known)
    changed = [segment.start for segment in known[len(unchanged) :]]
    kept = [] if is_whole else [*unchanged]
    start = kept[-1].end if kept else 0
    is_written = start < len(data) or not kept
    while is_written and kept and kept[-1].end - kept[-1].start <= len(data) - start:
        start = kept.pop().start
    for offset in sorted({*changed, *stale}, reverse=True):
        # The object under the file's own name is replaced.
        if offset > 0:
            locations.remove_key(url / _key(name, offset))
    if not is_written:
        return kept
    locations.write_bytes(url / _key(name, start), data[start:])
    for segment in reversed(unchanged):
        if segment.start > start:
            locations.remove_key(url / _key(name, segment.start))
    return [*kept, _segment(data[start:], start)]


def remove(url: Url, name: str, starts: Iterable[int]) -> None:
    """Remove a file with its segments."""
    for start in sorted({0, *starts}, reverse=True):
        locations.remove_key(url / _key(name, start))


def _unchanged(data: bytes, known: Sequence[Segment]) -> list[Segment]:
    """Return the first segments, up to one whose bytes are not those of `data`."""
    kept = []
    for segment in known:
        part = memoryview(data)[segment.start : segment.end]
        if segment.end > len(data) or zlib.crc32(part) != segment.checksum:
            break
        kept.append(segment)
    return kept


def _segment(content: bytes, start: int, generation: bytes = b"") -> Segment:
    return Segment(start, start + len(content), zlib.crc32(content), generation)


def _key(name: str, start: int) -> str:
    return f"{FOLDER}{name}/{start:015d}" if start else name
