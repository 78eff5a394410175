"""Common parts of the HTML pages, each of which is one file that loads nothing and executes no foreign text."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

import jinja2

from t5x_like.utils.sanitize import visible

_TEMPLATES = Path(__file__).parent / "templates"


@functools.cache
def environment() -> jinja2.Environment:
    """Return a jinja2 environment over the templates of this package, with autoescaping and the filter `visible`."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["visible"] = visible
    return templates


def resource(name: str) -> str:
    """Return the text of a style sheet or script."""
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def content_hash(text: str) -> str:
    """Return the hash by which a Content-Security-Policy allows an inline style sheet or script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
