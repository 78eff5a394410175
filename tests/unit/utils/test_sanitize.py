"""No text of others reaches a terminal or a log with control sequences in it, whichever way it is written."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from pathlib import Path

import pytest
from helpers.config_examples import example
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import t5x_like
from t5x_like.cli.main import main
from t5x_like.config.serialization import to_dict
from t5x_like.monitoring.logging_setup import logging_to
from t5x_like.utils.console import Console
from t5x_like.utils.sanitize import sanitize_tracebacks

ESCAPE = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e"
ROOT = Path(t5x_like.__file__).parent


def assert_clean(text: str) -> None:
    assert "owned" in text, "the message names what it found"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def _config(folder: Path, change: dict[str, object]) -> str:
    document = to_dict(example())
    for path, value in change.items():
        *parents, last = path.split("/")
        node = document
        for part in parents:
            node = node[part]
        node[last] = value
    path = folder / "config.json"
    path.write_text(json.dumps(document))
    return str(path)


CONFIGS: dict[str, dict[str, object]] = {
    "unknown key": {f"model/{ESCAPE}": 1},
    "value of a choice": {"data/layout": ESCAPE},
    "kind of an objective": {"data/mixture": [{"kind": ESCAPE}]},
    "name of a module": {"plugins": [ESCAPE]},
    "item of a list": {"sharding/parameter_rules": [ESCAPE]},
    "key of a corpus": {"data/corpus": {ESCAPE: 1}},
    "schema version": {"schema_version": ESCAPE},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_configuration_of_another_author(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object]
) -> None:
    assert main(["train", _config(tmp_path, change), "--print-config"]) in (2, 3)
    assert_clean(capsys.readouterr().err)


ARGUMENTS = [
    ["train", ESCAPE],
    ["train", "smoke", f"--{ESCAPE}", "1"],
    ["train", "smoke", f"--training.{ESCAPE}", "1"],
    ["train", "smoke", "--training.seed", ESCAPE],
    ["serve", ESCAPE],
    ["eval", ESCAPE],
    ["generate", ESCAPE, "--prompt", "x"],
    ["convert", "--from", "hf", ESCAPE, "out"],
    ["plan", "smoke", "--devices", ESCAPE],
    ["compare", ESCAPE, ESCAPE],
    ["launch", "slurm", ESCAPE],
    [ESCAPE],
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda words: " ".join(words).split(ESCAPE)[0])
def test_argument_in_a_message(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    shown = capsys.readouterr()
    assert code == 2
    assert_clean(shown.out + shown.err)


def test_files_of_another_author(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(f'{{"{json.dumps(ESCAPE)[1:-1]}": 1, "model_type": "owned{ESCAPE!r}"}}')
    for command in (["eval", str(tmp_path)], ["convert", "--from", "hf", str(tmp_path), str(tmp_path / ESCAPE)]):
        assert main(command) == 2
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({ESCAPE: 1}))
    assert main(["prepare", "smoke", "--data.corpus.files", str(corpus), "--data.store-dir", str(tmp_path / "s")]) == 2
    assert_clean(capsys.readouterr().err)


def test_tables_logs_and_tracebacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=False, width=200)
    table = Table(ESCAPE)
    table.add_row(Text(ESCAPE))
    console.print(table, Panel(ESCAPE, title=ESCAPE), ESCAPE)
    with logging_to(tmp_path / "log.txt", console):
        try:
            raise ValueError(ESCAPE)
        except ValueError:
            logging.getLogger(ESCAPE).exception("%s", ESCAPE)
    assert_clean(shown.getvalue())
    assert_clean((tmp_path / "log.txt").read_text())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    sanitize_tracebacks()
    sys.excepthook(ValueError, ValueError(ESCAPE), None)
    assert_clean(capsys.readouterr().err)


def test_styles_of_the_console_itself_remain() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="standard")
    console.print(Text(ESCAPE, style="red"))
    assert shown.getvalue().startswith("\x1b[31m") and "\x1b]0" not in shown.getvalue()


# The text of a prediction, a script and a configuration that are piped into a file must be exact.
EXACT = {"decoding/generate_files.py": 2, "cli/launch.py": 1, "cli/train.py": 1, "launching/restart_loop.py": 1}


def test_every_message_is_written_by_the_sanitizing_functions() -> None:
    for path in ROOT.rglob("*.py"):
        name, source = path.relative_to(ROOT).as_posix(), path.read_text()
        if name not in ("utils/sanitize.py", "utils/console.py"):
            assert len(re.findall(r"(?<![\w.])print\(", source)) == EXACT.get(name, 0), name
            assert not re.search(r"rich\.console import .*\bConsole\b|std(out|err)\.write\(", source), name
