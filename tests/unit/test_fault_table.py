"""The table of faults names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_row_names_tests_that_exist() -> None:
    rows = re.findall(r"^\| ([FDS]\d+) \|.*\| (.*) \|$", (TESTS / "faults" / "README.md").read_text(), re.MULTILINE)
    expected = [*(f"F{n}" for n in range(1, 28)), *(f"D{n}" for n in range(1, 17) if n != 7)]
    assert [row for row, _ in rows] == [*expected, *(f"S{n}" for n in range(1, 6))]
    for row, tests in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert named, row
        for file, test in named:
            assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.MULTILINE), (row, file, test)
