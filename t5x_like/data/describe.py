"""Rows and stores in words, for people: what `inspect` prints and a run shows at its start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from t5x_like.config.batch import rows_per_sub_batch
from t5x_like.config.run import RunConfig
from t5x_like.data.features import Features
from t5x_like.data.labelled import label_text
from t5x_like.data.packing import Packed
from t5x_like.data.prepare import open_stores
from t5x_like.data.rows import Example, Kind, examples, runs
from t5x_like.data.shares import mixture_shares
from t5x_like.data.store import SPLITS, Store
from t5x_like.data.stream import Stream
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.monitoring.text import visible

_STYLES: dict[Kind, str] = {
    "given": "default",
    "scored": "green",
    "sentinel": "bold yellow",
    "mode": "bold magenta",
    "end": "dim",
}


def inspect(run: RunConfig, rows: int, console: Console | None = None, first_row: int = 0) -> None:
    """Prints the stores, the mixture and `rows` training rows of a run, from `first_row` on.

    Raises:
      DataError: a store is not prepared.
    """
    console = console or Console()
    stream = Stream(open_stores(run.data), run.data, run.training.batch_size)
    console.print(*map(store_table, stream.stores), mixture_table(stream))
    for first in range(0, rows, stream.batch_size):
        panels = describe_rows(stream, first_row + first, min(rows - first, stream.batch_size))
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
    if unlike := _not_whole(stream):
        table.caption, table.caption_justify = "\n".join(unlike), "left"
    return table


def _not_whole(stream: Stream) -> list[str]:
    """What packing has cut or left out of each corpus."""
    found = []
    for source in stream.sources:
        if isinstance(source.reader, Packed):
            if source.reader.cut:
                found.append(f"{source.name}: {source.reader.cut:,} pairs are longer than a row, and are cut to it")
            if source.reader.too_short:
                found.append(f"{source.name}: {source.reader.too_short:,} documents are too short, and are left out")
    return found


def describe_rows(stream: Stream, first_row: int, rows: int, max_tokens: int | None = None) -> list[RenderableType]:
    """A panel per example of the first `rows` rows of the batch behind `first_row`: its denoiser, inputs and targets as
    text; sentinels yellow, mode tokens magenta, what the loss is on green. `max_tokens` cuts long rows. Of several
    sub-batches, each shows its share of the rows."""
    panels: list[RenderableType] = []
    for name, count in _divided(stream, rows).items():
        first = stream.first_of(name, first_row)
        features = stream.rows(np.arange(first, first + count), name)
        if stream.data.labelled is not None:
            panels += [_labelled(features, row, first + row, stream, max_tokens) for row in range(count)]
            continue
        where = f"{name} " if len(stream.shapes) > 1 else ""
        for row in range(count):
            found = list(examples({key: values[row] for key, values in features.items()}, stream.data.objectives))
            for number, example in enumerate(found, start=1):
                title = f"{where}{first + row}" + (f".{number}" if len(found) > 1 else "")
                objective = stream.data.objectives[example.denoiser]
                parts = _parts(example, stream.store.tokenizer, max_tokens)
                panels.append(Panel(Group(*parts), title=f"{title}: {objective.name}", title_align="left"))
    return panels


def _labelled(features: Features, row: int, number: int, stream: Stream, limit: int | None) -> RenderableType:
    objective, tokenizer = stream.data.labelled, stream.store.tokenizer
    assert objective is not None
    parts = []
    for name, values in features.items():
        if name.endswith("_input_tokens"):
            tokens = np.trim_zeros(values[row], "b")
            parts.append(_line(name.split("_")[0], tokens, np.zeros(len(tokens), np.bool_), tokenizer, limit))
    if "labels" in features:
        said = label_text(features["labels"][row], features["label_weights"][row], stream.data.sources[0].corpus.labels)
        parts.append(Text.assemble(("label: ", "bold"), (visible(said), _STYLES["scored"])))
    return Panel(Group(*parts), title=f"{number}: {objective.name}", title_align="left")


def _divided(stream: Stream, rows: int) -> dict[str, int]:
    """Rows to show of each sub-batch: in proportion, none without one, `rows` in all as far as that goes."""
    sizes = rows_per_sub_batch(stream.data, stream.batch_size)
    counts, left, size = {}, rows, sum(sizes.values())
    for name, part in sizes.items():
        counts[name] = min(max(round(left * part / size), 1), left) if left else 0
        left, size = left - counts[name], size - part
    return counts


def _parts(example: Example, tokenizer: Tokenizer, limit: int | None) -> Iterable[Text]:
    none = np.zeros(len(example.inputs), np.bool_)
    if len(example.inputs) or not example.seen:
        label = f"inputs ({example.seen})" if example.seen else "inputs"
        scored = example.scored[: len(example.inputs)] if example.aligned else none
        yield _line(label, example.inputs, scored, tokenizer, limit)
    yield _line("targets", example.targets, example.scored, tokenizer, limit)


def _line(
    label: str, tokens: npt.NDArray[Any], scored: npt.NDArray[np.bool_], tokenizer: Tokenizer, limit: int | None
) -> Text:
    text = Text.assemble((f"{label} [{len(tokens)} tokens]: ", "bold"))
    for run in runs(tokens[:limit], scored[:limit], tokenizer):
        # A corpus must not be able to command the terminal.
        text.append(visible(run.text).replace("\n", "⏎\n").replace("\t", "→"), style=_STYLES[run.kind])
    if limit is not None and limit < len(tokens):
        text.append(f" ... {len(tokens) - limit} more", style=_STYLES["end"])
    return text
