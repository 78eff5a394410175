"""Plug-ins: what is imported, what is not, and how a run directory remembers them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.config_examples import example

from t5x_like import plugins, run_directory
from t5x_like.config.recipes import load_recipe
from t5x_like.config.serialization import to_dict
from t5x_like.errors import ConfigError, SafetyError, UserError

PLUGIN = """
import pathlib
from typing import Literal
from t5x_like.config import OptimizerConfig, config_dataclass, register_optimizer

pathlib.Path({marker!r}).write_text("imported")

@register_optimizer
@config_dataclass
class Mine(OptimizerConfig):
    kind: Literal[{kind!r}] = {kind!r}
    scale: float = 1.0

    def build(self, logical_axes):
        raise NotImplementedError
"""

RECIPE = """
import dataclasses
from helpers.config_examples import changed, example
from {plugin} import Mine

def recipe():
    return dataclasses.replace(changed(example(), "training.optimizer", Mine(scale=2.0)), plugins=("{plugin}.py",))
"""


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clear what is loaded, trusted and imported, as in a new process."""
    before = set(sys.modules)
    for name in ("_loaded", "_trusted", "_named_by_json"):
        monkeypatch.setattr(plugins, name, type(getattr(plugins, name))())
    yield
    for name in set(sys.modules) - before:
        if not name.startswith("t5x_like."):
            del sys.modules[name]


def write_recipe(folder: Path, kind: str) -> Path:
    """Write a plug-in that leaves a marker when it is imported, and a recipe that uses it."""
    (folder / f"{kind}_plugin.py").write_text(PLUGIN.format(marker=str(folder / "marker"), kind=kind))
    path = folder / "recipe_of_test.py"
    path.write_text(RECIPE.format(plugin=f"{kind}_plugin"))
    return path


def in_new_process(monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str) -> None:
    monkeypatch.setattr(plugins, "_loaded", {})
    sys.modules.pop(f"{kind}_plugin", None)
    (folder / "marker").unlink()


def test_a_recipe_is_trusted_with_the_plugins_that_it_names(tmp_path: Path) -> None:
    run = load_recipe(str(write_recipe(tmp_path, "beside")))
    assert (run.plugins, run.training.optimizer.kind) == (("beside_plugin.py",), "beside")
    assert (tmp_path / "marker").exists()


def test_a_run_directory_keeps_its_plugins_and_imports_them_only_if_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_recipe(str(write_recipe(tmp_path, "kept")))
    workdir = tmp_path / "run"
    workdir.mkdir()
    run_directory.claim_config(run_directory.RunRecord(workdir), run)
    copy = workdir / "plugins/kept_plugin.py"
    assert copy.read_bytes() == (tmp_path / "kept_plugin.py").read_bytes()
    assert run_directory.read_config(workdir) == run, "the process has imported the same content already"

    in_new_process(monkeypatch, tmp_path, "kept")
    with pytest.raises(SafetyError, match=r"--trust kept_plugin.py") as error:
        run_directory.read_config(workdir)
    assert error.value.exit_code == 3
    with pytest.raises(SafetyError, match="kept_plugin.py"):
        load_recipe(str(workdir / "config.json"))
    assert not (tmp_path / "marker").exists(), "nothing was imported"

    (tmp_path / "kept_plugin.py").unlink()
    plugins.trust(["kept_plugin.py"])
    assert run_directory.read_config(workdir).plugins == run.plugins
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("change", ["changed", "missing", "no record"])
def test_a_changed_or_missing_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    kind = change.replace(" ", "_")
    run_directory.claim_config(run_directory.RunRecord(tmp_path), load_recipe(str(write_recipe(tmp_path, kind))))
    in_new_process(monkeypatch, tmp_path, kind)
    copy = tmp_path / f"plugins/{kind}_plugin.py"
    if change == "changed":
        copy.write_text(copy.read_text() + "\n# changed\n")
    else:
        (copy if change == "missing" else tmp_path / "plugins/plugins.json").unlink()
    plugins.trust([copy.name])
    with pytest.raises(SafetyError, match="has been changed" if change == "changed" else "no plug-in file"):
        run_directory.read_config(tmp_path)
    assert not (tmp_path / "marker").exists()


def test_resuming_with_a_changed_plugin_is_refused_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, "resumed")
    workdir = tmp_path / "run"
    workdir.mkdir()
    run_directory.claim_config(run_directory.RunRecord(workdir), load_recipe(str(recipe)))
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
    plugin = tmp_path / "resumed_plugin.py"
    plugin.write_text(plugin.read_text() + "\n# changed\n")
    in_new_process(monkeypatch, tmp_path, "resumed")
    run = load_recipe(str(recipe))
    with pytest.raises(SafetyError, match="--allow-change plugins"):
        run_directory.claim_config(run_directory.RunRecord(workdir), run)
    run_directory.claim_config(run_directory.RunRecord(workdir), run, ["plugins"])
    assert (workdir / "plugins/resumed_plugin.py").read_bytes() == plugin.read_bytes()


def test_a_recipe_that_registers_an_extension_is_a_plugin_itself(tmp_path: Path) -> None:
    recipe = tmp_path / "self_registering.py"
    text = PLUGIN.format(marker=str(tmp_path / "marker"), kind="self_registering")
    recipe.write_text(
        text + "\nfrom helpers.config_examples import changed, example\n"
        "def recipe():\n    return changed(example(), 'training.optimizer', Mine())\n"
    )
    assert load_recipe(str(recipe)).plugins == ("self_registering.py",)


def test_a_plugin_that_raises_is_reported_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "raising_plugin.py").write_text("\n\nraise ValueError('broken')\n")
    with pytest.raises(UserError, match=r"raising_plugin.py:3 raised ValueError: broken"):
        plugins.load_beside(["raising_plugin.py"], tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("absent_plugin.py",), "no file"),
        (("absent_module_of_nobody",), "cannot be imported"),
        (("json.py",), "name of another module"),
        (("a/same.py", "b/same.py"), "different stems"),
        (("not-a-module.py",), "cannot be imported"),
    ],
)
def test_unusable_names_of_plugins_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match=message):
        plugins.load_beside(names, tmp_path)


def test_modules_that_only_a_json_configuration_names_are_not_imported(tmp_path: Path) -> None:
    document = to_dict(dataclasses.replace(example(), name="run"))
    task = {"mixture_or_task": "x", "module": "module_of_a_stranger"}
    document["evaluation"]["tasks"] = [task]
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert load_recipe(str(tmp_path / "config.json")).evaluation.tasks[0].module == "module_of_a_stranger"
    with pytest.raises(SafetyError, match="--trust module_of_a_stranger"):
        plugins.import_named_module("module_of_a_stranger", "evaluation.tasks")
    plugins.trust(["module_of_a_stranger"])
    with pytest.raises(ModuleNotFoundError):
        plugins.import_named_module("module_of_a_stranger", "evaluation.tasks")
    assert plugins.import_named_module("t5x_like.errors", "evaluation.tasks").__name__ == "t5x_like.errors"
