"""Rows and stores in words, for people: what `inspect` prints and a run shows at its start."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from t5x_like.config.data import DataConfig
from t5x_like.config.lengths import expected_loss_tokens
from t5x_like.config.run import RunConfig
from t5x_like.data.features import Features
from t5x_like.data.prepare import open_store
from t5x_like.data.store import SPLITS, Store
from t5x_like.data.stream import Stream
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.data.vocabulary import EOS_ID, PAD_ID

_GIVEN, _SCORED, _SENTINEL, _MODE, _END = "default", "green", "bold yellow", "bold magenta", "dim"


def inspect(run: RunConfig, rows: int, console: Console | None = None) -> None:
    """Prints the store, the mixture and the first `rows` training rows of a run.

    Raises:
      DataError: the store is not prepared.
    """
    console = console or Console()
    store = open_store(run.data)
    stream = Stream(store, run.data, run.training.batch_size)
    console.print(store_table(store), mixture_table(stream))
    console.print(*describe_rows(stream.rows(np.arange(rows)), run.data, store.tokenizer))


def store_table(store: Store) -> Table:
    table = Table(title=str(store.path), title_justify="left")
    for name in ("split", "documents", "tokens", "bytes of text", "bytes per token"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for name in SPLITS:
        split = store.split(name)
        ratio = f"{split.num_bytes / split.num_tokens:.2f}" if split.num_tokens else "-"
        table.add_row(name, f"{split.num_documents:,}", f"{split.num_tokens:,}", f"{split.num_bytes:,}", ratio)
    for reason, count in store.info["left_out"].items():
        table.add_row(f"left out: {reason}", f"{count:,}", "", "", "")
    return table


def mixture_table(stream: Stream) -> Table:
    """The mixture three times: by example, by raw token and by token of the loss, which are not the same."""
    table = Table(title=f"mixture: {stream.rows_per_epoch:,} rows an epoch", title_justify="left")
    for name in ("objective", "window", "loss tokens", "by example", "by token", "by loss token"):
        table.add_column(name, justify="left" if name == "objective" else "right")
    for share in mixture_shares(stream):
        table.add_row(
            share.name,
            str(share.window),
            f"{share.loss_tokens:.1f}",
            *(f"{part:.1%}" for part in (share.by_example, share.by_token, share.by_loss_token)),
        )
    return table


@dataclasses.dataclass(frozen=True)
class Share:
    """An objective's part of the mixture. `window` and `loss_tokens` are per row; the latter is the expectation."""

    name: str
    window: int
    loss_tokens: float
    by_example: float
    by_token: float
    by_loss_token: float


def mixture_shares(stream: Stream) -> list[Share]:
    windows = np.array(stream.window_lengths)
    examples = np.array(stream.slots) / sum(stream.slots)
    pairs = zip(stream.data.mixture, stream.window_lengths, strict=True)
    loss = np.array([expected_loss_tokens(objective, length) for objective, length in pairs])
    by_token = examples * windows / (examples @ windows)
    by_loss_token = examples * loss / (examples @ loss)
    names = [objective.name for objective in stream.data.mixture]
    columns = (windows, loss, examples, by_token, by_loss_token)
    return [Share(name, *row) for name, *row in zip(names, *(column.tolist() for column in columns), strict=True)]


def describe_rows(
    features: Features, data: DataConfig, tokenizer: Tokenizer, max_tokens: int | None = None
) -> list[RenderableType]:
    """A panel per row: its denoiser, inputs and targets as text; sentinels yellow, mode tokens magenta, what the loss
    is on green. `max_tokens` cuts long rows."""
    panels: list[RenderableType] = []
    for row in range(len(features["denoiser_ids"])):
        objective = data.mixture[int(features["denoiser_ids"][row])]
        parts = _parts({name: values[row] for name, values in features.items()}, tokenizer, max_tokens)
        panels.append(Panel(Group(*parts), title=f"{row}: {objective.name}", title_align="left"))
    return panels


def _parts(row: dict[str, npt.NDArray[Any]], tokenizer: Tokenizer, limit: int | None) -> Iterable[Text]:
    if "encoder_target_tokens" in row:
        scored = row["encoder_loss_weights"] > 0
        yield _line("inputs", row["encoder_input_tokens"], scored, tokenizer, limit)
        yield _line("targets", row["encoder_target_tokens"], scored, tokenizer, limit)
        return
    targets, scored = row["decoder_target_tokens"], row["decoder_loss_weights"] > 0
    if "encoder_input_tokens" in row:
        inputs = row["encoder_input_tokens"]
        yield _line("inputs", inputs, np.zeros(len(inputs), np.bool_), tokenizer, limit)
        yield _line("targets", targets, scored, tokenizer, limit)
        return
    present = targets != PAD_ID
    given = present & (np.cumsum(scored) == 0)
    if given.any():
        seen = "bidirectional" if "decoder_causal_attention" in row else "causal"
        yield _line(f"inputs ({seen})", targets[given], scored[given], tokenizer, limit)
    yield _line("targets", targets[~given], scored[~given], tokenizer, limit)


def _line(
    label: str, tokens: npt.NDArray[Any], scored: npt.NDArray[np.bool_], tokenizer: Tokenizer, limit: int | None
) -> Text:
    present = int(np.flatnonzero(tokens)[-1]) + 1 if tokens.any() else 0
    shown = tokens[:present][:limit].tolist()
    text = Text.assemble((f"{label} [{present} tokens]: ", "bold"))

    def look(index: int) -> tuple[str, int]:
        """Style of a token, and a number that differs for tokens which are no text: each stands for itself."""
        style = _style(shown[index], bool(scored[index]), tokenizer)
        return style, -1 if style in (_SCORED, _GIVEN) else index

    for (style, _), run in itertools.groupby(range(len(shown)), look):
        text.append(_spelled([shown[index] for index in run], tokenizer), style=style)
    if len(shown) < present:
        text.append(f" ... {present - len(shown)} more", style=_END)
    return text


def _style(token: int, scored: bool, tokenizer: Tokenizer) -> str:
    vocabulary = tokenizer.vocabulary
    if token in (EOS_ID, PAD_ID):
        return _END
    if token > vocabulary.first_sentinel_id:
        return _MODE
    if token >= vocabulary.base_size:
        return _SENTINEL
    return _SCORED if scored else _GIVEN


def _spelled(tokens: list[int], tokenizer: Tokenizer) -> str:
    """A run of text, or one token that is no text, with control characters made visible: a corpus must not be able to
    command the terminal."""
    name = tokenizer.vocabulary.special_name(tokens[0])
    return name or visible(tokenizer.to_bytes(tokens).decode("utf-8", errors="replace"))


def visible(text: str) -> str:
    """Newlines as a sign before the break; other control characters as their pictures or escapes."""
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "→"
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    if 127 <= ord(character) < 160 or character in "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069":
        return f"\\u{ord(character):04x}"
    return character
