"""The pieces of a serialised SentencePiece model, read from its wire format.

A model is a protocol buffer `ModelProto` whose field 1 repeats `SentencePiece {piece = 1, score = 2, type = 3}`
(sentencepiece_model.proto). Reading these few bytes here spares the data room a dependency on protobuf, whose versions
often disagree with those that the sentencepiece package was generated for.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Iterator

Output = io.BytesIO

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


@dataclasses.dataclass(frozen=True)
class Piece:
    piece: str
    type: int

    @property
    def holds_text(self) -> bool:
        """False for control pieces (pad, bos, eos) and for the unknown piece."""
        return self.type not in (_CONTROL, _UNKNOWN)

    @property
    def is_byte(self) -> bool:
        """A single byte, for text that no other piece covers."""
        return self.type == _BYTE

    def bytes(self) -> bytes:
        """The UTF-8 bytes that the piece stands for; a byte piece is written `<0x0A>`."""
        if self.type == _BYTE and (match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", self.piece)):
            return bytes([int(match[1], 16)])
        return self.piece.replace("▁", " ").encode()


def pieces(model: bytes) -> list[Piece]:
    """All pieces in the order of their ids.

    Raises:
      ValueError: not a SentencePiece model.
    """
    found = [piece for piece, _ in _entries(model) if piece is not None]
    if not found:
        raise ValueError("no pieces")
    return found


def without(model: bytes, drop: Callable[[Piece], bool]) -> bytes:
    """The model without the pieces for which `drop` is true; the ids of later pieces move up."""
    return b"".join(raw for piece, raw in _entries(model) if piece is None or not drop(piece))


def _entries(model: bytes) -> Iterator[tuple[Piece | None, bytes]]:
    """(piece or None, the entry's own bytes) for each entry of the ModelProto."""
    position = 0
    while position < len(model):
        number, value, stop = _field(model, position)
        is_piece = number == 1 and isinstance(value, bytes)
        yield (_parse_piece(value) if is_piece and isinstance(value, bytes) else None), model[position:stop]
        position = stop


def _parse_piece(data: bytes) -> Piece:
    piece, kind, position = "", _NORMAL, 0
    while position < len(data):
        number, value, position = _field(data, position)
        if number == 1 and isinstance(value, bytes):
            piece = value.decode()
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(piece, kind)


def _field(data: bytes, position: int) -> tuple[int, int | bytes, int]:
    """(field number, value, position after it) of the protocol buffer field at `position`."""
    tag, position = _varint(data, position)
    number, wire_type = tag >> 3, tag & 7
    if wire_type == 0:
        value, position = _varint(data, position)
        return number, value, position
    if wire_type == 2:
        length, position = _varint(data, position)
    elif wire_type in (1, 5):
        length = 8 if wire_type == 1 else 4
    else:
        raise ValueError(f"wire type {wire_type}")
    if number == 0 or position + length > len(data):
        raise ValueError("not a protocol buffer")
    return number, data[position : position + length], position + length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("not a protocol buffer")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        shift += 7
        if not byte & 0x80:
            return value, position
