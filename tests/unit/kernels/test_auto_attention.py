"""The choice of "auto": a supported backend for every request, and the documented one for the usual ones."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.errors import ConfigError
from t5x_like.kernels.attention import get_backend, register_backend
from t5x_like.kernels.attention_backend import AttentionRequest
from t5x_like.kernels.attention_masks import SequenceSplit
from t5x_like.kernels.auto_attention import CANDIDATES, choose
from t5x_like.kernels.reference_attention import ReferenceAttention

REQUESTS = st.builds(
    AttentionRequest,
    head_dim=st.sampled_from([36, 64, 256, 512]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    bias=st.sampled_from(["none", "relative", "content"]),
    softcap=st.sampled_from([None, 50.0]),
    dropout_rate=st.sampled_from([0.0, 0.1]),
    dynamic_window=st.booleans(),
    split=st.sampled_from([None, SequenceSplit("ring", 8), SequenceSplit("all_gather", 2)]),
    is_merged=st.booleans(),
    has_positions=st.booleans(),
    has_prefix=st.booleans(),
    q_length=st.sampled_from([0, 7, 128, 512, 8192]),
    kv_length=st.sampled_from([0, 7, 128, 512, 8192]),
)


@given(REQUESTS, st.sampled_from([None, "cpu", "gpu", "tpu", "unheard of"]))
@settings(max_examples=300, deadline=None)
def test_every_request_gets_a_backend_that_supports_it(request_: AttentionRequest, platform: str | None) -> None:
    choice = choose("auto", platform, request_)
    backend = get_backend(choice.backend)
    assert backend.supports(request_) is None
    assert backend.platform in (None, platform)
    if platform is None:
        assert backend.is_portable
    # The reasons belong to the candidates before it, in the order of the table.
    # Those of GPUs are portable, and so those of any platform.
    before = [candidate.backend for candidate in CANDIDATES.get(platform or "gpu", CANDIDATES["gpu"])]
    assert [name for name, _ in choice.passed_over] == before[: len(choice.passed_over)]
    assert all(reason for _, reason in choice.passed_over)


LONG = AttentionRequest(q_length=4096, kv_length=4096)


@pytest.mark.parametrize(
    ("platform", "changes", "expected"),
    [
        ("cpu", {}, "rowwise"),
        ("cpu", {"q_length": 64, "kv_length": 512}, "rowwise"),
        ("cpu", {"q_length": 127, "kv_length": 127}, "reference"),
        ("cpu", {"bias": "content"}, "reference"),
        (None, {}, "blockwise"),
        ("tpu", {}, "splash"),
        ("tpu", {"bias": "relative"}, "flash"),
        ("tpu", {"has_prefix": True}, "flash"),
        ("tpu", {"dynamic_window": True}, "flash"),
        ("tpu", {"dropout_rate": 0.1}, "blockwise"),
        ("tpu", {"split": SequenceSplit("ring", 16)}, "flash"),
        ("tpu", {"split": SequenceSplit("all_gather", 4), "bias": "relative"}, "flash"),
        # Chunks of 64 tokens are shorter than a tile.
        ("tpu", {"split": SequenceSplit("ring", 32)}, "blockwise"),
        ("tpu", {"split": SequenceSplit("ring", 4), "dropout_rate": 0.1}, "blockwise"),
        ("cpu", {"split": SequenceSplit("ring", 16)}, "blockwise"),
        ("tpu", {"q_length": 64, "kv_length": 64}, "reference"),
        ("gpu", {}, "blockwise"),
    ],
)
def test_documented_choices(platform: str | None, changes: dict[str, object], expected: str) -> None:
    assert choose("auto", platform, dataclasses.replace(LONG, **changes)).backend == expected  # type: ignore[arg-type]


def test_a_named_backend_is_never_replaced() -> None:
    assert choose("splash", "cpu", dataclasses.replace(LONG, bias="relative")).backend == "splash"


def test_no_backend_takes_the_name_of_the_choice() -> None:
    with pytest.raises(ConfigError, match="stands for a choice"):
        register_backend("auto", ReferenceAttention())
