"""The statistics of a recipe's data as one HTML page: stores, rows and their laws, samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rich.console
import rich.progress
from markupsafe import Markup

from t5x_like.config.errors import DataError
from t5x_like.config.objectives import MODES, Objective
from t5x_like.config.run import RunConfig
from t5x_like.data.chi_square import Fit, combined
from t5x_like.data.prepare import open_stores
from t5x_like.data.rows import Example, Run, runs
from t5x_like.data.statistics import ObjectiveStatistics, Part, Statistics, statistics
from t5x_like.data.store import SPLITS, Store
from t5x_like.data.store_statistics import (
    QUANTILES,
    Lengths,
    Repeats,
    TokenUse,
    document_lengths,
    lengths,
    repeated_documents,
    token_use,
)
from t5x_like.data.stream import Stream
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.inspection.figures import MISFIT, Figure, histogram, is_misfit, outcomes, p_value, quantile_row
from t5x_like.monitoring import formats
from t5x_like.monitoring.pages import content_hash, environment, resource, write_page
from t5x_like.monitoring.report import describe_objective
from t5x_like.monitoring.text import visible

_TEMPLATES = Path(__file__).parent / "page_template"
_COLUMNS = ("example", "raw token", "loss token")
_OTHER = "other"


def write_statistics(run: RunConfig, output: Path, rows: int, first_row: int = 0) -> Path:
    """Reads a sample of the training rows and writes the page.

    Args:
      run: Its stores are prepared.
      output: The HTML file.
      rows: To read at least; whole batches are.
      first_row: Rows of the run before the sample.

    Raises:
      DataError: a store is not prepared, or the page cannot be written.
    """
    if run.data.labelled is not None:
        raise DataError("found labelled examples, expected text: the page is about windows, noise and their laws")
    stream = Stream(open_stores(run.data), run.data, run.training.batch_size)
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("stores", total=rows)
        texts = [StoreView.of(source.name, store) for source, store in zip(stream.sources, stream.stores, strict=True)]
        progress.update(task, description="rows")
        found = statistics(stream, rows, first_row, lambda done: progress.update(task, completed=done))
    page = render(run, stream, texts, found)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return write_page(output, page)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror or error})") from None


@dataclasses.dataclass(frozen=True)
class StoreView:
    """A store in numbers and figures. `use` is None where its training split is empty."""

    name: str
    path: str
    splits: tuple[tuple[str, ...], ...]
    left_out: tuple[tuple[str, int], ...]
    quantiles: tuple[tuple[str, list[str]], ...]
    figures: tuple[Figure, ...]
    repeats: Repeats
    documents: int
    unit: str
    use: TokenUse | None

    @staticmethod
    def of(name: str, store: Store) -> StoreView:
        train = store.split("train")
        found: dict[str, Lengths] = {}
        values: dict[str, npt.NDArray[np.int64]] = {}
        if train.num_documents:
            values = document_lengths(train, store.parts)
            found = {what: lengths(values[what], log=_spreads(values[what])) for what in values}
        return StoreView(
            name=visible(name),
            path=visible(str(store.path)),
            splits=tuple(_split_row(store, split) for split in SPLITS),
            left_out=tuple((visible(reason), count) for reason, count in store.info.get("left_out", {}).items()),
            quantiles=tuple((what, quantile_row(one)) for what, one in found.items()),
            figures=tuple(
                histogram(f"Tokens of {what}", one, css="mode-none", log=_spreads(values[what]))
                for what, one in found.items()
            ),
            repeats=repeated_documents(train, store.parts) if train.num_documents else Repeats(0, 0, 0),
            documents=train.num_documents,
            unit="pairs" if store.parts == 2 else "documents",
            use=token_use(store, "train") if train.num_tokens else None,
        )


def _spreads(lengths_D: npt.NDArray[np.int64]) -> bool:
    """Whether lengths differ by orders of magnitude."""
    return int(lengths_D.max()) > 50 * max(int(lengths_D.min()), 1)


def _split_row(store: Store, name: str) -> tuple[str, ...]:
    split = store.split(name)
    ratio = f"{split.num_bytes / split.num_tokens:.2f}" if split.num_tokens else "–"
    return name, f"{split.num_documents:,}", f"{split.num_tokens:,}", f"{split.num_bytes:,}", ratio


def render(run: RunConfig, stream: Stream, texts: Sequence[StoreView], found: Statistics) -> str:
    """The page as text."""
    style = resource("report.css") + resource("statistics.css", _TEMPLATES)
    return (
        environment(_TEMPLATES)
        .get_template("statistics.html")
        .render(
            run=run,
            style=Markup(style),
            style_hash=content_hash(style),
            subtitle=_subtitle(stream),
            notes=_notes(stream, found),
            figures=_figures(stream, texts, found),
            texts=texts,
            found=found,
            quantiles=["shortest", *(f"{100 * q:g} %" for q in QUANTILES[1:-1]), "longest", "mean"],
            fill=_fill(found),
            modes=list(_mode_bars(found)),
            parts=list(_part_rows(found)),
            objectives=[_objective_view(one) for one in found.objectives if one.examples],
            laws=[law for one in found.objectives for law in _law_rows(one)],
            misfit=f"{MISFIT:g}",
            combined=p_value(combined(_p_values(found))),
            exposure=list(_exposure(found)),
            passes=list(_passes(run, stream, found)),
            samples=list(_samples(found, stream.store.tokenizer)),
            formats=formats,
            several=len(stream.sources) > 1,
        )
    )


def _subtitle(stream: Stream) -> str:
    data = stream.data
    lengths = "/".join(str(length) for length in (data.inputs_length, data.targets_length) if length)
    words = [
        data.layout.replace("_", "-"),
        f"rows of {lengths}",
        *(f"and {data.inputs_length}/{length}" for length in data.short_targets_lengths),
        f"batch {stream.batch_size:,}",
        f"{data.tokenizer.kind} vocabulary of {stream.vocabulary.vocab_size:,}",
        ("corpora " if len(stream.sources) > 1 else "corpus ") + ", ".join(source.name for source in stream.sources),
    ]
    return visible(", ".join(words).replace(", and ", " and "))


def _notes(stream: Stream, found: Statistics) -> Iterator[str]:
    changes = [phase.start_step for phase in stream.data.schedule]
    behind = [step for step in changes if step * stream.batch_size < found.first_row + found.rows]
    if behind:
        yield (
            f"The rates change at step {behind[0]:,}, within or before this sample: what is expected is the mixture "
            "before any change."
        )
    broken = sum(one.broken for one in found.objectives)
    if broken:
        yield f"{broken:,} examples cannot be restored to their raw text: inputs and targets do not belong together."
    for one in found.objectives:
        for fit in one.fits:
            if is_misfit(fit):
                yield f"{one.objective.name}: {fit.subject} not by their law ({p_value(fit.p_value)})."


def _fits(found: Statistics) -> list[Fit]:
    return [fit for one in found.objectives for fit in one.fits]


def _p_values(found: Statistics) -> list[float]:
    return [fit.p_value for fit in _fits(found) if fit.p_value is not None and fit.has_choice]


def _figures(stream: Stream, texts: Sequence[StoreView], found: Statistics) -> list[tuple[str, str, str]]:
    """(label, value, detail) of what a reader wants to know first."""
    tokens = sum(store.split("train").num_tokens for store in stream.stores)
    documents = sum(text.documents for text in texts)
    units = " and ".join(dict.fromkeys(text.unit for text in texts))
    repeated = found.repeated_ngrams
    scored = sum(part.scored * part.measured[1] for part in found.parts)
    figures = [
        ("Training text", formats.count(tokens), f"tokens in {documents:,} {units}"),
        ("Fill", formats.percent(found.fill_share), "of all cells are not padding"),
        ("Scored text", formats.percent(scored), "of the raw tokens in rows"),
        ("Repeated text", formats.percent(float(np.mean(repeated))), "8-grams in another row of the batch"),
    ]
    p_values = _p_values(found)
    if p_values:
        wrong = sum(map(is_misfit, _fits(found)))
        many = f"all {len(p_values)} laws, taken together" if len(p_values) > 1 else "one law"
        detail = f"{wrong} of {len(p_values)} do not fit" if wrong else many
        figures.append(("Laws", p_value(combined(p_values)), detail))
    return figures


def _fill(found: Statistics) -> list[tuple[str, str, float, str]]:
    """(what, share, percent, how many examples a row has)."""
    several = len({fill.sub_batch for fill in found.fill}) > 1
    rows = []
    for fill in found.fill:
        name = f"{fill.sub_batch}, {fill.stack}" if several else fill.stack
        per_row = fill.examples / fill.rows if fill.rows else 0.0
        detail = f"{fill.rows:,} rows of {fill.cells // max(fill.rows, 1):,}"
        if abs(per_row - 1) > 1e-9:
            detail += f", {per_row:.3g} examples each"
        rows.append((name, formats.percent(fill.share), 100 * fill.share, detail))
    if len(rows) > 1:
        rows.append(("all", formats.percent(found.fill_share), 100 * found.fill_share, ""))
    return rows


def _mode_of(objective: Objective) -> str:
    return objective.mode or _OTHER


def _css(objective: Objective) -> str:
    return f"mode-{objective.mode}" if objective.mode else "mode-none"


def _mode_bars(found: Statistics) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """By example, raw token and loss token: shares of the modes and the rest; none where there is one kind only."""
    names = [mode for mode in (*MODES, _OTHER) if any(_mode_of(part.objective) == mode for part in found.parts)]
    if len(names) < 2:
        return
    for column, title in enumerate(_COLUMNS):
        segments, start = [], 0.0
        for name in names:
            mine = [part for part in found.parts if _mode_of(part.objective) == name]
            measured = sum(part.measured[column] for part in mine)
            expected = sum(part.expected[column] for part in mine)
            segments.append(
                {
                    "name": name,
                    "css": "mode-none" if name == _OTHER else f"mode-{name}",
                    "start": 100 * start,
                    "percent": 100 * measured,
                    "measured": formats.percent(measured),
                    "expected": formats.percent(expected),
                }
            )
            start += measured
        yield title, segments


def _part_rows(found: Statistics) -> Iterator[dict[str, Any]]:
    """A row per objective; of several corpora, under the sums of each."""
    corpora = list(dict.fromkeys(part.corpus for part in found.parts))
    for corpus in corpora:
        mine = [part for part in found.parts if part.corpus == corpus]
        if len(corpora) > 1:
            yield _part_row(corpus, "sum", mine)
        for part in mine:
            yield _part_row(part.objective.name, _css(part.objective), [part])


def _part_row(name: str, css: str, parts: Sequence[Part]) -> dict[str, Any]:
    return {
        "name": visible(name),
        "css": css,
        "examples": f"{sum(part.examples for part in parts):,}",
        "shares": [
            (
                formats.percent(sum(part.measured[column] for part in parts)),
                formats.percent(sum(part.expected[column] for part in parts)),
            )
            for column in range(len(_COLUMNS))
        ],
    }


def _objective_view(one: ObjectiveStatistics) -> dict[str, Any]:
    css = _css(one.objective)
    figures = [histogram("targets", one.targets, css=css)]
    if one.inputs.quantiles[-1] > 0:
        figures.insert(0, histogram("inputs", one.inputs, css=css))
    lengths = [fit for fit in one.fits if fit.subject in ("span lengths", "target fraction", "spans per window")]
    drawn = [outcomes(fit.subject, fit, css=css) for fit in lengths if len(fit.labels) > 1]
    if not drawn and one.spans is not None:
        drawn = [histogram("span lengths", one.spans, css=css)]
    return {
        "name": visible(one.objective.name),
        "description": describe_objective(dataclasses.asdict(one.objective)),
        "css": css,
        "examples": f"{one.examples:,}",
        "figures": figures + drawn,
    }


def _law_rows(one: ObjectiveStatistics) -> Iterator[dict[str, Any]]:
    for fit in one.fits:
        first = f"{fit.labels[0]}: {fit.measured[0]:,.0f}, expected {fit.expected[0]:,.1f}" if fit.labels else ""
        yield {
            "name": visible(one.objective.name),
            "css": _css(one.objective),
            "subject": fit.subject,
            "first": first,
            "forbidden": fit.forbidden,
            "p_value": p_value(fit.p_value) if fit.has_choice else "no choice",
            "misfit": is_misfit(fit),
        }


def _exposure(found: Statistics) -> Iterator[dict[str, Any]]:
    """By corpus: bars of how often a raw token is scored in one epoch."""
    longest = max([sum(part.exposure for part in found.parts if part.corpus == name) for name in found.coverage] or [0])
    longest = longest or 1.0
    for name, coverage in found.coverage.items():
        mine = [part for part in found.parts if part.corpus == name]
        total = sum(part.exposure for part in mine)
        yield {
            "name": visible(name),
            "coverage": formats.percent(coverage),
            "bars": [
                {
                    "name": visible(part.objective.name),
                    "css": _css(part.objective),
                    "value": f"{part.exposure:.4f}",
                    "within": formats.percent(part.scored),
                    "percent": 100 * part.exposure / longest,
                }
                for part in mine
            ],
            "total": f"{total:.3f}",
            "percent": 100 * total / longest,
        }


def _passes(run: RunConfig, stream: Stream, found: Statistics) -> Iterator[str]:
    """What the whole run makes of each corpus."""
    steps = run.training.num_train_steps
    epochs = stream.epochs(steps * stream.batch_size)
    for name, rows in stream.rows_per_epoch.items():
        exposure = sum(part.exposure for part in found.parts if part.corpus == name)
        yield visible(
            f"{name}: {rows:,} rows are an epoch. The run of {steps:,} steps makes {formats.number(epochs[name], 3)} "
            f"passes, so that the loss is on a token {formats.number(epochs[name] * exposure, 3)} times on average."
        )


def _samples(found: Statistics, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    for objective, examples in found.samples:
        for example in examples[:1]:
            yield {
                "objective": visible(objective.name),
                "description": describe_objective(dataclasses.asdict(objective)),
                "parts": list(_sample_parts(example, tokenizer)),
            }


def _sample_parts(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, int, list[Run]]]:
    if len(example.inputs) or not example.seen:
        label = f"Inputs, {example.seen}" if example.seen else "Inputs"
        given = np.zeros(len(example.inputs), np.bool_)
        scored = example.scored[: len(example.inputs)] if example.aligned else given
        yield label, len(example.inputs), runs(example.inputs, scored, tokenizer)
    yield "Targets", len(example.targets), runs(example.targets, example.scored, tokenizer)
