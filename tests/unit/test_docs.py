"""Examples of the documentation: Python parses and imports existing names, and commands have existing options.

`tests/integration/` executes them: `test_docs_python.py`, `test_docs_shell.py` and `test_plugins.py`.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import tomllib

import pytest
from helpers.docs_examples import LANGUAGES, NOT_EXECUTED, PAGES, REPOSITORY, Command, blocks, commands, indented_lines

from t5x_like.cli.arguments import configured_run
from t5x_like.cli.main import main, parse
from t5x_like.errors import EXIT_OK

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
