"""Names of stores: a record of digests that others may have written never decides more than a recomputation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from t5x_like.config import CausalLM, CorpusConfig, DataConfig, TokenizerConfig
from t5x_like.data.store.store_paths import store_paths


@pytest.mark.parametrize("record", ["[]", "null", "3", '{{"{0}": 3}}', '{{"{0}": []}}', '{{"{0}": [1, 2, 3]}}', "{{"])
def test_record_of_digests_that_is_not_one_is_made_again(tmp_path: Path, record: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text")
    data = DataConfig(
        layout="causal_lm",
        mixture=(CausalLM(),),
        inputs_length=0,
        targets_length=8,
        corpus=CorpusConfig(files=(str(file),)),
        tokenizer=TokenizerConfig(kind="bytes"),
        store_dir=str(tmp_path / "stores"),
    )
    other = dataclasses.replace(data, store_dir=str(tmp_path / "other"))
    (expected,) = store_paths(other)
    digests = (tmp_path / "other" / "source_digests.json").read_bytes()
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores" / "source_digests.json").write_text(record.format(json.dumps(str(file))[1:-1]))
    (found,) = store_paths(data)
    assert found.name == expected.name
    assert (tmp_path / "stores" / "source_digests.json").read_bytes() == digests
