"""Rows and stores in words, for people: what `inspect` prints and a run shows at its start."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from t5x_like.config.batch import rows_per_sub_batch
from t5x_like.config.rates import row_loss_tokens, row_tokens
from t5x_like.config.run import RunConfig
from t5x_like.data.packing import Packed
from t5x_like.data.prepare import open_stores
from t5x_like.data.store import SPLITS, Store
from t5x_like.data.stream import Stream
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.data.vocabulary import EOS_ID, PAD_ID

_GIVEN, _SCORED, _SENTINEL, _MODE, _END = "default", "green", "bold yellow", "bold magenta", "dim"


def inspect(run: RunConfig, rows: int, console: Console | None = None) -> None:
    """Prints the stores, the mixture and the first `rows` training rows of a run.

    Raises:
      DataError: a store is not prepared.
    """
    console = console or Console()
    stream = Stream(open_stores(run.data), run.data, run.training.batch_size)
    console.print(*map(store_table, stream.stores), mixture_table(stream))
    for first in range(0, rows, stream.batch_size):
        panels = describe_rows(stream, first, min(rows - first, stream.batch_size))
        console.print(*panels)


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
    several = len(stream.sources) > 1
    rows = ", ".join(f"{count:,} rows of {name}" for name, count in stream.rows_per_epoch.items())
    table = Table(title=f"mixture: an epoch is {rows}", title_justify="left")
    names = ("corpus", "objective", "row", "loss tokens", "by example", "by token", "by loss token", "sub-batch")
    shown = slice(0 if several else 1, None if len(stream.shapes) > 1 else -1)
    for name in names[shown]:
        table.add_column(name, justify="left" if name in ("corpus", "objective", "sub-batch") else "right")
    for share in mixture_shares(stream):
        numbers = [f"{part:.1%}" for part in (share.by_example, share.by_token, share.by_loss_token)]
        row = [share.corpus, share.name, f"{share.tokens:.0f}", f"{share.loss_tokens:.1f}", *numbers, share.sub_batch]
        table.add_row(*row[shown])
    return table


@dataclasses.dataclass(frozen=True)
class Share:
    """A corpus's and objective's part of the mixture. `tokens` (raw) and `loss_tokens` are per row: means."""

    corpus: str
    name: str
    sub_batch: str
    tokens: float
    loss_tokens: float
    by_example: float
    by_token: float
    by_loss_token: float


def mixture_shares(stream: Stream) -> list[Share]:
    """The mixture of the first phase. Of packed rows, whose lengths are those of the documents, a sample is counted."""
    shares = stream.shares()
    data = stream.data
    sizes = []
    for corpus, objective, _ in shares:
        source = next(source for source in stream.sources if source.name == corpus)
        if isinstance(source.reader, Packed):
            sizes.append(source.reader.row_means(objective))
        else:
            sizes.append((row_tokens(objective, data), row_loss_tokens(objective, data)))
    tokens, loss = np.array(sizes, np.float64).reshape(-1, 2).T
    examples = np.array([share for *_, share in shares])
    by_token = examples * tokens / (examples @ tokens)
    by_loss_token = examples * loss / (examples @ loss)
    columns = zip(
        tokens.tolist(), loss.tolist(), examples.tolist(), by_token.tolist(), by_loss_token.tolist(), strict=True
    )
    return [
        Share(corpus, objective.name, stream.sub_batch_of(corpus, objective), *numbers)
        for (corpus, objective, _), numbers in zip(shares, columns, strict=True)
    ]


def describe_rows(stream: Stream, first_row: int, rows: int, max_tokens: int | None = None) -> list[RenderableType]:
    """A panel per example of the first `rows` rows of the batch behind `first_row`: its denoiser, inputs and targets as
    text; sentinels yellow, mode tokens magenta, what the loss is on green. `max_tokens` cuts long rows. Of several
    sub-batches, each shows its share of the rows."""
    panels: list[RenderableType] = []
    for name, count in _divided(stream, rows).items():
        first = stream.first_of(name, first_row)
        features = stream.rows(np.arange(first, first + count), name)
        where = f"{name} " if len(stream.shapes) > 1 else ""
        for row in range(count):
            examples = list(segments({key: values[row] for key, values in features.items()}))
            for number, example in enumerate(examples, start=1):
                title = f"{where}{first + row}" + (f".{number}" if len(examples) > 1 else "")
                objective = stream.data.objectives[int(example["denoiser_ids"].max())]
                parts = _parts(example, stream.store.tokenizer, max_tokens)
                panels.append(Panel(Group(*parts), title=f"{title}: {objective.name}", title_align="left"))
    return panels


def _divided(stream: Stream, rows: int) -> dict[str, int]:
    """Rows to show of each sub-batch: in proportion, none without one, `rows` in all as far as that goes."""
    sizes = rows_per_sub_batch(stream.data, stream.batch_size)
    counts, left, size = {}, rows, sum(sizes.values())
    for name, part in sizes.items():
        counts[name] = min(max(round(left * part / size), 1), left) if left else 0
        left, size = left - counts[name], size - part
    return counts


def segments(row: dict[str, npt.NDArray[Any]]) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The examples of a row: it itself, or what its segments hold."""
    stacks = [stack for stack in ("encoder", "decoder") if f"{stack}_segment_ids" in row]
    if not stacks:
        yield row
        return
    segments = {stack: row[f"{stack}_segment_ids"] for stack in stacks}
    for number in range(1, max(int(ids.max()) for ids in segments.values()) + 1):
        example = {
            name: values[segments[stack] == number]
            for stack in stacks
            for name, values in row.items()
            if name.startswith(stack)
        }
        example["denoiser_ids"] = row["denoiser_ids"][segments[stacks[-1]] == number]
        yield example


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
    given, seen = present & (np.cumsum(scored) == 0), "causal"
    if "decoder_causal_attention" in row:
        both_ways = row["decoder_causal_attention"] > 0
        if both_ways[present].all():  # Masked LM; of all other examples, the last cells see only what is before them.
            read = row["decoder_input_tokens"][present][1:]
            yield _line("inputs (one place later)", read, scored[present][:-1], tokenizer, limit)
            yield _line("targets", targets[present], scored[present], tokenizer, limit)
            return
        given, seen = np.arange(len(targets)) < both_ways.sum() - 1, "bidirectional"
    if given.any():
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
