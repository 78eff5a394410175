"""The vocabulary file of T5, which this repository does not contain: `../shared/data`, or the path in T5_VOCABULARY."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NAME = "t5_cc_all_32000_100extra.sentencepiece.model"
PATH = Path(os.environ.get("T5_VOCABULARY") or Path(__file__).parents[3] / "shared" / "data" / NAME)

needs_t5_vocabulary = pytest.mark.skipif(
    not PATH.is_file(), reason=f"found no {PATH}: set T5_VOCABULARY to the path of T5's sentencepiece.model"
)
