"""Statistics of a recipe's data as one HTML page: stores, rows, noise distributions and samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from t5x_like.config.batch_sizes import batch_sizes
from t5x_like.config.objectives import MODES, Objective
from t5x_like.config.run import RunConfig
from t5x_like.data.inspection.goodness_of_fit import Fit, combined
from t5x_like.data.inspection.row_statistics import (
    MixturePart,
    ObjectiveStatistics,
    RowStatistics,
    row_statistics,
)
from t5x_like.data.inspection.store_statistics import (
    QUANTILES,
    LengthSummary,
    RepeatedDocuments,
    TokenUsage,
    document_lengths,
    repeated_documents,
    summarize_lengths,
    token_usage,
)
from t5x_like.data.store.prepare import open_stores
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.stream.unpack import TokenRun, UnpackedExample, runs
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.errors import DataError
from t5x_like.reports.charts import Bar
from t5x_like.reports.histograms import MISFIT, Figure, histogram, is_misfit, outcomes, p_value, quantile_row
from t5x_like.reports.html_page import content_hash, environment, resource
from t5x_like.reports.sample_view import Piece
from t5x_like.utils import formatting
from t5x_like.utils.atomic_write import write_atomically
from t5x_like.utils.progress import ProgressDisplay
from t5x_like.utils.sanitize import visible

_COLUMNS = ("example", "raw token", "loss token")
_OTHER = "other"


def write_statistics(run: RunConfig, output: Path, rows: int, first_row: int = 0) -> Path:
    """Read a sample of the training rows and write the page.

    Args:
      run: A run whose stores are prepared.
      output: The HTML file.
      rows: Minimum number of rows to read; whole batches are read.
      first_row: Index of the first row of the sample.

    Raises:
      DataError: a store is not prepared, or the page cannot be written.
    """
    if run.data.labelled is not None:
        raise DataError("found labelled examples, expected text: the page describes windows and noise distributions")
    stream = TrainingStream(open_stores(run.data), run.data, batch_sizes(run.training))
    with ProgressDisplay(rows, "reading stores and rows") as progress:
        texts = [StoreView.of(source.name, store) for source, store in zip(stream.sources, stream.stores, strict=True)]
        found = row_statistics(stream, rows, first_row, progress.advance_to)
    page = render(run, stream, texts, found)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror or error})") from None
    return output


@dataclasses.dataclass(frozen=True)
class StoreView:
    """Numbers and figures of a store. `use` is None if its training split is empty."""

    name: str
    path: str
    splits: tuple[tuple[str, ...], ...]
    left_out: tuple[tuple[str, int], ...]
    quantiles: tuple[tuple[str, list[str]], ...]
    figures: tuple[Figure, ...]
    repeats: RepeatedDocuments
    documents: int
    unit: str
    use: TokenUsage | None

    @staticmethod
    def of(name: str, store: Store) -> StoreView:
        train, per_document = store.split("train"), store.sequences_per_document
        found: dict[str, LengthSummary] = {}
        values: dict[str, npt.NDArray[np.int64]] = {}
        if train.num_documents:
            preferences = bool(store.info.get("corpus", {}).get("rejected_field"))
            values = document_lengths(train, per_document, preferences=preferences)
            found = {what: summarize_lengths(values[what], log=_spreads(values[what])) for what in values}
        return StoreView(
            name=visible(name),
            path=visible(str(store.path)),
            splits=tuple(_split_row(store, split) for split in store.splits),
            left_out=tuple((visible(reason), count) for reason, count in store.info.get("left_out", {}).items()),
            quantiles=tuple((what, quantile_row(one)) for what, one in found.items()),
            figures=tuple(
                histogram(f"Tokens of {what}", one, css="mode-none", log=_spreads(values[what]))
                for what, one in found.items()
            ),
            repeats=repeated_documents(train, per_document) if train.num_documents else RepeatedDocuments(0, 0, 0),
            documents=train.num_documents,
            unit="pairs" if per_document > 1 else "documents",
            use=token_usage(store, "train") if train.num_tokens else None,
        )


def _spreads(lengths_D: npt.NDArray[np.int64]) -> bool:
    """Return True if the lengths differ by orders of magnitude."""
    return int(lengths_D.max()) > 50 * max(int(lengths_D.min()), 1)


def _split_row(store: Store, name: str) -> tuple[str, ...]:
    split = store.split(name)
    ratio = f"{split.num_bytes / split.num_tokens:.2f}" if split.num_tokens else "–"
    return name, f"{split.num_documents:,}", f"{split.num_tokens:,}", f"{split.num_bytes:,}", ratio


def render(run: RunConfig, stream: TrainingStream, texts: Sequence[StoreView], found: RowStatistics) -> str:
    """Return the HTML page."""
    style = resource("run_report.css") + resource("data_report.css")
    return (
        environment()
        .get_template("data_report.html")
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
            distributions=[row for one in found.objectives for row in _distribution_rows(one)],
            misfit=f"{MISFIT:g}",
            combined=p_value(combined(_p_values(found))),
            exposure=list(_exposure(found)),
            passes=list(_passes(run, stream, found)),
            samples=list(_samples(found, stream.store.tokenizer)),
            formats=formatting,
            several=len(stream.sources) > 1,
        )
    )


def _subtitle(stream: TrainingStream) -> str:
    data = stream.data
    lengths = "/".join(str(length) for length in (data.inputs_length, data.targets_length) if length)
    words = [
        data.layout.replace("_", "-"),
        f"rows of {lengths}",
        *(f"and {data.inputs_length}/{length}" for length in data.targets_length_buckets),
        f"batch {stream.batch_size:,}",
        f"{data.tokenizer.kind} vocabulary of {stream.vocabulary.vocab_size:,}",
        ("corpora " if len(stream.sources) > 1 else "corpus ") + ", ".join(source.name for source in stream.sources),
    ]
    return visible(", ".join(words).replace(", and ", " and "))


def _notes(stream: TrainingStream, found: RowStatistics) -> Iterator[str]:
    changes = [phase.start_step for phase in stream.data.rate_schedule]
    passed = [step for step in changes if stream.batch_sizes.rows_before(step) < found.first_row + found.rows]
    if passed:
        yield (
            f"The rates change at step {passed[0]:,}, within or before this sample. The expected shares are those "
            "before any change."
        )
    broken = sum(one.broken for one in found.objectives)
    if broken:
        yield f"{broken:,} examples cannot be restored to their raw text: inputs and targets do not match."
    for one in found.objectives:
        for fit in one.fits:
            if is_misfit(fit):
                yield f"{one.objective.name}: {fit.subject} do not fit their distribution ({p_value(fit.p_value)})."


def _fits(found: RowStatistics) -> list[Fit]:
    return [fit for one in found.objectives for fit in one.fits]


def _p_values(found: RowStatistics) -> list[float]:
    return [fit.p_value for fit in _fits(found) if fit.p_value is not None and fit.has_choice]


def _figures(stream: TrainingStream, texts: Sequence[StoreView], found: RowStatistics) -> list[tuple[str, str, str]]:
    """Return (label, value, detail) of the key figures."""
    tokens = sum(store.split("train").num_tokens for store in stream.stores)
    documents = sum(text.documents for text in texts)
    units = " and ".join(dict.fromkeys(text.unit for text in texts))
    repeated = found.repeated_ngrams
    scored = sum(part.scored * part.measured[1] for part in found.parts)
    figures = [
        ("Training text", formatting.count(tokens), f"tokens in {documents:,} {units}"),
        ("Fill", formatting.percent(found.fill_share), "of all positions are not padding"),
        ("Scored text", formatting.percent(scored), "of the raw tokens in rows"),
        ("Repeated text", formatting.percent(float(np.mean(repeated))), "8-grams in another row of the batch"),
    ]
    p_values = _p_values(found)
    if p_values:
        wrong = sum(map(is_misfit, _fits(found)))
        many = f"all {len(p_values)} distributions combined" if len(p_values) > 1 else "one distribution"
        detail = f"{wrong} of {len(p_values)} do not fit" if wrong else many
        figures.append(("Distributions", p_value(combined(p_values)), detail))
    return figures


def _fill(found: RowStatistics) -> list[tuple[str, str, float, str]]:
    """Return (name, share, percent, examples per row) of each sub-batch and stack."""
    several = len({fill.sub_batch for fill in found.fill}) > 1
    rows = []
    for fill in found.fill:
        name = f"{fill.sub_batch}, {fill.stack}" if several else fill.stack
        per_row = fill.examples / fill.rows if fill.rows else 0.0
        detail = f"{fill.rows:,} rows of {fill.positions // max(fill.rows, 1):,}"
        if abs(per_row - 1) > 1e-9:
            detail += f", {per_row:.3g} examples each"
        rows.append((name, formatting.percent(fill.share), 100 * fill.share, detail))
    if len(rows) > 1:
        rows.append(("all", formatting.percent(found.fill_share), 100 * found.fill_share, ""))
    return rows


def _mode_of(objective: Objective) -> str:
    return objective.mode or _OTHER


def _css(objective: Objective) -> str:
    return f"mode-{objective.mode}" if objective.mode else "mode-none"


def _mode_bars(found: RowStatistics) -> Iterator[tuple[str, list[Bar]]]:
    """Yield the shares of the modes by example, raw token and loss token; nothing if there is only one mode."""
    names = [mode for mode in (*MODES, _OTHER) if any(_mode_of(part.objective) == mode for part in found.parts)]
    if len(names) < 2:
        return
    for column, title in enumerate(_COLUMNS):
        segments = []
        for name in names:
            mine = [part for part in found.parts if _mode_of(part.objective) == name]
            measured = sum(part.measured[column] for part in mine)
            expected = sum(part.expected[column] for part in mine)
            css = "mode-none" if name == _OTHER else f"mode-{name}"
            note = formatting.percent(expected)
            segments.append(Bar(name, formatting.percent(measured), 100 * measured, css, note))
        yield title, segments


def _part_rows(found: RowStatistics) -> Iterator[dict[str, Any]]:
    """Yield a row per objective; with several corpora, after a row with the sums of each corpus."""
    corpora = list(dict.fromkeys(part.corpus for part in found.parts))
    for corpus in corpora:
        mine = [part for part in found.parts if part.corpus == corpus]
        if len(corpora) > 1:
            yield _part_row(corpus, "sum", mine)
        for part in mine:
            yield _part_row(part.objective.name, _css(part.objective), [part])


def _part_row(name: str, css: str, parts: Sequence[MixturePart]) -> dict[str, Any]:
    return {
        "name": visible(name),
        "css": css,
        "examples": f"{sum(part.examples for part in parts):,}",
        "shares": [
            (
                formatting.percent(sum(part.measured[column] for part in parts)),
                formatting.percent(sum(part.expected[column] for part in parts)),
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
        "description": one.objective.description,
        "css": css,
        "examples": f"{one.examples:,}",
        "figures": figures + drawn,
    }


def _distribution_rows(one: ObjectiveStatistics) -> Iterator[dict[str, Any]]:
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


def _exposure(found: RowStatistics) -> Iterator[dict[str, Any]]:
    """Yield for each corpus bars of the mean number of times that a raw token is scored in one epoch."""
    longest = max([sum(part.exposure for part in found.parts if part.corpus == name) for name in found.coverage] or [0])
    longest = longest or 1.0
    for name, coverage in found.coverage.items():
        mine = [part for part in found.parts if part.corpus == name]
        total = sum(part.exposure for part in mine)
        yield {
            "name": visible(name),
            "coverage": formatting.percent(coverage),
            "bars": [
                Bar(
                    label=visible(part.objective.name),
                    value=f"{part.exposure:.4f}",
                    percent=100 * part.exposure / longest,
                    css=_css(part.objective),
                    note=formatting.percent(part.scored),
                )
                for part in mine
            ],
            "total": f"{total:.3f}",
            "percent": 100 * total / longest,
        }


def _passes(run: RunConfig, stream: TrainingStream, found: RowStatistics) -> Iterator[str]:
    """Yield a sentence on the number of passes of the whole run over each corpus."""
    steps = run.training.num_train_steps
    epochs = stream.epochs(stream.batch_sizes.rows_before(steps))
    for name, rows in stream.rows_per_epoch.items():
        exposure = sum(part.exposure for part in found.parts if part.corpus == name)
        yield visible(
            f"{name}: an epoch has {rows:,} rows. The run of {steps:,} steps makes "
            f"{formatting.number(epochs[name], 3)} passes, in which a token is scored "
            f"{formatting.number(epochs[name] * exposure, 3)} times on average."
        )


def _samples(found: RowStatistics, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    for objective, examples in found.samples:
        for example in examples[:1]:
            yield {
                "objective": visible(objective.name),
                "description": objective.description,
                "parts": list(_sample_parts(example, tokenizer)),
            }


def _sample_parts(example: UnpackedExample, tokenizer: Tokenizer) -> Iterator[tuple[str, int, list[Piece]]]:
    if len(example.inputs) or not example.seen:
        label = f"Inputs, {example.seen}" if example.seen else "Inputs"
        given = np.zeros(len(example.inputs), np.bool_)
        scored = example.scored[: len(example.inputs)] if example.aligned else given
        yield label, len(example.inputs), _pieces(runs(example.inputs, scored, tokenizer))
    yield "Targets", len(example.targets), _pieces(runs(example.targets, example.scored, tokenizer))


def _pieces(token_runs: Sequence[TokenRun]) -> list[Piece]:
    """Return runs of tokens as pieces of a sample, in which the scored text is marked."""
    found = []
    for run in token_runs:
        match run.kind:
            case "sentinel":
                found.append(Piece("sentinel", run.text, run.number))
            case "mode":
                found.append(Piece("mode", run.text[1:-1]))
            case "end":
                found.append(Piece("special", run.text))
            case "given" | "scored":
                found.append(Piece("text", run.text, marked=run.kind == "scored"))
            case _:
                assert_never(run.kind)
    return found
