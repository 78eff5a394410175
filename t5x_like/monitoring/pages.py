"""What our HTML pages have in common: one file each, that loads nothing and executes no text from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

import jinja2

from t5x_like.monitoring.text import visible

_TEMPLATES = Path(__file__).parent / "report_template"


def environment(*folders: Path) -> jinja2.Environment:
    """Templates of these folders and of the run report: escaped by default, with the filter `visible`."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, _TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["visible"] = visible
    return made


def resource(name: str, folder: Path = _TEMPLATES) -> str:
    """A style sheet or script."""
    return (folder / name).read_text(encoding="utf-8")


def content_hash(text: str) -> str:
    """How a Content-Security-Policy names an inline style sheet or script that it allows."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_page(target: Path, page: str) -> Path:
    """Writes a page so that a reader sees the old one or the new one. Raises OSError."""
    temporary = target.with_name(target.name + ".partial")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, target)
    return target
