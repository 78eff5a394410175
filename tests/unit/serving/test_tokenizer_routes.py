"""The routes of a tokenizer answer every body, and one that does not arrive, without an error of the server."""

import asyncio
import json
import threading
import types

import pytest

pytest.importorskip("starlette")

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect

from t5x_like.config import TokenizerConfig
from t5x_like.data.tokenizers.loading import load_tokenizer
from t5x_like.serving import openai_schema
from t5x_like.serving.response_forms import CLIENT_CLOSED_REQUEST
from t5x_like.serving.text_logprobs import token_texts
from t5x_like.serving.tokenizer_routes import tokenizer_routes

TOKENIZER = load_tokenizer(TokenizerConfig(kind="bytes", num_sentinels=0), None)


def post(path, body, **fields):
    """Return the status and the body of the response to a POST; a body of None never arrives."""

    async def read_body(http):
        if body is None:
            raise ClientDisconnect
        return body

    batcher = types.SimpleNamespace(config=types.SimpleNamespace(max_prompt_length=40))
    service = types.SimpleNamespace(
        tokenizer=TOKENIZER, token_text=token_texts(TOKENIZER), start_id=0, vocab_size=300, batcher=batcher
    )
    service.decode = lambda tokens: TOKENIZER.decode(list(tokens))
    vars(service).update(fields)
    app = Starlette(routes=tokenizer_routes(service, read_body))
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_a_client_that_disconnects_is_no_error(path):
    assert post(path, None) == (CLIENT_CLOSED_REQUEST, b"")


def test_tokens_and_text():
    status, answer = post("/tokenize", b'{"prompt": "ab"}')
    assert status == 200
    status, answer = post("/detokenize", json.dumps({"tokens": json.loads(answer)["tokens"]}).encode())
    assert (status, json.loads(answer)) == (200, {"prompt": "ab"})


def test_text_is_decoded_outside_of_the_event_loop():
    threads = []
    post("/detokenize", b'{"tokens": [5]}', decode=lambda tokens: threads.append(threading.get_ident()) or "")
    assert threads and threads[0] != threading.get_ident()


def test_a_long_list_is_refused_at_its_first_wrong_element(monkeypatch):
    found = []

    def validated(body, schema):
        try:
            return schema.model_validate_json(body)
        except ValueError as error:
            found.append(error.error_count())
            raise openai_schema.BadRequest("wrong") from None

    monkeypatch.setattr("t5x_like.serving.tokenizer_routes.validated", validated)
    status, _ = post("/detokenize", b'{"tokens": [' + b'"",' * 1000 + b"1]}")
    assert (status, found) == (400, [1])
