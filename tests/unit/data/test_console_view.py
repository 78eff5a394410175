"""Console view: masked and scored tokens are marked, and control codes are escaped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers.config_examples import example
from helpers.data_examples import data_config, numbered_store, text_store
from rich.console import Console

from t5x_like.config import MaskedLM, RunConfig, SpanCorruption
from t5x_like.config.objectives import Layout
from t5x_like.data.inspection import console_view
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.errors import DataError


def printed(*renderables: object, color: bool = False) -> str:
    console = Console(
        width=300, force_terminal=color, color_system="standard" if color else None, no_color=not color, _environ={}
    )
    with console.capture() as capture:
        console.print(*renderables)
    return capture.get()


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm", "causal_lm", "encoder"])
def test_row_panel_shows_text_denoiser_inputs_and_targets(tmp_path: Path, layout: Layout) -> None:
    run = example(layout)
    text = " ".join(f"word{i}" for i in range(2000))
    store = text_store(tmp_path / "s", [text], num_sentinels=run.data.tokenizer.num_sentinels)
    stream = TrainingStream([store], run.data, 4)
    rows = stream.get_rows(np.arange(12))
    panels = console_view.describe_rows(stream, 0, 12)
    assert len(panels) == 12
    for row, panel in enumerate(panels):
        shown = printed(panel)
        objective = run.data.mixture[int(rows["denoiser_ids"][row])]
        assert f"{row}: {objective.name}" in shown and "targets [" in shown
        if isinstance(objective, SpanCorruption):
            assert f"[{objective.mode}]" in shown and shown.count("<extra_id_0>") == 2
    cut = printed(console_view.describe_rows(stream, 0, 12, max_tokens=10)[0])
    assert " more" in cut and cut.count("word") < printed(panels[0]).count("word")


def test_masked_lm_in_single_stream_shows_masked_and_raw_text(tmp_path: Path) -> None:
    store = text_store(tmp_path / "s", ["a plain sentence " * 60], num_sentinels=64)
    data = data_config("prefix_lm", mixture=(MaskedLM(),))
    shown = printed(console_view.describe_rows(TrainingStream([store], data, 4), 0, 1)[0])
    assert "inputs (one position later) [95 tokens]" in shown and "targets [96 tokens]" in shown
    assert "<extra_id_0>" in shown.split("targets")[0] and "<extra_id_0>" not in shown.split("targets")[1]


def test_scored_tokens_and_sentinels_are_coloured(tmp_path: Path) -> None:
    data = data_config()
    store = text_store(tmp_path / "s", ["abcdefgh " * 200])
    shown = printed(console_view.describe_rows(TrainingStream([store], data, 4), 0, 1)[0], color=True)
    assert "\x1b[32m" in shown and "\x1b[1;33m" in shown and "\x1b[1;35m" in shown


def test_control_codes_in_a_corpus_are_escaped(tmp_path: Path) -> None:
    data = data_config("causal_lm")
    store = text_store(tmp_path / "s", ["\x1b[31mred\x07\x00\r\u202e\x9b [bold]no markup[/bold]\n" * 40])
    shown = printed(*console_view.describe_rows(TrainingStream([store], data, 4), 0, 3))
    assert not set(shown) & set("\x1b\x07\x00\r\u202e\x9b")
    text = shown.replace("│", "").replace("\n", "").replace(" " * 2, "")
    assert "\\x1b[31mred\\x07\\x00\\x0d\\u202e\\x9b [bold]no markup[/bold]⏎" in text


def test_mixture_shares_by_example_and_by_loss_token_differ(tmp_path: Path) -> None:
    stream = TrainingStream([numbered_store(tmp_path / "s", 5000)], data_config(), 8)
    shares = console_view.mixture_shares(stream)
    for field in ("by_example", "by_token", "by_loss_token"):
        assert sum(getattr(share, field) for share in shares) == pytest.approx(1.0)
    assert all(share.by_example == pytest.approx(1 / 7) for share in shares)
    by_mode = {share.name[0]: 0.0 for share in shares}
    for share in shares:
        by_mode[share.name[0]] += share.by_loss_token
    assert by_mode["X"] > 3 * by_mode["R"]


def test_inspect_prints_store_mixture_and_rows_or_names_the_fix(tmp_path: Path) -> None:
    run = example()
    files = tmp_path / "text.txt"
    files.write_text("A sentence of some length, again and again.\n" * 200)
    data = dataclasses.replace(run.data, store_dir=str(tmp_path / "stores"))
    data = dataclasses.replace(data, corpus=dataclasses.replace(data.corpus, files=(str(files),)))
    run = dataclasses.replace(run, data=data)
    with pytest.raises(DataError, match="t5x-like prepare"):
        console_view.inspect(run, 2)
    from t5x_like.data.store.prepare import prepare

    prepare(data, report=lambda line: None)
    shown = inspected(run)
    assert "train" in shown and "by loss token" in shown and "0: " in shown and "1: " in shown and "2: " not in shown


def inspected(run: RunConfig) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console_view.inspect(run, 2, console)
    return capture.get()
