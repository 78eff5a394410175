"""Examples of the documentation: Python parses and imports existing names, and commands have existing options.

`tests/integration/` executes them: `test_docs_python.py`, `test_docs_shell.py` and `test_plugins.py`. Here is also what
the generator of the documentation site does not check: pages outside of the navigation, files, and the pages that are
made from the source.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.docs_examples import LANGUAGES, NOT_EXECUTED, PAGES, REPOSITORY, Command, blocks, commands, indented_lines

from t5x_like.cli.arguments import configured_run
from t5x_like.cli.main import COMMANDS as command_modules
from t5x_like.cli.main import main, parse
from t5x_like.config.objectives.registry import OBJECTIVES
from t5x_like.errors import EXIT_OK

PROJECT_FILES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "tests/README.md")
FILES = [*PAGES.values(), *map(REPOSITORY.joinpath, PROJECT_FILES)]
COMMANDS = {(command.text, command.section): command for command in commands()}.values()
PLACEHOLDERS = {
    "TARGET RECIPE": "local smoke -n 2",
    "RECIPE": "smoke",
    "[options]": "",
    "arguments of train": "",
    "...": "",
}


@pytest.mark.parametrize("page", PAGES)
def test_imports_of_the_examples_exist(page: str) -> None:
    for block in blocks(page):
        for node in ast.walk(ast.parse(block.text)) if block.language == "python" else ():
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition(".")[0] == "t5x_like":
                        importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "t5x_like":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("page", PAGES)
def test_code_is_in_fenced_blocks_that_name_their_language(page: str) -> None:
    assert [block.where for block in blocks(page) if block.language not in LANGUAGES] == []
    assert indented_lines(page) == [], "write code as ```bash, ```console, ```python or ```text"


def test_reasons_not_to_execute_belong_to_commands_of_the_pages() -> None:
    keys = {key for command in COMMANDS for key in (command.text, command.section)}
    assert set(NOT_EXECUTED) <= keys


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.where} {command.text[:40]}")
def test_arguments_of_commands_exist(command: Command) -> None:
    """Arguments of a command that is not executed are checked as far as possible; others are only parsed."""
    text = command.text
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    match re.sub(r"[\[\]]", "", text).split(maxsplit=1) if text.startswith("t5x-like") else text.split(maxsplit=1):
        case "t5x-like", _:
            words = Command(command.where, command.section, re.sub(r"[\[\]]", "", text)).words[1:]
            options, overrides = parse(words)
            if command.reason_not_executed and words[0] == "launch":
                assert main(words) == EXIT_OK
            elif command.reason_not_executed and words[0] == "sweep":
                assert main([*words, "--plan"]) == EXIT_OK
            elif command.reason_not_executed and hasattr(options, "recipe"):
                configured_run(options, overrides)
        case "make", target:
            assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.M)
        case "pip", arguments:
            project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
            assert set(re.findall(r"\[(\w+)\]", arguments)) <= set(project["optional-dependencies"])
        case "python", arguments if command.reason_not_executed:
            script = arguments.split()[0]
            if script == "-m":
                importlib.util.find_spec(arguments.split()[1])
            else:
                assert (REPOSITORY / script).is_file()
        case _ if command.reason_not_executed:
            assert command.text in NOT_EXECUTED, "a command of another program needs a reason of its own"


def test_an_unknown_option_in_an_example_is_found() -> None:
    with pytest.raises(SystemExit):
        test_arguments_of_commands_exist(Command("README.md:1", "", "t5x-like generate MODEL --no-such-option"))
    assert isinstance(parse(["eval", "MODEL"])[0], argparse.Namespace)


def test_every_page_of_docs_is_in_the_navigation_once() -> None:
    def pages(node: Any) -> Iterator[str]:
        for child in node if isinstance(node, list) else node.values():
            yield from [child] if isinstance(child, str) else pages(child)

    navigation = list(pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    written = [str(path.relative_to(REPOSITORY / "docs")) for path in REPOSITORY.glob("docs/**/*.md")]
    notebooks = [f"notebooks/{path.stem}.md" for path in (REPOSITORY / "docs/notebooks").glob("*.ipynb")]
    generated = [page for page in navigation if page.startswith("reference/")]
    assert sorted(navigation) == sorted([*written, *notebooks, *generated])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_that_a_page_names_exist(path: Path) -> None:
    """Targets of links and pictures, and source files in inline code, by their path or by its end."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    # The pages of notebooks are made from them.
    targets = [re.sub(r"^notebooks/(.*)\.md$", r"notebooks/\1.ipynb", target) for target in targets]
    links = [path.parent / target for target in targets if "://" not in target and not target.startswith("reference/")]
    assert [str(link) for link in links if not link.exists()] == []
    roots = (REPOSITORY, REPOSITORY / "t5x_like", REPOSITORY / "tests", *(REPOSITORY / "t5x_like").iterdir())
    sources = re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)(?::\w+)?`", text)
    assert [source for source in sources if not any((root / source).exists() for root in roots)] == []


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs/generator"))
    return REPOSITORY / "docs/generator"


def test_the_configuration_page_has_every_field_with_its_bounds(generator: Path) -> None:
    reference = importlib.import_module("config_reference")
    sections = {section.cls.__name__: section for section in reference.sections()}
    # Other tests register objectives of their own in this process.
    objectives = [objective for objective in OBJECTIVES.values() if objective.__module__.startswith("t5x_like.")]
    assert {objective.__name__ for objective in objectives} <= sections.keys()
    assert {"RunConfig", "StackConfig", "MuonConfig", "KeepBest"} <= sections.keys()
    tables = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", reference.page(), re.M | re.S))
    for name, section in sections.items():
        rows = re.findall(r"^\| `(\w+)` \|", tables[name], re.M)
        assert rows == [field.name for field in dataclasses.fields(section.cls)], name
    (row,) = re.findall(r"^\| `spike_window` .*", tables["GuardConfig"], re.M)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:4] == ["whole number", "`128`"] and "8" in cells[4] and "4096" in cells[4] and "median" in cells[5]
    assert "| number or `None` | `1800.0` | a number above 0; seconds |" in tables["TimeoutsConfig"]


def test_every_field_of_the_configuration_has_a_meaning(generator: Path) -> None:
    """A string below the field, as `ObjectiveConfig` and the other base classes have for what they share."""
    reference = importlib.import_module("config_reference")
    missing = [
        f"{section.cls.__name__}.{field.name}"
        for section in reference.sections()
        for field in dataclasses.fields(section.cls)
        if not reference.field_docstrings(section.cls).get(field.name)
    ]
    assert missing == [], "write what the field means in a string below it; see CONTRIBUTING.md"


def test_fields_that_a_page_names_exist(generator: Path) -> None:
    """Dotted paths in inline code, such as `training.schedule.learning_rate`, with or without a value."""
    reference = importlib.import_module("config_reference")
    fields = {
        re.sub(r"\.N\b", "", f"{path}.{field.name}")
        for section in reference.sections()
        for path in section.paths
        for field in dataclasses.fields(section.cls)
    }
    sections = {path.partition(".")[0] for path in fields if path.partition(".")[0]}
    named = re.compile(rf"`((?:{'|'.join(sorted(sections))})\.[a-z][a-z_0-9.\[\]]*[a-z_0-9])(?:[ =][^`]*)?`")
    is_file = re.compile(r"\.(json|jsonl|safetensors)$")
    unknown = []
    for page, path in PAGES.items():
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
        found = {re.sub(r"\[\]|\.\d+", "", name) for name in named.findall(text)}
        unknown += [f"{page}: {name}" for name in sorted(found - fields) if not is_file.search(name)]
    assert unknown == []


def test_the_python_page_has_names_that_can_be_imported_and_are_documented(generator: Path) -> None:
    """Every class and function of the page, and every public method of a class, has a docstring."""
    reference = importlib.import_module("python_reference")
    page = reference.page()
    undocumented = []
    for modules in reference.SECTIONS.values():
        for module, names in modules.items():
            for definition in reference.definitions(module, names):
                public = importlib.import_module(reference.public_module(module, definition.name))
                assert hasattr(public, definition.name)
                assert f"from {public.__name__} import {definition.name}\n" in page
                methods = reference.public_methods(definition) if isinstance(definition, ast.ClassDef) else []
                undocumented += [
                    f"{definition.name}.{node.name}" for node in (definition, *methods) if not ast.get_docstring(node)
                ]
    assert undocumented == []
    # Arguments, results and errors are lists; a line that is indented further continues an item.
    assert "**Returns**\n\nTrue when the last step is saved; False when a signal stopped" in page
    assert "- `step`: Step of the parameters; None for the one in `model`, or else the newest." in page


def test_the_command_page_has_every_option(generator: Path) -> None:
    reference = importlib.import_module("command_reference")
    tables = dict(re.findall(r"^## ([\w-]+)\n(.*?)(?=^## |\Z)", reference.page(), re.M | re.S))
    for name, parser in reference.parsers().items():
        options = {option for action in parser._actions for option in action.option_strings}
        assert options <= set(re.findall(r"`(-[\w-]+)[^`]*`", tables[name])), name
    assert len(tables) == len(command_modules)
