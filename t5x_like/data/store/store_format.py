"""Format of a token store: its info.json and its arrays' metadata, checked because stores may come from others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from t5x_like.config.bounds import NonNegativeInt
from t5x_like.config.tokenizer import TokenizerConfig
from t5x_like.errors import DataError
from t5x_like.utils.json_reader import parse_json

FORMAT_VERSION = 4
MAX_IDS = 2**31
TOKEN_COUNTS = "token_counts"
KINDS = ("tokens", "offsets", TOKEN_COUNTS)
"""Arrays of a split."""
MAX_SHARD_TOKENS = 2**24
"""Largest number of tokens in a shard, and so in memory when one is read."""


_Id = Annotated[int, pydantic.Field(ge=0, lt=MAX_IDS)]


class _Part(pydantic.BaseModel):
    documents: int = pydantic.Field(ge=0, lt=2**48)
    tokens: int = pydantic.Field(ge=0, lt=2**48)
    bytes: NonNegativeInt


class _Array(pydantic.BaseModel, extra="forbid"):
    size: int = pydantic.Field(ge=0, lt=2**48)
    dtype: Literal["uint16", "uint32", "uint64"]
    metadata: str
    content: str


class _Vocabulary(pydantic.BaseModel, extra="forbid"):
    base_size: int = pydantic.Field(ge=1, lt=MAX_IDS)
    num_sentinels: int = pydantic.Field(ge=0, lt=MAX_IDS)
    pad_id: _Id = 0
    eos_id: _Id = 0
    unk_id: _Id | None = None
    start_id: _Id = 0
    own_mask_id: _Id | None = None
    has_modes: bool = True


class _Info(pydantic.BaseModel, strict=True):
    dtype: Literal["uint16", "uint32"]
    parts: int = pydantic.Field(ge=1)
    splits: dict[Literal["train", "validation", "test"], _Part]
    vocabulary: _Vocabulary
    content_fingerprint: str
    tokenizer_fingerprint: str
    arrays: dict[str, _Array]
    tokenizer: TokenizerConfig | None = None
    left_out: dict[str, int] = {}


def parse_info(text: bytes, source: str) -> dict[str, Any] | None:
    """Return the contents of an info.json; None if it has another format version.

    Raises:
      DataError: it does not describe a store.
    """
    expected = "the description that `t5x-like prepare` writes; delete the store and prepare it again"
    try:
        info = parse_json(text)
        if not isinstance(info, dict) or info.get("format_version") != FORMAT_VERSION:
            return None
        _Info.model_validate_json(text)
        if absent := {"train", "validation"} - info["splits"].keys():
            raise ValueError(f"no split {min(absent)}")
        if missing := {f"{split}/{kind}" for split in info["splits"] for kind in KINDS} - info["arrays"].keys():
            raise ValueError(f"no array {min(missing)}")
    except pydantic.ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise DataError(f"{source}: {where}: found {repr(detail['input'])[:80]}, expected {expected}") from None
    except ValueError as error:
        raise DataError(f"{source}: found {error}, expected {expected}") from None
    return info


def array_metadata(dtype: str, size: int, *, shard_tokens: int, chunk_tokens: int) -> dict[str, Any]:
    """Return the zarr.json of a one-dimensional array in shards, with a checksum for every chunk."""
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [chunk_tokens], "codecs": codecs, "index_codecs": codecs}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [size],
        "data_type": dtype,
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_tokens]}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def check_array(text: bytes | None, dtype: str, size: int, source: str) -> None:
    """Check the zarr.json of an array before TensorStore reads it and allocates what it describes.

    Args:
      text: Contents of the file; None if it is missing.
      dtype, size: Type and number of elements according to info.json.
      source: Name of the file for the message.

    Raises:
      DataError: the file is missing, or it does not describe the array that the store's info.json does.
    """
    try:
        found = parse_json(text or b"")
        (shard_tokens,) = found["chunk_grid"]["configuration"]["chunk_shape"]
        (chunk_tokens,) = found["codecs"][0]["configuration"]["chunk_shape"]
        # Bounded, because TensorStore allocates whole chunks: a foreign file must not describe a huge one.
        sizes_are_valid = 0 < chunk_tokens <= shard_tokens <= MAX_SHARD_TOKENS
        if sizes_are_valid and found == array_metadata(
            dtype, size, shard_tokens=shard_tokens, chunk_tokens=chunk_tokens
        ):
            return
        shown = f"the shape {found['shape']!r} of {found['data_type']!r}"[:200]
    except (ValueError, LookupError, TypeError) as error:
        shown = f"no description of an array ({type(error).__name__}: {error})"
    raise DataError(
        f"{source}: found {shown}, expected {size:,} values of {dtype} as in info.json; bring the file back, or delete "
        "the store and run `t5x-like prepare RECIPE`"
    )
