"""Console view of stores, mixture and rows, printed by `inspect` and at the start of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from t5x_like.config.batch_sizes import batch_sizes
from t5x_like.config.batch_spec import rows_per_sub_batch
from t5x_like.config.run import RunConfig
from t5x_like.data.inspection.mixture_shares import mixture_shares
from t5x_like.data.store.prepare import open_stores
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.feature_converters import Features
from t5x_like.data.stream.labeled_rows import LabeledRows, label_text
from t5x_like.data.stream.packing import PackedRows
from t5x_like.data.stream.preference_rows import PackedPreferenceRows, PreferenceRows
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.stream.unpack import Kind, UnpackedExample, examples, runs
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.utils.console import Console
from t5x_like.utils.sanitize import visible

_STYLES: dict[Kind, str] = {
    "given": "default",
    "scored": "green",
    "sentinel": "bold yellow",
    "mode": "bold magenta",
    "end": "dim",
}


def inspect(run: RunConfig, rows: int, console: Console | None = None, first_row: int = 0) -> None:
    """Print the stores, the mixture and `rows` training rows of a run, beginning with `first_row`.

    Raises:
      DataError: a store is not prepared.
    """
    console = console or Console()
    stream = TrainingStream(open_stores(run.data), run.data, batch_sizes(run.training))
    console.print(*map(store_table, stream.stores), mixture_table(stream))
    for first in range(0, rows, stream.batch_size):
        panels = describe_rows(stream, first_row + first, min(rows - first, stream.batch_size))
        console.print(*panels)


def store_table(store: Store) -> Table:
    """Return a table of the sizes of a store's splits and of the documents that were left out."""
    table = Table(title=str(store.path), title_justify="left")
    for name in ("split", "documents", "tokens", "bytes of text", "bytes per token"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for name in store.splits:
        split = store.split(name)
        ratio = f"{split.num_bytes / split.num_tokens:.2f}" if split.num_tokens else "-"
        table.add_row(name, f"{split.num_documents:,}", f"{split.num_tokens:,}", f"{split.num_bytes:,}", ratio)
    for reason, count in store.info["left_out"].items():
        table.add_row(f"left out: {reason}", f"{count:,}", "", "", "")
    return table


def mixture_table(stream: TrainingStream) -> Table:
    """Return a table of the mixture by example, by raw token and by loss token."""
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
    if notes := _packing_notes(stream):
        table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def _packing_notes(stream: TrainingStream) -> list[str]:
    """Return a line for each corpus of which documents are truncated or left out."""
    notes = []
    for source in stream.sources:
        pairs = source.reader.pairs if isinstance(source.reader, PackedPreferenceRows) else source.reader
        if isinstance(pairs, PreferenceRows) and pairs.num_truncated:
            notes.append(
                f"{source.name}: {pairs.num_truncated:,} preference pairs have an answer that is longer than "
                "its row: it is truncated at its end, which is then without EOS"
            )
        if isinstance(source.reader, LabeledRows) and source.reader.num_truncated:
            count = source.reader.num_truncated
            notes.append(f"{source.name}: {count:,} examples have a text that is longer than a row: it is truncated")
        if isinstance(source.reader, PackedRows):
            totals = source.reader.totals
            if totals.truncated:
                notes.append(
                    f"{source.name}: {totals.truncated:,} pairs are longer than a row and are truncated: "
                    f"{totals.cut_inputs:,} inputs at their end, {totals.cut_targets:,} targets, which then end "
                    "without EOS"
                )
            if totals.too_short:
                notes.append(f"{source.name}: {totals.too_short:,} documents are too short and are left out")
    return notes


def describe_rows(
    stream: TrainingStream, first_row: int, rows: int, max_tokens: int | None = None
) -> list[RenderableType]:
    """Return a panel per example of the `rows` rows after the first `first_row`: its objective, inputs and targets.

    Sentinels are yellow, mode tokens magenta, and tokens with loss weight green. `max_tokens` truncates long rows. With
    several sub-batches, each shows its share of the rows.
    """
    panels: list[RenderableType] = []
    for name, count in _rows_per_sub_batch(stream, rows).items():
        first = stream.first_index(name, first_row)
        features = stream.get_rows(np.arange(first, first + count), name)
        if stream.data.labelled is not None:
            panels += [_labeled_panel(features, row, first + row, stream, max_tokens) for row in range(count)]
            continue
        where = f"{name} " if len(stream.shapes) > 1 else ""
        for row in range(count):
            features_of_row = {key: values[row] for key, values in features.items()}
            row_examples = list(examples(features_of_row, stream.data.objectives, stream.vocabulary))
            for number, example in enumerate(row_examples, start=1):
                title = f"{where}{first + row}" + (f".{number}" if len(row_examples) > 1 else "")
                objective = stream.data.objectives[example.denoiser]
                lines = _example_lines(example, stream.store.tokenizer, max_tokens)
                panels.append(Panel(Group(*lines), title=f"{title}: {objective.name}", title_align="left"))
    return panels


def _labeled_panel(
    features: Features, row: int, number: int, stream: TrainingStream, limit: int | None
) -> RenderableType:
    objective, tokenizer = stream.data.labelled, stream.store.tokenizer
    assert objective is not None
    lines = []
    for name, values in features.items():
        side = name.removesuffix("_input_tokens")
        # A row can have fewer hard negatives than others.
        if side != name and features.get(f"{side}_weights", features["label_weights"])[row].any():
            tokens = np.trim_zeros(values[row], "b")
            label = side.replace("_", " ")
            lines.append(_line(label, tokens, np.zeros(len(tokens), np.bool_), tokenizer, limit))
    if "labels" in features:
        names = stream.data.sources[0].corpus.labels
        label = label_text(features["labels"][row], features["label_weights"][row], names)
        lines.append(Text.assemble(("label: ", "bold"), (visible(label), _STYLES["scored"])))
    return Panel(Group(*lines), title=f"{number}: {objective.name}", title_align="left")


def _rows_per_sub_batch(stream: TrainingStream, rows: int) -> dict[str, int]:
    """Return the number of rows to show of each sub-batch: in proportion, at least one each, `rows` in total if
    possible."""
    sizes = rows_per_sub_batch(stream.data, stream.batch_size)
    counts, remaining, total = {}, rows, sum(sizes.values())
    for name, size in sizes.items():
        counts[name] = min(max(round(remaining * size / total), 1), remaining) if remaining else 0
        remaining, total = remaining - counts[name], total - size
    return counts


def _example_lines(example: UnpackedExample, tokenizer: Tokenizer, limit: int | None) -> Iterable[Text]:
    not_scored = np.zeros(len(example.inputs), np.bool_)
    if len(example.inputs) or not example.seen:
        label = f"inputs ({example.seen})" if example.seen else "inputs"
        scored = example.scored[: len(example.inputs)] if example.aligned else not_scored
        yield _line(label, example.inputs, scored, tokenizer, limit)
    yield _line("targets", example.targets, example.scored, tokenizer, limit)


def _line(
    label: str, tokens: npt.NDArray[Any], scored: npt.NDArray[np.bool_], tokenizer: Tokenizer, limit: int | None
) -> Text:
    text = Text.assemble((f"{label} [{len(tokens)} tokens]: ", "bold"))
    for run in runs(tokens[:limit], scored[:limit], tokenizer):
        # Control codes in a corpus must not reach the terminal.
        text.append(visible(run.text).replace("\n", "⏎\n").replace("\t", "→"), style=_STYLES[run.kind])
    if limit is not None and limit < len(tokens):
        text.append(f" ... {len(tokens) - limit} more", style=_STYLES["end"])
    return text
