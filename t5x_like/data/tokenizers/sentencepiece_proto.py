"""Reader of serialized SentencePiece models that parses the protocol buffers' wire format.

A model is a protocol buffer `ModelProto` whose field 1 repeats `SentencePiece {piece = 1, score = 2, type = 3}`
(sentencepiece_model.proto), beside `trainer_spec = 2` and `normalizer_spec = 3`. Parsing these fields here avoids a
dependency of the data package on protobuf, whose version often conflicts with the one that the sentencepiece package
was generated for.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Output = io.BytesIO

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SCORE = struct.Struct("<f")


class Piece(NamedTuple):
    piece: str
    type: int
    score: float = 0.0

    @property
    def is_unused(self) -> bool:
        """True if text is never encoded as the piece."""
        return self.type == _UNUSED

    @property
    def is_user_defined(self) -> bool:
        """True if the piece was given by the user; its score in the file has no meaning."""
        return self.type == _USER_DEFINED

    @property
    def holds_text(self) -> bool:
        """True if the piece stands for text; false for control pieces (pad, bos, eos) and for the unknown piece."""
        return self.type not in (_CONTROL, _UNKNOWN)

    @property
    def is_unknown(self) -> bool:
        """True for the piece of text without a piece."""
        return self.type == _UNKNOWN

    @property
    def is_byte(self) -> bool:
        """True if the piece is a single byte, for text that no other piece covers."""
        return self.type == _BYTE

    def bytes(self) -> bytes:
        """Return the UTF-8 bytes that the piece stands for; a byte piece is written `<0x0A>`."""
        if self.type == _BYTE and (match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", self.piece)):
            return bytes([int(match[1], 16)])
        return self.piece.replace("▁", " ").encode()


def pieces(model: bytes) -> list[Piece]:
    """Return all pieces in the order of their ids.

    Raises:
      ValueError: not a SentencePiece model.
    """
    found = [piece for piece, _ in _entries(model) if piece is not None]
    if not found:
        raise ValueError("no pieces")
    return found


def without(model: bytes, drop: Callable[[Piece], bool]) -> bytes:
    """Return the model without the pieces for which `drop` is true; later pieces get lower ids."""
    return b"".join(raw for piece, raw in _entries(model) if piece is None or not drop(piece))


def arranged(model: bytes) -> bytes:
    """Return the model with the ids pad 0, eos 1, unk 2, then its text pieces in order, without other control pieces.

    Raises:
      ValueError: the model has no pieces `<pad>` and `</s>`.
    """
    entries = _entries(model)
    pieces = [(piece, raw) for piece, raw in entries if piece is not None]
    special = [[raw for piece, raw in pieces if piece.piece == name] for name in ("<pad>", "</s>")]
    special.append([raw for piece, raw in pieces if piece.type == _UNKNOWN])
    if not all(special):
        raise ValueError("no <pad>, </s> and unknown piece")
    text = [raw for piece, raw in pieces if piece.holds_text]
    rest = [raw for piece, raw in entries if piece is None]
    return b"".join([*(raws[0] for raws in special), *text, *rest, _OUR_IDS])


_OUR_IDS = bytes.fromhex("1215c00202c802ffffffffffffffffff01d00201d80200")
"""Serialized trainer_spec, merged with the one before it: unk_id 2, bos_id -1, eos_id 1, pad_id 0."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a model's encoding; the defaults are the format's own.

    Attributes:
      kind: 1 unigram, 2 BPE, 3 words, 4 characters.
      byte_fallback: Text without a piece is encoded as bytes.
      whitespace_as_suffix: A space belongs to the piece before it.
      charsmap: Compiled table of a normalization; empty for none.
      dummy_prefix: A space is put in front of a text.
      one_space: Spaces at the ends are removed, and runs of spaces become one.
      escape_whitespace: Spaces are written as U+2581.
    """

    kind: int = 1
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    charsmap: bytes = b""
    dummy_prefix: bool = True
    one_space: bool = True
    escape_whitespace: bool = True


_SETTINGS = {
    (2, 3): "kind",
    (2, 24): "whitespace_as_suffix",
    (2, 35): "byte_fallback",
    (3, 2): "charsmap",
    (3, 3): "dummy_prefix",
    (3, 4): "one_space",
    (3, 5): "escape_whitespace",
}


def settings(model: bytes) -> Settings:
    """Return the settings in a model; raise ValueError if it is not a SentencePiece model."""
    found: dict[str, Any] = {}
    others = (raw for piece, raw in _entries(model) if piece is None)
    for number, value, _ in (_field(raw, 0) for raw in others):
        if number in (2, 3) and isinstance(value, bytes):
            found |= {name: x for inner, x in _fields(value) if (name := _SETTINGS.get((number, inner)))}
    for name, x in found.items():
        if isinstance(x, bytes) != (name == "charsmap"):
            raise ValueError(f"a field {name} of another type")
    flags = {field.name for field in dataclasses.fields(Settings) if isinstance(field.default, bool)}
    found |= {name: bool(value) for name, value in found.items() if name in flags}
    return Settings(**found)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(data):
        number, value, position = _field(data, position)
        yield number, value


# A command reads the model of its tokenizer several times, and a model has up to 256,000 pieces.
@functools.lru_cache(maxsize=2)
def _entries(model: bytes) -> tuple[tuple[Piece | None, bytes], ...]:
    """Return each entry of the ModelProto: its piece, or None for another field, and its bytes."""
    entries: list[tuple[Piece | None, bytes]] = []
    position = 0
    while position < len(model):
        # Nearly all entries are a piece (tag 0x0a) with text of less than 128 bytes (tag 0x0a) and a score (tag 0x15),
        # then the end or a type (tag 0x18). The code below reads them, too, but takes several times as long.
        if model[position : position + 3 : 2] == b"\n\n" and len(model) > position + 3 and model[position + 1] < 0x80:
            stop, text = position + 2 + model[position + 1], position + 4
            end = text + model[position + 3]
            if stop <= len(model) and end + 5 <= stop and model[end] == 0x15 and model[position + 3] < 0x80:
                kind = _NORMAL if end + 5 == stop else 0
                if end + 7 == stop and model[end + 5] == 0x18 and model[end + 6] < 0x80:
                    kind = model[end + 6]
                if kind:
                    piece = Piece(model[text:end].decode(), kind, *_SCORE.unpack_from(model, end + 1))
                    entries.append((piece, model[position:stop]))
                    position = stop
                    continue
        number, value, stop = _field(model, position)
        entries.append(
            (_parse_piece(value) if number == 1 and isinstance(value, bytes) else None, model[position:stop])
        )
        position = stop
    return tuple(entries)


def _parse_piece(data: bytes) -> Piece:
    piece, kind, score, position = "", _NORMAL, 0.0, 0
    while position < len(data):
        number, value, position = _field(data, position)
        if number == 1 and isinstance(value, bytes):
            piece = value.decode()
        elif number == 2 and isinstance(value, bytes):
            if len(value) != 4:
                raise ValueError(f"a score of {len(value)} bytes")
            (score,) = _SCORE.unpack(value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(piece, kind, score)


def _field(data: bytes, position: int) -> tuple[int, int | bytes, int]:
    """Return (field number, value, position after the field) of the protocol buffer field at `position`."""
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
