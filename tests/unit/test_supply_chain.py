"""The lock of the dependencies agrees with the pins; every package in it has hashes, and the image's base a digest."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _pins(name: str) -> dict[str, set[str]]:
    """Package -> the lines that pin it, without hashes."""
    pins: dict[str, set[str]] = {}
    for line in (ROOT / name).read_text().splitlines():
        if match := re.match(r"([a-z0-9-]+)(?:\[[a-z,]+\])?(==[^\s;]+)", line):
            pins.setdefault(match[1], set()).add(match[2])
    return pins


def test_lock_has_the_pinned_versions_with_hashes() -> None:
    lock, pins = _pins("requirements.lock"), _pins("constraints.txt")
    assert {name: versions for name, versions in lock.items() if not versions <= pins.get(name, set())} == {}
    blocks = re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements.lock").read_text())[1:]
    assert len(blocks) >= len(lock) and all("--hash=sha256:" in block for block in blocks)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.match(r"[A-Za-z0-9-]+", text)[0].lower() for text in project["dependencies"]}  # type: ignore[index]
    assert required <= lock.keys(), "make constraints writes both"


def test_base_of_the_container_image_is_named_by_its_digest() -> None:
    text = (ROOT / "launch" / "Containerfile").read_text()
    assert re.findall(r"^FROM (.*)$", text, re.MULTILINE) == ["${BASE}"]
    assert re.search(r"^ARG BASE=python:3\.\d+[\w.-]*@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
