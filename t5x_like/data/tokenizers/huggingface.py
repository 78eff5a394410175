"""Tokenizers of tokenizer.json: published ones, and those that `train_vocabulary` trains (BPE, WordPiece, Unigram)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers as library

from t5x_like.config.objectives import MODES
from t5x_like.data.tokenizers.tokenizer import Ids, Tokenizer
from t5x_like.data.tokenizers.vocabulary import Vocabulary, require_id
from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.utils.json_reader import parse_json

ROLES: dict[str, tuple[str, ...]] = {
    "pad": ("pad_token",),
    "eos": ("eos_token", "sep_token"),
    "start": ("bos_token", "cls_token"),
    "unk": ("unk_token",),
    "mask": ("mask_token",),
}
"""Fields of tokenizer_config.json that give the token of a role; the first one that is set applies."""
_USUAL_TOKENS: dict[str, dict[str, str]] = {
    "pad": {"<pad>": "pad_token", "[PAD]": "pad_token", "<|padding|>": "pad_token"},
    "eos": {
        "</s>": "eos_token",
        "<eos>": "eos_token",
        "[SEP]": "sep_token",
        "<|endoftext|>": "eos_token",
        "<|end_of_text|>": "eos_token",
    },
    "start": {"<s>": "bos_token", "<bos>": "bos_token", "[CLS]": "cls_token", "<|begin_of_text|>": "bos_token"},
    "unk": {"<unk>": "unk_token", "[UNK]": "unk_token"},
    "mask": {"[MASK]": "mask_token", "<mask>": "mask_token"},
}
"""Role -> usual names of its token, and the field of each. The first name that is a token applies. Runs and stores keep
tokenizers without tokenizer_config.json: another order would give them other ids."""


class HuggingFaceTokenizer(Tokenizer):
    """Tokenizer of a tokenizer.json, with the ids that transformers gives.

    Text that spells a special token becomes that token, as in transformers. Tokens `<extra_id_N>` of the file are
    sentinels if their ids count down from that of `<extra_id_0>`, as in T5; otherwise sentinels and mode tokens follow
    the ids of the file.

    Attributes:
      model: JSON with the file ("tokenizer"), tokenizer_config.json ("config") and other files to export ("files" and,
        in base64, "binary_files").
      config: tokenizer_config.json with the special tokens that it implies.
      ends_in_eos: The tokenizer puts EOS at the end of a text by itself.
    """

    def __init__(self, model: bytes, num_sentinels: int, source: str):
        """Load a tokenizer.

        Args:
          model: See `HuggingFaceTokenizer.model`.
          num_sentinels: Number of sentinels of a tokenizer that has none.
          source: Name of the file in error messages.

        Raises:
          ValueError: the file is not a tokenizer.json, or has no EOS.
          ConfigError: the file has fewer sentinels.
        """
        document = parse_json(model)
        self.model = model
        self.contents: dict[str, Any] = document["tokenizer"]
        self.files: dict[str, str] = document.get("files", {})
        self._source = source
        with library_errors_as(lambda reason: ValueError(reason)):
            self._tokenizer: Any = library.Tokenizer.from_str(json.dumps(self.contents))
        self.config = with_usual_tokens(document.get("config", {}), self._is_token)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._vocabulary(num_sentinels, source)
        decoder = self.contents.get("decoder")
        self._byte_level = _byte_level_table() if "ByteLevel" in json.dumps(decoder) else None
        if self.contents["model"].get("byte_fallback"):
            named = (self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
            found = [token for token in named if token is not None]
            self.byte_ids = np.array(found, np.int32) if found else None
        kind = self.contents["model"].get("type")
        is_wordpiece = kind == "WordPiece" or (kind is None and "continuing_subword_prefix" in self.contents["model"])
        self._prefix = self.contents["model"].get("continuing_subword_prefix") if is_wordpiece else None
        self._special = {entry["id"] for entry in self.contents.get("added_tokens", []) if entry.get("special")}
        super().__init__(
            [self._bytes(token) for token in range(vocabulary.base_size)],
            vocabulary.num_sentinels,
            "published",
            vocabulary=vocabulary,
            strip_first_space=is_wordpiece,
        )
        # Texts are split by rules that the pieces do not show.
        rules = {name: part for name, part in self.contents.items() if name not in ("padding", "truncation")}
        identity = [self.fingerprint, json.dumps(rules, sort_keys=True)]
        self.fingerprint = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:32]
        with library_errors_as(lambda reason: ValueError(reason)):
            whole = self._tokenizer.encode("a").ids
        self.ends_in_eos = bool(whole) and whole[-1] == vocabulary.eos_id

    def _unusable(self, reason: str) -> DataError:
        return DataError(f"{self._source}: the tokenizers library failed ({reason}), expected a tokenizer that works")

    def _vocabulary(self, num_sentinels: int, source: str) -> Vocabulary:
        size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        require_id(size - 1)
        pad, eos, start, unk, mask = (self._token_of(role) for role in ("pad", "eos", "start", "unk", "mask"))
        if eos is None:
            raise ValueError("no end-of-sequence token: eos_token or sep_token of tokenizer_config.json")
        first, count = self._sentinels(size)
        if first is not None and count == 0 < num_sentinels:
            expected = f"0, since the <extra_id_*> tokens of {source} do not end its ids, counting down"
            fix = "set it to 0, with an objective that needs none, such as PrefixLM"
            raise ConfigError([ConfigProblem("data.tokenizer.num_sentinels", str(num_sentinels), expected, fix)])
        if 0 < count < num_sentinels:
            expected = f"at most the {count} <extra_id_*> tokens of {source}"
            raise ConfigError([ConfigProblem("data.tokenizer.num_sentinels", str(num_sentinels), expected)])
        pad = eos if pad is None else pad
        return Vocabulary(
            base_size=size if first is None or count == 0 else first - count + 1,
            num_sentinels=count or num_sentinels,
            pad_id=pad,
            eos_id=eos,
            unk_id=unk,
            start_id=pad if start is None else start,
            own_mask_id=mask,
            has_modes=(count or num_sentinels) > 0,
        )

    def _sentinels(self, size: int) -> tuple[int | None, int]:
        """Return the id of `<extra_id_0>` and the number of sentinels, whose ids count down from it.

        The number is 0 if they do not, or if other tokens than those of modes follow. The id is None without one.
        """
        named = self._tokenizer.token_to_id
        # mT5's pieces begin with a space.
        forms = [form for form in ("<extra_id_%d>", "▁<extra_id_%d>") if named(form % 0) is not None]
        if not forms:
            return None, 0
        first, count = named(forms[0] % 0), 1
        while named(forms[0] % count) == first - count:
            count += 1
        following = [self._tokenizer.id_to_token(token) for token in range(first + 1, min(size, first + 5))]
        is_last = following in ([], [f"[{mode}]" for mode in MODES]) and named(forms[0] % count) is None
        return first, count if is_last else 0

    def _is_token(self, name: str) -> bool:
        return self._tokenizer.token_to_id(name) is not None

    def _token_of(self, role: str) -> int | None:
        """Return the id of the token with a role, or None."""
        stated = [self.config[field] for field in ROLES[role] if self.config.get(field) is not None]
        names = [value["content"] if isinstance(value, dict) else value for value in stated[:1]]
        found = (self._tokenizer.token_to_id(name) for name in names)
        return next((token for token in found if token is not None), None)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[Ids]:
        del num_threads  # The package has threads of its own: RAYON_NUM_THREADS, TOKENIZERS_PARALLELISM.
        with library_errors_as(self._unusable):
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_with_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Return the ids of a text without further special tokens, and 1 for each id of the spans in characters, by the
        rule of transformers' `return_assistant_tokens_mask`."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        mask = [0] * len(ids)
        for start, stop in spans:
            first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
            if first is None:
                break  # The text was cut before the span.
            end = len(ids) if last is None else last + 1
            mask[first:end] = [1] * (end - first)
        return ids, mask

    def word_starts(self, text: str) -> list[int]:
        """Return the index in `encode(text)` of the first token of each word, by the library's offsets: pieces do not
        show it where words are split at punctuation or normalized."""
        with library_errors_as(self._unusable):
            offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        words = [match.start() for match in re.finditer(r"\S+", text)]
        starts = [
            next((index for index, (_, end) in enumerate(offsets) if end > start), len(offsets)) for start in words
        ]
        return [start for start in starts if start < len(offsets)]

    def encode_with_special_tokens(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Return the ids of each text with the tokenizer's own special tokens, such as [CLS] and [SEP], truncated to
        `max_length` tokens with them."""
        with library_errors_as(self._unusable):
            encodings = self._truncating(max_length).encode_batch(list(texts))
        return [encoding.ids[:max_length] for encoding in encodings]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - tokenizers live as long as their model
    def _truncating(self, max_length: int) -> Any:
        """Return a copy that truncates: the number of tokens is a state of the library's object."""
        tokenizer = type(self._tokenizer).from_str(self._tokenizer.to_str())
        tokenizer.enable_truncation(max_length)
        return tokenizer

    def decode(self, ids: Iterable[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        for token in [*ids, None]:
            if token is None or token >= self.vocabulary.base_size:
                with library_errors_as(self._unusable):
                    parts.append(str(self._tokenizer.decode(run, skip_special_tokens=True)))
                run = []
                if token is not None:
                    parts.append(self.vocabulary.special_name(token) or "")
            else:
                run.append(token)
        return "".join(parts)

    def _bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to decoded text."""
        name = self._tokenizer.id_to_token(token)
        if name is None or token in self._special:
            return b""
        if self._byte_level is not None:
            return bytes(self._byte_level[character] for character in name if character in self._byte_level)
        if self._prefix is not None:
            return name.removeprefix(self._prefix).encode() if name.startswith(self._prefix) else f" {name}".encode()
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return str(name).replace("▁", " ").encode()


def with_usual_tokens(config: dict[str, Any], is_token: Callable[[str], bool]) -> dict[str, Any]:
    """Return tokenizer_config.json with the usual special tokens of the tokenizer, if it names none, as in the
    directories that GPT-2 was published with."""
    if any(config.get(field) for fields in ROLES.values() for field in fields):
        return config
    found: dict[str, Any] = {}
    for usual in _USUAL_TOKENS.values():
        found |= next(({field: name} for name, field in usual.items() if is_token(name)), {})
    return {**config, **found}


@contextlib.contextmanager
def library_errors_as(error_of: Callable[[str], Exception]) -> Iterator[None]:
    """Replace what the library `tokenizers` raises, for which it has no narrower type than Exception. A panic of its
    code, to which contradictions in a file can lead, is not even one."""
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not (is_panic or isinstance(error, Exception)):
            raise
        raise error_of(f"it panicked: {error}" if is_panic else str(error)) from None


def _byte_level_table() -> dict[str, int]:
    """Return the byte of each character of GPT-2's byte-level alphabet: printable bytes stand for themselves, the
    others are the characters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}
