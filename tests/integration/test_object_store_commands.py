"""Commands whose models, inputs and outputs are in an object store write what they write on a disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.prompted_run import make_run
from helpers.saved_state import saved_state

from t5x_like.cli.main import main
from t5x_like.cli.recipe_argument import recipe_run
from t5x_like.config import InitializeFrom, TokenizerConfig
from t5x_like.data.tokenizers.loading import configured_tokenizer
from t5x_like.data.tokenizers.train_vocabulary import train_vocabulary
from t5x_like.errors import EXIT_OK, EXIT_REFUSED, EXIT_USAGE
from t5x_like.interop.warm_start import initial_state
from t5x_like.program import build_program
from t5x_like.run_directory import read_config
from t5x_like.storage import locations
from t5x_like.storage.locations import Url, location
from t5x_like.storage.mirror import local_copy
from t5x_like.utils import tree_paths


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = make_run(tmp_path_factory.mktemp("commands"))
    config = json.loads((run_dir / "config.json").read_text())
    # The tests have eight devices.
    config["training"]["global_batch_size"] = 8
    (run_dir / "config.json").write_text(json.dumps(config))
    return run_dir


@pytest.fixture(scope="module")
def url(run_dir: Path) -> Iterator[Url]:
    """The run directory, copied to an object store as a user copies it."""
    url = location(f"memory://{run_dir.parent.name}/bucket/run")
    assert isinstance(url, Url)
    for path in run_dir.rglob("*"):
        if path.is_file():
            locations.write_bytes(url / path.relative_to(run_dir).as_posix(), path.read_bytes())
    yield url
    locations.remove(url.parent)


def test_generated_file_and_averaged_model_are_those_of_a_disk(run_dir: Path, url: Url, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abc", "deaf", "g h")))
    locations.write_bytes(url.parent / "prompts.jsonl", prompts.read_bytes())
    limit = ("--max-new-tokens", "4", "--batch-size", "2")
    answers = tmp_path / "answers.jsonl"
    assert main(["generate", str(run_dir), "--input", str(prompts), "--output", str(answers), *limit]) == EXIT_OK
    arguments = ["--input", f"{url.parent}/prompts.jsonl", "--output", f"{url.parent}/answers.jsonl", *limit]
    assert main(["generate", str(url), *arguments]) == EXIT_OK
    found = locations.read_bytes(url.parent / "answers.jsonl")
    assert found == answers.read_bytes() and found.count(b"\n") == 3
    # The same command finds the lines and their settings, and has nothing to do; another one is refused.
    assert main(["generate", str(url), *arguments]) == EXIT_OK
    assert main(["generate", str(url), *arguments[:-4], "--max-new-tokens", "5"]) == EXIT_REFUSED
    assert locations.read_bytes(url.parent / "answers.jsonl") == found

    assert main(["average", str(run_dir), str(tmp_path / "mean")]) == EXIT_OK
    assert main(["average", str(url), f"{url.parent}/mean"]) == EXIT_OK
    expected = saved_state(tmp_path / "mean", 5)
    copied = saved_state(local_copy(f"{url.parent}/mean", "MODEL"), 5)
    assert expected.keys() == copied.keys()
    assert all(copied[path].tobytes() == expected[path].tobytes() for path in expected)
    assert main(["average", str(url), f"{url.parent}/mean"]) == EXIT_USAGE, "the URL is not free"
    assert main(["doctor", f"{url.parent}/mean"]) == EXIT_OK


def test_run_starts_from_a_model_in_an_object_store(run_dir: Path, url: Url) -> None:
    run = dataclasses.replace(read_config(run_dir), initialize_from=InitializeFrom(directory=f"{url}"))
    report: list[str] = []
    state = initial_state(build_program(run, jax.devices()[:1]), report.append)
    saved = saved_state(run_dir, 5)
    params = tree_paths.by_path({"params": state["params"]})
    assert params and all(np.array_equal(saved[path], np.asarray(leaf)) for path, leaf in params.items())
    assert any("parameters of step 5" in line for line in report)


def test_configuration_names_the_url_of_a_model_and_not_its_copy(url: Url, tmp_path: Path) -> None:
    locations.write_bytes(url.parent / "base" / "config.json", b"{}")
    recipe = tmp_path / "started.py"
    recipe.write_text(
        "import dataclasses\n"
        "from t5x_like.config import InitializeFrom, TokenizerConfig\n"
        "from t5x_like.config.recipes import load_recipe\n"
        "def recipe(base):\n"
        "    run = load_recipe('smoke')\n"
        "    assert (base / 'config.json').is_file()\n"
        "    tokenizer = TokenizerConfig(kind='published', path=str(base / 'tokenizer.json'))\n"
        "    data = dataclasses.replace(run.data, tokenizer=tokenizer)\n"
        "    return dataclasses.replace(run, data=data, initialize_from=InitializeFrom(directory=str(base)))\n"
    )
    run = recipe_run(f"{recipe}@{url.parent}/base")
    assert run.initialize_from is not None and run.initialize_from.directory == f"{url.parent}/base"
    assert run.data.tokenizer.path == f"{url.parent}/base/tokenizer.json"


def test_tokenizer_is_read_from_an_object_store(url: Url) -> None:
    key = url.parent / "spiece.model"
    locations.write_bytes(key, train_vocabulary("sentencepiece", ["the red cat", "a blue dog", "one two three"], 277))
    config = TokenizerConfig(kind="sentencepiece", path=str(key), num_sentinels=3)
    tokenizer = configured_tokenizer(config)
    assert tokenizer.decode(tokenizer.encode("a red dog")) == "a red dog"
