"""The server over HTTP: every request gets the right completion or a clear error, and every slot is freed."""

import asyncio
import contextlib
import dataclasses
import json
import random
import socket
import threading
import time

import jax
import numpy as np
import pytest
from helpers.config_examples import example
from helpers.model_examples import model, parameters

from t5x_like.config import TokenizerConfig
from t5x_like.data.chat.encoding import encode_rendered, load_template
from t5x_like.data.tokenizers.loading import load_tokenizer
from t5x_like.decoding.continuous_batching import Batcher, BatcherConfig
from t5x_like.decoding.engine import generate_tokens
from t5x_like.decoding.sampling import Sampling
from t5x_like.models.factory import bind_params
from t5x_like.program import build_program

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytestmark = pytest.mark.slow

SIZES = BatcherConfig(slots=4, max_prompt_length=40, max_new_tokens=24, steps_per_sync=4, prefill_batch_size=2)
TOKENIZER = load_tokenizer(TokenizerConfig(kind="bytes", num_sentinels=0), None)
ALLOWED = np.zeros(320, bool)
ALLOWED[1] = ALLOWED[3 + ord(" ") : 3 + ord("~")] = True


TEMPLATE = load_template(TOKENIZER, None)


def encode_chat(messages, tools):
    return encode_rendered(TOKENIZER, TEMPLATE.render(messages, tools, add_generation_prompt=True))[0]


@dataclasses.dataclass
class Server:
    url: str
    batcher: Batcher
    params: object

    def health(self):
        return httpx.get(f"{self.url}/health").json()

    def post(self, **fields):
        return httpx.post(f"{self.url}/v1/completions", json=fields, timeout=120)

    def text(self, prompt, max_tokens, **settings):
        """Return the completion of the batch engine."""
        answer = generate_tokens(
            self.batcher.program,
            self.batcher.params,
            [[int(token) for token in TOKENIZER.encode(prompt)]],
            allowed_V=ALLOWED,
            max_new_tokens=max_tokens,
            sampling=Sampling(**settings) if settings else None,
            seed=7,
        )[0]
        return TOKENIZER.decode(answer)

    def is_idle(self, seconds=20):
        until = time.time() + seconds
        while time.time() < until:
            counts = self.health()
            if not counts["taken"] and not counts["waiting"]:
                return True
            time.sleep(0.05)
        return False


@pytest.fixture(scope="module")
def server():
    from t5x_like.serving.app import make_app
    from t5x_like.serving.service import Service

    config = dataclasses.replace(model("decoder", "rope"), vocab_size=320)
    program = build_program(dataclasses.replace(example("causal_lm"), model=config), jax.devices()[:1])
    batcher = Batcher(program, parameters(config), allowed_V=ALLOWED, config=SIZES)
    batcher.warm_up()
    service = Service(
        model="tiny",
        batcher=batcher,
        encode=lambda text: [int(token) for token in TOKENIZER.encode(text)],
        tokenizer=TOKENIZER,
        vocab_size=320,
        start_id=config.decoder_start_token_id,
        encode_chat=encode_chat,
        max_waiting=256,
        timeout=60.0,
        max_body_bytes=20_000,
    )
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    http = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning"))
    threads = [
        threading.Thread(target=batcher.run, daemon=True),
        threading.Thread(target=http.run, kwargs={"sockets": [listening]}, daemon=True),
    ]
    for thread in threads:
        thread.start()
    running = Server(f"http://127.0.0.1:{listening.getsockname()[1]}", batcher, parameters(config))
    until = time.time() + 60
    while time.time() < until:
        with contextlib.suppress(httpx.ConnectError):
            running.health()
            break
    yield running
    http.should_exit = True
    batcher.close()
    for thread in threads:
        thread.join(timeout=30)


def test_completions_equal_those_of_the_batch_engine(server):
    for fields in ({"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}):
        settings = {name: value for name, value in fields.items() if fields["temperature"]}
        body = server.post(model="tiny", prompt="Once upon", max_tokens=20, seed=7, **fields).json()
        (choice,) = body["choices"]
        assert choice["text"] == server.text("Once upon", 20, **settings)
        assert body["usage"]["prompt_tokens"] == 9 and body["usage"]["completion_tokens"] <= 20
        assert choice["finish_reason"] == ("length" if body["usage"]["completion_tokens"] == 20 else "stop")


def test_token_ids_lists_and_several_completions(server):
    ids = [int(token) for token in TOKENIZER.encode("ab")]
    body = server.post(prompt=[ids, ids], max_tokens=5, temperature=0).json()
    assert [choice["text"] for choice in body["choices"]] == [server.text("ab", 5)] * 2
    drawn = server.post(prompt=["ab", "cd"], n=3, max_tokens=8, temperature=1.5, seed=3).json()["choices"]
    assert [choice["index"] for choice in drawn] == list(range(6)) and len({choice["text"] for choice in drawn}) > 3
    again = server.post(prompt=["ab", "cd"], n=3, max_tokens=8, temperature=1.5, seed=3).json()["choices"]
    assert drawn == again


def test_stop_string_ends_a_completion_and_frees_its_slot(server):
    whole = server.text("Once upon", 24)
    stop = whole[4:7]
    (choice,) = server.post(prompt="Once upon", max_tokens=24, temperature=0, stop=["#never#", stop]).json()["choices"]
    assert choice == {"index": 0, "text": whole[: whole.find(stop)], "logprobs": None, "finish_reason": "stop"}
    assert server.is_idle()


def test_stream_has_the_same_text(server):
    fields = {"prompt": ["Once upon", "ab"], "max_tokens": 24, "temperature": 0, "stream": True}
    fields["stream_options"] = {"include_usage": True}
    texts, finishes = ["", ""], [None, None]
    with httpx.stream("POST", f"{server.url}/v1/completions", json=fields, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    for event in map(json.loads, events[:-1]):
        for choice in event["choices"]:
            assert finishes[choice["index"]] is None
            texts[choice["index"]] += choice["text"]
            finishes[choice["index"]] = choice["finish_reason"]
    assert texts == [server.text(prompt, 24) for prompt in fields["prompt"]] and None not in finishes
    assert json.loads(events[-2])["usage"]["completion_tokens"] > 0 and len(events) > 6


def log_probabilities(server, tokens):
    """Return the log-softmax [length, V] of the model's logits, in double precision, of each token of a stream."""
    program = server.batcher.program
    stream = np.array([[0, *tokens[:-1], *[0] * (64 - len(tokens))]], np.int32)
    features = {"decoder_input_tokens": stream, "decoder_segment_ids": np.ones_like(stream)}
    if "forward" not in vars(server):
        server.forward = jax.jit(lambda features: bind_params(program.spec.graphdef, server.params)(features))
    logits = np.asarray(server.forward(features), np.float64)[0, : len(tokens)]
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def ids_of(text):
    return [int(token) for token in TOKENIZER.encode(text)]


def test_logprobs_and_echo_have_the_distribution_of_the_model(server):
    fields = {"prompt": "Once upon", "max_tokens": 12, "temperature": 1.3, "top_p": 0.8, "seed": 5}
    plain = server.post(**fields).json()["choices"][0]
    (choice,) = server.post(**fields, logprobs=3, echo=True).json()["choices"]
    assert choice["text"] == "Once upon" + plain["text"] and choice["finish_reason"] == plain["finish_reason"]
    logprobs = choice["logprobs"]
    tokens = ids_of(choice["text"])
    expected = log_probabilities(server, tokens)
    assert logprobs["tokens"] == list(choice["text"]) and logprobs["text_offset"] == list(range(len(tokens)))
    # The distribution before the temperature, over all tokens, also those that may not be chosen.
    at_token = expected[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(logprobs["token_logprobs"], at_token, atol=2e-4)
    for row, (token, top) in enumerate(zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)):
        assert top[token] == logprobs["token_logprobs"][row]
        best = sorted(top.values(), reverse=True)[:3]
        np.testing.assert_allclose(best, np.sort(expected[row])[::-1][: len(best)], atol=2e-4)
    # A prompt alone is scored without a new token, and its text alone is returned without the model.
    (alone,) = server.post(prompt="Once upon", max_tokens=0, logprobs=3, echo=True).json()["choices"]
    assert alone["text"] == "Once upon" and alone["finish_reason"] == "length"
    assert alone["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:9]
    (echoed,) = server.post(prompt="Once upon", max_tokens=0, echo=True).json()["choices"]
    assert echoed == {"index": 0, "text": "Once upon", "logprobs": None, "finish_reason": "length"}
    assert server.is_idle()


def test_start_token_of_ids_is_not_predicted_and_not_repeated(server):
    fields = {"max_tokens": 4, "temperature": 0, "logprobs": 1, "echo": True}
    (text,) = server.post(prompt="ab", **fields).json()["choices"]
    (ids,) = server.post(prompt=[0, *ids_of("ab")], **fields).json()["choices"]
    assert ids["text"] == text["text"]
    assert ids["logprobs"]["token_logprobs"] == [None, *text["logprobs"]["token_logprobs"]]
    assert ids["logprobs"]["top_logprobs"][0] is None and ids["logprobs"]["tokens"][0] == "<pad>"


def test_streamed_logprobs_are_those_of_the_whole_response(server):
    whole = server.text("Once upon", 24)
    for stop in ([], [whole[7:9]]):
        fields = {"prompt": "Once upon", "max_tokens": 24, "temperature": 0, "logprobs": 2, "echo": True, "stop": stop}
        (choice,) = server.post(**fields).json()["choices"]
        text, logprobs = "", {name: [] for name in choice["logprobs"]}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=fields | {"stream": True}, timeout=60) as lines:
            events = [json.loads(line[6:]) for line in lines.iter_lines() if line.startswith("data: {")]
        for event in events:
            (part,) = event["choices"]
            assert all(len(text) <= at < len(text + part["text"]) for at in part["logprobs"]["text_offset"])
            text += part["text"]
            for name in logprobs:
                logprobs[name] += part["logprobs"][name]
        assert text == choice["text"] and logprobs == choice["logprobs"] and len(events) > 2 - len(stop)
        assert "".join(logprobs["tokens"]) == text


def test_tokens_of_a_text_for_clients_without_the_tokenizer(server):
    def ask(path, **fields):
        return httpx.post(f"{server.url}/{path}", json=fields, timeout=60)

    tokens = ask("tokenize", prompt="Once </s>", add_special_tokens=False).json()["tokens"]
    assert tokens == ids_of("Once </s>") and ask("detokenize", tokens=tokens).json()["prompt"] == "Once </s>"
    names = httpx.get(f"{server.url}/tokenizer_info").json()
    assert [ask("tokenize", prompt=names[role]).json()["tokens"] for role in ("eos_token", "bos_token")] == [[1], [0]]
    assert "0 to 319" in ask("detokenize", tokens=[320]).json()["error"]["message"]
    assert "expected a text" in ask("tokenize", prompt=3).json()["error"]["message"]


MESSAGES = [{"role": "user", "content": "Once"}]
DIALOGUE = "user: Once\nassistant: "


def test_a_dialogue_is_laid_out_by_the_chat_template(server):
    body = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "seed": 7}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == server.text(DIALOGUE, 12)
    assert answer["usage"]["prompt_tokens"] == len(DIALOGUE)
    for wrong, status, message in (
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"content": "a"}]}, 400, "without a text as its role"),
        ({"messages": [{"role": "user"}]}, 400, "refuses the messages"),
        ({"messages": MESSAGES, "logprobs": 2}, 400, "expected true or false"),
        ({"messages": MESSAGES, "top_logprobs": 2}, 400, "without logprobs"),
        ({"messages": MESSAGES, "prompt": "a"}, 400, "unknown field 'prompt'"),
        ({"messages": MESSAGES, "model": "gpt"}, 404, "no model 'gpt'"),
    ):
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=wrong, timeout=60)
        assert refused.status_code == status and message in refused.json()["error"]["message"], wrong


@pytest.mark.external
def test_the_official_client_chats_streams_and_gets_errors(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.models.retrieve("gpt")
    wanted = server.text(DIALOGUE, 12)
    fields = {"model": "tiny", "messages": MESSAGES, "temperature": 0}
    answer = client.chat.completions.create(max_completion_tokens=12, **fields)
    assert answer.choices[0].message.content == wanted
    events = list(client.chat.completions.create(max_tokens=12, stream=True, **fields))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content for event in events) == wanted
    assert events[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    text = client.completions.create(model="tiny", prompt="Once upon", max_tokens=8, temperature=0)
    assert text.choices[0].text == server.text("Once upon", 8)
    chat = client.chat.completions.create(max_tokens=12, logprobs=True, top_logprobs=2, **fields).choices[0]
    entries = chat.logprobs.content
    assert [entry.token for entry in entries] == list(wanted) and all(len(entry.top_logprobs) == 2 for entry in entries)
    assert [bytes(entry.bytes) for entry in entries] == [token.encode() for token in wanted]
    expected = log_probabilities(server, ids_of(DIALOGUE + wanted))[len(DIALOGUE) :]
    at_token = expected[np.arange(len(wanted)), ids_of(wanted)]
    np.testing.assert_allclose([entry.logprob for entry in entries], at_token, atol=2e-4)
    np.testing.assert_allclose([entry.top_logprobs[0].logprob for entry in entries], expected.max(-1), atol=2e-4)
    events = list(client.chat.completions.create(max_tokens=12, logprobs=True, top_logprobs=2, stream=True, **fields))
    assert [entry for event in events for entry in event.choices[0].logprobs.content] == entries
    text = client.completions.create(
        model="tiny", prompt="Once upon", max_tokens=2, temperature=0, logprobs=1, echo=True
    )
    logprobs = text.choices[0].logprobs
    assert logprobs.tokens == list(text.choices[0].text) and logprobs.text_offset == list(range(11))
    assert [list(top.values())[0] for top in logprobs.top_logprobs] == [
        max(top.values()) for top in logprobs.top_logprobs
    ]
    (alone,) = client.completions.create(model="tiny", prompt="Once upon", max_tokens=0, logprobs=0, echo=True).choices
    assert alone.logprobs.token_logprobs == logprobs.token_logprobs[:9]
    with pytest.raises(openai.BadRequestError, match="expected a whole number from 1 to 24"):
        client.chat.completions.create(max_tokens=25, **fields)


REFUSED = [
    ({"prompt": "a" * 41}, 400, "41 tokens"),
    ({"prompt": ""}, 400, "0 tokens"),
    ({}, 400, "expected a text"),
    ({"prompt": [3, 320]}, 400, "0 to 319"),
    ({"prompt": [3, True]}, 400, "expected a text"),
    ({"prompt": "a\ud800"}, 400, "not valid JSON"),
    ({"prompt": "a", "max_tokens": 25}, 400, "from 1 to 24"),
    ({"prompt": "a", "max_tokens": 0}, 400, "from 1 to 24"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, 400, "expected a number"),
    ({"prompt": "a", "top_p": 0}, 400, "top_p"),
    ({"prompt": "a", "n": 129}, 400, "from 1 to 128"),
    ({"prompt": ["a"] * 100, "n": 2}, 400, "128 in all"),
    ({"prompt": "a", "stop": [""]}, 400, "stop"),
    ({"prompt": "a", "logprobs": 21}, 400, "from 0 to 20"),
    ({"prompt": "a", "logprobs": True}, 400, "from 0 to 20"),
    ({"prompt": "a", "max_tokens": -1, "echo": True}, 400, "from 0 to 24"),
    ({"prompt": "a", "max_token": 5}, 400, "unknown field 'max_token'"),
    ({"prompt": "a", "\ud800": 5}, 400, "not valid JSON"),
    ({"prompt": "a", "n": "b"}, 400, "whole number"),
    ({"prompt": "a", "model": "gpt"}, 404, "no model 'gpt'"),
]


@pytest.mark.parametrize(("fields", "status", "message"), REFUSED)
def test_invalid_request_is_refused_with_the_reason(server, fields, status, message):
    response = httpx.post(f"{server.url}/v1/completions", content=json.dumps(fields).encode(), timeout=30)
    assert response.status_code == status and message in response.json()["error"]["message"]
    assert server.is_idle()


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"{", 400), (b"[]", 400), (b"\xff{}", 400), (b"[" * 15_000, 400), (b'{"prompt": NaN}', 400)]
    + [(b'{"prompt": "' + b"a" * 30_000 + b'"}', 413)],
)
def test_malformed_body_is_refused(server, body, status):
    response = httpx.post(f"{server.url}/v1/completions", content=body, timeout=30)
    assert response.status_code == status and response.json()["error"]["message"]


def test_other_routes(server):
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    assert "error" in httpx.get(f"{server.url}/v1/nothing").json()


def test_200_simultaneous_requests_are_answered(server):
    """200 requests at once: complete, streamed, cancelled by the client, and invalid ones."""
    draw = random.Random(3)
    plan = []
    for number in range(200):
        kind = draw.choice(["whole", "whole", "stream", "leaves", "leaves streaming", "oversized", "broken"])
        prompt = "".join(draw.choice("abcdefgh ") for _ in range(draw.randrange(1, 40)))
        plan.append((kind, prompt, draw.randrange(1, 25), number))

    async def one(client, kind, prompt, max_tokens, number):
        fields = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        url = f"{server.url}/v1/completions"
        if kind == "oversized":
            return (await client.post(url, json=fields | {"prompt": prompt * 60})).status_code
        if kind == "broken":
            return (await client.post(url, content=json.dumps(fields)[: number % 20 + 1].encode())).status_code
        if kind == "leaves":
            try:
                await asyncio.wait_for(client.post(url, json=fields | {"max_tokens": 24}), timeout=0.02 * (number % 9))
            except TimeoutError:
                return None
            return None
        if kind == "whole":
            response = await client.post(url, json=fields)
            return response.status_code, response.json()["choices"][0]["text"]
        text = ""
        async with client.stream("POST", url, json=fields | {"stream": True}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if kind == "leaves streaming":
                        return None
        return response.status_code, text

    async def load():
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            return await asyncio.gather(*(one(client, *each) for each in plan))

    results = asyncio.run(load())
    whole = [each for each in plan if each[0] in ("whole", "stream")]
    answers = generate_tokens(
        server.batcher.program,
        server.batcher.params,
        [[int(token) for token in TOKENIZER.encode(prompt)] for _, prompt, _, _ in whole],
        allowed_V=ALLOWED,
        max_new_tokens=24,
    )
    expected = {
        number: (200, TOKENIZER.decode(answer[:max_tokens]))
        for (_, _, max_tokens, number), answer in zip(whole, answers, strict=True)
    }
    for (kind, _, _, number), result in zip(plan, results, strict=True):
        if kind in ("whole", "stream"):
            assert result == expected[number], kind
        elif kind in ("oversized", "broken"):
            assert result == 400, kind
    assert server.is_idle(), "a slot was not freed"
    assert server.health()["status"] == "ok"


def test_full_queue_refuses_requests(server):
    fields = {"prompt": ["a"] * 100, "max_tokens": 24, "temperature": 0}

    async def flood():
        async with httpx.AsyncClient(timeout=120) as client:
            sent = [client.post(f"{server.url}/v1/completions", json=fields) for _ in range(4)]
            return [response.status_code for response in await asyncio.gather(*sent)]

    statuses = asyncio.run(flood())
    assert 429 in statuses and 200 in statuses and set(statuses) <= {200, 429}
    assert server.is_idle()
