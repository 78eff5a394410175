"""The notebooks of docs/notebooks are executed from their first to their last cell; they assert what they say."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.docs_examples import REPOSITORY
from helpers.notebooks import cells, execute
from jax.experimental.compilation_cache import compilation_cache

NOTEBOOKS = sorted((REPOSITORY / "docs/notebooks").glob("*.ipynb"))
DENOISER, PUBLISHED = (REPOSITORY / f"docs/notebooks/{name}.ipynb" for name in ("denoiser", "published-model"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


@pytest.fixture
def cheap_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One device, as on a laptop, and equal programs compiled once: XLA takes most of the time."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in zip(options, (str(tmp_path / "compilations"), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_plain_python_without_outputs(path: Path) -> None:
    document = json.loads(path.read_text())
    assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in document["cells"]}) == len(document["cells"])
    for cell, found in zip(document["cells"], cells(path), strict=True):
        if found.kind == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            ast.parse(found.text)
    assert cells(path)[0].text.startswith("# ")


@pytest.mark.slow
def test_denoiser_from_text_to_loss(cheap_programs: None) -> None:
    names = execute(DENOISER, {"num_train_steps=150": "num_train_steps=40"})
    assert names["by_hand"] == pytest.approx(np.log(320), abs=1.0)
    assert len(names["losses"]) == 40


@pytest.mark.slow
def test_published_model_continued(folder: Path, cheap_programs: None) -> None:
    names = execute(PUBLISHED, {"num_train_steps=100": "num_train_steps=20"})
    assert names["run"].training.num_train_steps == 20
    assert (folder / "exported/model.safetensors").is_file()
    assert names["after"] < names["before"]


def test_a_text_to_replace_that_is_gone_is_found(folder: Path) -> None:
    path = folder / "small.ipynb"
    cell = {"cell_type": "code", "source": ["steps = 3\n", "twice = 2 * steps"]}
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["# Text"]}, cell]}))
    assert execute(path, {"steps = 3": "steps = 4"})["twice"] == 8
    with pytest.raises(LookupError, match="steps = 5"):
        execute(path, {"steps = 5": "steps = 4"})
