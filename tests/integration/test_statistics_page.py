"""`inspect --stats`: one offline page in which corpus text is escaped; rendered in a browser if one is installed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import chromium

from t5x_like.cli.main import main
from t5x_like.config import CorpusConfig, DataConfig, RunConfig, SpanCorruption, TokenizerConfig, ul2
from t5x_like.config.data import CorpusShareConfig, RatePhaseConfig
from t5x_like.config.objectives import Supervised
from t5x_like.config.recipes import load_recipe
from t5x_like.data.objectives.registry import denoise
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import DataError
from t5x_like.reports.data_report import write_statistics

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&amp;{{ 7*7 }}\x1b[31m\u202e </style>"


class Page(HTMLParser):
    """Parses the elements with their attributes, and all text except the style."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._tag = tag

    def handle_data(self, data: str) -> None:
        if self._tag != "style":
            self.words += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def configured(folder: Path, text: str, *, name: str = "smoke", **changes: object) -> RunConfig:
    """Return a run over one text file, tokenised as bytes, with its store."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(text)
    run = load_recipe("smoke")
    settings: dict[str, object] = {
        "corpus": CorpusConfig(files=(str(folder / "text.txt"),), validation_fraction=1e-9),
        "tokenizer": TokenizerConfig(kind="bytes", num_sentinels=64),
        "mixture": ul2(),
        "inputs_length": 48,
        "targets_length": 48,
        "store_dir": str(folder / "stores"),
        **changes,
    }
    data: DataConfig = dataclasses.replace(run.data, **settings)  # type: ignore[arg-type]
    prepare(data, report=lambda line: None, workers=1)
    return dataclasses.replace(run, name=name, data=data)


def plain(folder: Path) -> Path:
    text = "".join(f"The {number}th sentence of a text that goes on for a while.\n" for number in range(400))
    return write_statistics(configured(folder, text), folder / "page.html", rows=300)


def hostile(folder: Path) -> Path:
    return write_statistics(
        configured(folder, HOSTILE * 100, name=HOSTILE), folder / "page.html", rows=64, first_row=1000
    )


def mixed(folder: Path) -> Path:
    """Write the page of two corpora, one of which has packed pairs, with rows of one shape."""
    folder.mkdir()
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"question": "a" * (2 + n % 9), "text": "b" * (1 + n % 5)}) + "\n" for n in range(50))
    )
    (folder / "other.txt").write_text("Some other text, again and again. " * 60)
    corpora = (
        CorpusShareConfig(
            name="text", corpus=CorpusConfig(files=(str(folder / "other.txt"),), validation_fraction=1e-9)
        ),
        CorpusShareConfig(
            name="pairs",
            corpus=CorpusConfig(
                files=(str(folder / "pairs.jsonl"),), inputs_field="question", validation_fraction=1e-9
            ),
            mixture=(Supervised(),),
            example_mode="documents",
        ),
    )
    own = (SpanCorruption(name="R", mode="R"),)
    return write_statistics(configured(folder, "unused", corpora=corpora, mixture=own), folder / "page.html", rows=100)


def test_page_contains_all_sections(tmp_path: Path) -> None:
    page = Page(plain(tmp_path / "run").read_text(encoding="utf-8"))
    for words in ("Fill", "by loss token", "Loss exposure", "8-grams", "tokens per word", "unknown", "validation"):
        assert words in page.words
    for objective in ul2():
        assert objective.name in page.words
    drawn = [attributes["aria-label"] for attributes in page.named("svg") if "aria-label" in attributes]
    assert sum("span lengths" in str(label) for label in drawn) == 6
    assert sum("target fraction" in str(label) for label in drawn) == 1
    assert len(page.named("article")) == 2 + 7 + 1 + 1 + 7
    sentinels = [attributes for attributes in page.named("b") if str(attributes.get("class")).startswith("sentinel")]
    assert len(sentinels) > 12 and len(page.named("mark")) > 7


def test_page_is_one_file_without_requests_or_scripts(tmp_path: Path) -> None:
    text = plain(tmp_path / "run").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.named("script") and not page.named("img")
    for _, attributes in page.elements:
        assert not {"src", "style", "srcset"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert "href" not in attributes or attributes == {"rel": "icon", "href": "data:,"}
    assert not re.search(r"url\(|@import", text)
    (policy,) = [str(item["content"]) for item in page.named("meta") if "http-equiv" in item]
    assert policy.startswith("default-src 'none';") and "script-src" not in policy and "unsafe" not in policy


def test_corpus_text_is_escaped(tmp_path: Path) -> None:
    text = hostile(tmp_path / "run").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.named("script") and not page.named("img") and len(page.named("style")) == 1
    assert "document.title='owned'" in page.words and "{{ 7*7 }}" in page.words
    assert "\x1b" not in text and "\u202e" not in text


def test_corpora_of_a_mixture_have_separate_sections(tmp_path: Path) -> None:
    page = Page(mixed(tmp_path / "run").read_text(encoding="utf-8"))
    for words in ("supervised", "50 pairs", "pairs: ", "an epoch has", "examples each", "inputs", "targets"):
        assert words in page.words


def test_wrong_sampler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from t5x_like.data.stream import row_stream

    def unrotated(tokens, keys, objective, *others):  # type: ignore[no-untyped-def]
        return denoise(tokens, keys, dataclasses.replace(objective, t5_exact=True), *others)

    run = configured(tmp_path / "run", "Text of a corpus. " * 2000, mixture=(SpanCorruption(name="R"),))
    right = Page(write_statistics(run, tmp_path / "right.html", rows=400).read_text(encoding="utf-8"))
    monkeypatch.setattr(row_stream, "denoise", unrotated)
    wrong = Page(write_statistics(run, tmp_path / "wrong.html", rows=400).read_text(encoding="utf-8"))
    note = "R: spans cut by the window's ends do not fit their distribution (p < 0.001)."
    assert note in wrong.words and note not in right.words
    assert "1 of 2 do not fit" in wrong.words and "all 2 distributions" in right.words


def test_rate_changes_within_the_sample_are_noted(tmp_path: Path) -> None:
    own = (SpanCorruption(name="R"), SpanCorruption(name="X", noise_density=0.5))
    schedule = (RatePhaseConfig(start_step=10, objectives=(("X", 3.0),)),)
    run = configured(tmp_path / "run", "Text of a corpus. " * 2000, mixture=own, rate_schedule=schedule)
    size = run.training.global_batch_size
    for rows, is_noted in ((10 * size, False), (11 * size, True)):
        page = Page(write_statistics(run, tmp_path / "page.html", rows=rows).read_text(encoding="utf-8"))
        assert ("rates change at step 10" in page.words) == is_noted


def test_page_of_the_smallest_store(tmp_path: Path) -> None:
    """One block of text, no validation split, and a sample that is too small for any test of a distribution."""
    run = configured(tmp_path / "run", "x" * 70, mixture=(SpanCorruption(name="R"),))
    page = Page(write_statistics(run, tmp_path / "deep" / "page.html", rows=1).read_text(encoding="utf-8"))
    assert "1 rows" in page.words or "rows from row 0" in page.words
    blocked = tmp_path / "run" / "text.txt" / "page.html"
    with pytest.raises(DataError, match="cannot be written"):
        write_statistics(run, blocked, rows=1)


def test_inspect_command_writes_the_page_or_names_the_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from t5x_like.config.serialization import to_json

    run = configured(tmp_path, "A sentence, and then another one. " * 100)
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(to_json(run))
    assert main(["inspect", "config.json", "--stats", "--sample-rows", "8"]) == 0
    assert capsys.readouterr().out.strip() == "runs/smoke.statistics.html"
    assert Path("runs/smoke.statistics.html").stat().st_size > 10_000
    assert main(["inspect", "config.json", "--first-row", "12345", "--rows", "1"]) == 0
    assert "12345: " in capsys.readouterr().out
    assert main(["inspect", "config.json", "--stats", "--data.store-dir", "elsewhere"]) == 2
    assert "t5x-like prepare" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Page]:
    if chromium.EXECUTABLE is None:
        pytest.skip("no Chromium is installed")
    page = chromium.Page()
    yield page
    page.close()


@pytest.mark.parametrize("make", [plain, hostile, mixed])
def test_page_renders_in_a_browser_without_errors(browser: chromium.Page, tmp_path: Path, make: object) -> None:
    assert callable(make)
    path = make(tmp_path / "run")
    browser.errors.clear()
    browser.requests.clear()
    for width in (1200, 400):
        colors = []
        for dark in (False, True):
            browser.show(width, dark=dark)
            browser.open(path)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            colors.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert colors[0] != colors[1]
    assert browser.evaluate("document.title") != "owned"
    heights = browser.evaluate("[...document.querySelectorAll('.histogram rect')].map((bar) => bar.getBBox().height)")
    assert len(heights) > 5 and max(heights) > 900
    assert browser.errors == []
    assert {address.split(":")[0] for address in browser.requests} <= {"file", "data"}
