"""The documentation site as `make docs` built it: links, generated pages, and every page in headless Chromium.

`make test-docs` builds the site and runs these tests. Other targets skip them, because the site's generator has an
environment of its own.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from helpers import chromium
from helpers.docs_examples import REPOSITORY

SITE = Path(os.environ.get("DOCS_SITE", "build/site-that-was-not-built"))
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if path.name != "404.html")
SEARCH_SECONDS = 120.0
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PAGES, reason="no site: `make test-docs` builds it"),
]
needs_browser = pytest.mark.skipif(chromium.EXECUTABLE is None, reason="no Chromium is installed")


class _Links(HTMLParser):
    """Addresses that a page names, and the ids of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := attributes.get(name))}
        self.targets |= {value for name in ("href", "src") if (value := attributes.get(name)) is not None}


@pytest.fixture(scope="module")
def links() -> dict[Path, _Links]:
    return {(SITE / page).resolve(): _Links((SITE / page).read_text()) for page in PAGES}


def test_no_link_is_dead(links: dict[Path, _Links]) -> None:
    """Between pages, to headings, and to pictures, scripts and styles. Links to the web are not followed."""
    dead = []
    for page, found in links.items():
        for target in sorted(found.targets):
            address = urlsplit(target)
            if address.scheme or address.netloc:
                continue
            file = page if not address.path else (page.parent / unquote(address.path)).resolve()
            file = file / "index.html" if file.is_dir() else file
            anchor = unquote(address.fragment)
            exists = file.is_file() and (not anchor or file not in links or anchor in links[file].ids)
            if not exists:
                dead.append(f"{page.relative_to(SITE.resolve())}: {target}")
    assert dead == []


def test_generated_pages_are_those_of_this_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs/generator"))
    sources = importlib.import_module("sources")
    for page, make in sources.GENERATED.items():
        assert (SITE.parent / "docs" / page).read_text() == make(), page


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Page]:
    page = chromium.Page()
    yield page
    page.close()


@needs_browser
@pytest.mark.parametrize("page", PAGES)
def test_page_opens_without_an_error_and_fits_the_window(page: str, browser: chromium.Page) -> None:
    """Nothing is loaded from elsewhere, and tables and code scroll by themselves: the page never scrolls sideways."""
    browser.errors.clear()
    browser.requests.clear()
    browser.show(1200)
    browser.open(SITE / page)
    assert browser.evaluate("document.querySelectorAll('h1').length") >= 1
    too_wide = []
    for width in (1200, 400):
        for dark in (False, True):
            browser.show(width, dark=dark)
            if browser.evaluate("document.documentElement.scrollWidth") > width:
                too_wide.append((width, "dark" if dark else "light"))
    assert too_wide == []
    assert browser.errors == []
    assert {address.split(":")[0] for address in browser.requests} <= {"file", "data", "blob", "about"}


@needs_browser
def test_colours_follow_the_system(browser: chromium.Page) -> None:
    colors = []
    for dark in (False, True):
        browser.show(1200, dark=dark)
        browser.open(SITE / "index.html")
        colors.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colors[0] != colors[1]


@needs_browser
def test_search_works_on_files(browser: chromium.Page) -> None:
    browser.errors.clear()
    browser.show(1200)
    browser.open(SITE / "index.html")
    _until(browser, "document.querySelector('.md-search__button') !== null")
    browser.evaluate("document.querySelector('.md-search__button').click()")
    # The search is in a shadow root.
    _until(browser, "document.activeElement?.shadowRoot?.activeElement instanceof HTMLInputElement")
    browser.call("Input.insertText", text="spike_window")
    roots = "[...document.querySelectorAll('*')].map((element) => element.shadowRoot)"
    _until(browser, f"{roots}.some((root) => root?.textContent.includes('GuardConfig'))")
    assert browser.errors == []


def _until(browser: chromium.Page, condition: str) -> None:
    deadline = time.monotonic() + SEARCH_SECONDS
    while not browser.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.2)
