"""`t5x-like serve`: when it prints its address, everything that requests can need is compiled."""

import json

import jax
import pytest
from helpers.small_run import small_run

from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CausalLM, CheckpointConfig
from t5x_like.config.serialization import to_json
from t5x_like.data.store.prepare import open_stores, prepare
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.program import build_program

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytestmark = pytest.mark.slow

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: COMPILED.append(event) if "backend_compile" in event else None
)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """Return a run of a decoder with random parameters."""
    root = tmp_path_factory.mktemp("run")
    run = small_run(root, "causal_lm", (CausalLM(),), lengths=(16, 16), training={"num_train_steps": 1})
    prepare(run.data, report=lambda line: None)
    manager = CheckpointManager(root / "checkpoints", CheckpointConfig())
    fingerprint = TrainingStream(open_stores(run.data), run.data, 8).fingerprint
    manager.save(1, build_program(run, jax.devices()).init(), {"data": {"rows": 0, "fingerprint": fingerprint}})
    manager.close()
    (root / "config.json").write_text(to_json(run))
    return root


def test_no_request_after_the_printed_address_compiles_a_program(run_directory):
    from helpers.served_model import served

    with served(run_directory, slots=4, prompt_length=40, max_new_tokens=8) as address:
        assert COMPILED, "the listener hears nothing"
        COMPILED.clear()

        def ask(path="completions", **fields):
            answer = httpx.post(f"{address}/v1/{path}", json={"max_tokens": 8} | fields, timeout=120)
            assert answer.status_code == 200, answer.text
            return answer.json()

        first = ask(prompt="a")
        assert first["choices"][0]["finish_reason"] and not COMPILED
        for length in (1, 15, 16, 17, 32, 33, 40):
            ask(prompt="b" * length, temperature=0)
            ask(prompt=["b" * length, "c"], temperature=0.7, top_p=0.8, logprobs=2, echo=True)
            ask(prompt="b" * length, max_tokens=0, logprobs=0, echo=True)
        ask(prompt="a", n=5, top_k=3, min_p=0.1, repetition_penalty=1.2)
        text = ask(prompt="a", temperature=0)["choices"][0]["text"]
        ask(prompt="a", temperature=0, stop=text[:2] or "x")
        ask("chat/completions", messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=20)
        for fields in ({}, {"logprobs": 1}):
            body = {"prompt": "a" * 20, "max_tokens": 8, "stream": True, **fields}
            with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as lines:
                events = [json.loads(line[6:]) for line in lines.iter_lines() if line.startswith("data: {")]
            assert events
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60):
            pass  # A client that leaves.
        ask(prompt="a")
        assert not COMPILED
