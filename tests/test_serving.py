"""The server under OpenAI's own client: answers, streams, conversations, limits and errors."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mq_ao import MqAoError
from mq_ao.bench.serving import Load, measure
from mq_ao.bench.serving import served as bench_server
from mq_ao.models import MambaConfig, MambaLM, Sampling
from mq_ao.opening import Opened, open_any
from mq_ao.text import TokenizerCodec
from mq_ao.writing import until, written
from tests import test_tokenizer
from tests.conftest import CommandLine, error

REASON = 'needs pip install "mq-ao[serve]" openai httpx2'
pytest.importorskip("fastapi", reason=REASON)
openai = pytest.importorskip("openai", reason=REASON)
httpx = pytest.importorskip("httpx2", reason=REASON)

import uvicorn  # noqa: E402

from mq_ao.serving.app import Server  # noqa: E402
from mq_ao.serving.limits import Limits  # noqa: E402

words = test_tokenizer.words  # a fixture
LIMITS = Limits(batch=8, queue=64, prompt=400, new_tokens=100, body=4000)
PROMPT = "import os\nimport "


@contextmanager
def served(server: Server) -> Iterator[str]:
    """Its address, while it runs."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        running = uvicorn.Server(uvicorn.Config(server.app(), log_level="error"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        while not running.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def demo() -> Opened:
    return open_any("demo")


@pytest.fixture(scope="module")
def address(demo: Opened) -> Iterator[str]:
    with served(Server(demo, "demo", LIMITS)) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def alone(opened: Opened, prompt: str, count: int, sampling: Sampling | None = None, stop: str = "") -> str:
    tokens = [0, *prompt.encode()]
    return "".join(until(written(opened, tokens, count, sampling or Sampling()), [stop] if stop else []))


def test_completions(client: Any, demo: Opened) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=30, temperature=0)
    assert answer.choices[0].text == alone(demo, PROMPT, 30) and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT) + 1, 30)
    stopped = client.completions.create(
        model="demo", prompt=[PROMPT, "def f("], max_tokens=30, temperature=0, stop="\n"
    )
    wanted = [alone(demo, prompt, 30, stop="\n") for prompt in (PROMPT, "def f(")]
    assert [choice.text for choice in stopped.choices] == wanted
    assert [choice.finish_reason for choice in stopped.choices] == ["stop", "stop"]
    tokens = client.completions.create(
        model="demo", prompt=[0, *PROMPT.encode()], max_tokens=9, temperature=0, echo=True
    )
    assert tokens.choices[0].text == "\0" + PROMPT + alone(demo, PROMPT, 9)


def test_streams(client: Any, demo: Opened) -> None:
    options: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 25, "temperature": 0.8, "seed": 3}
    whole = client.completions.create(model="demo", **options).choices[0].text
    assert whole == alone(demo, PROMPT, 25, Sampling(0.8, seed=3))
    events = list(
        client.completions.create(model="demo", **options, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(event.choices[0].text for event in events if event.choices) == whole
    assert len(events) > 10 and events[-2].choices[0].finish_reason == "length"
    assert events[-1].usage.completion_tokens == 25
    other = client.completions.create(model="demo", **{**options, "seed": 4}).choices[0].text
    assert other != whole


def test_64_clients_at_once(client: Any, demo: Opened) -> None:
    prompts = [f"import os\n\n\ndef function_{index}(" for index in range(64)]

    def ask(index: int) -> str:
        options: dict[str, Any] = {"prompt": prompts[index], "max_tokens": 20, "temperature": 0}
        if index % 2:
            return client.completions.create(model="demo", **options).choices[0].text
        events = client.completions.create(model="demo", **options, stream=True)
        return "".join(event.choices[0].text for event in events)

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(ask, range(64)))
    for prompt, text in zip(prompts, found, strict=True):
        assert text == alone(demo, prompt, 20)


def test_conversations(words: Any) -> None:
    words.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}w1"
    words.eos_token = "<s>"
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=64, d_model=16, n_layer=2, d_state=4)).eval()
    opened = Opened("small", model, 64, None)
    opened.__dict__["codec"] = TokenizerCodec(words)
    with served(Server(opened, "small", LIMITS)) as found:
        asking = openai.OpenAI(base_url=f"{found}/v1", api_key="none", max_retries=0)
        messages = [{"role": "system", "content": "w2 w3"}, {"role": "user", "content": "w4"}]
        given: dict[str, Any] = {"model": "small", "messages": messages, "temperature": 0, "max_tokens": 6}
        answer = asking.chat.completions.create(**given)
        prompt = words.encode("w2 w3 w4 w1")
        wanted = "".join(written(opened, prompt, 6, Sampling()))
        assert answer.choices[0].message.content == wanted and answer.usage.prompt_tokens == 4
        events = list(asking.chat.completions.create(**given, stream=True))
        assert events[0].choices[0].delta.role == "assistant"
        assert "".join(event.choices[0].delta.content or "" for event in events) == wanted


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "x", "model": "other"}, 404, "there is no model 'other' here, but 'demo'"),
        ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ({"prompt": "x", "max_tokens": 101}, 400, "max_tokens: 101 is over 100, the most here"),
        ({"prompt": "x", "logprobs": 3}, 400, "logprobs: Extra inputs are not permitted"),
        ({"prompt": "x", "temperature": -0.5}, 400, "temperature: Input should be greater than or equal to 0"),
        ({"prompt": "x", "n": 2}, 400, "n: Input should be less than or equal to 1"),
        ({"prompt": [256]}, 400, "prompt: it has tokens outside of 0..255"),
        ({"prompt": []}, 400, "prompt: "),
        ({"prompt": "x" * 500}, 400, "prompt: it has 501 tokens, and 400 is the most"),
        ({"prompt": "x" * 5000}, 413, "the request is larger than 4000 bytes"),
        ({"prompt": ["a", "b"], "stream": True}, 400, "a stream answers one prompt"),
        ({}, 400, "prompt: Field required"),
        (b"{no json", 400, "the body is not understood: Invalid JSON"),
    ],
)
def test_bad_requests_are_errors_of_openais_shape(address: str, body: Any, status: int, message: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{address}/v1/completions", content=content)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"]


def test_chat_without_a_template(address: str) -> None:
    answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert answer.status_code == 400 and "has no chat template: use /v1/completions" in answer.text


def test_keys(demo: Opened) -> None:
    with served(Server(demo, "demo", LIMITS, key="secret")) as found:
        assert httpx.get(f"{found}/v1/models").status_code == 401
        asking = openai.OpenAI(base_url=f"{found}/v1", api_key="secret")
        assert asking.completions.create(model="demo", prompt="x", max_tokens=1).choices


def slow(demo: Opened, delay: float) -> Opened:
    model: Any = demo.run

    class Slow:
        carried = model.carried

        def __call__(self, ids: torch.Tensor, *states: Any) -> Any:
            time.sleep(delay)
            return model(ids, *states)

    opened = replace(demo, run=Slow())
    opened.__dict__["codec"] = demo.codec
    return opened


def wait_for(condition: Callable[[], bool]) -> None:
    until_then = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until_then, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_stops_the_work(demo: Opened, stream: bool) -> None:
    server = Server(slow(demo, 0.05), "demo", replace(LIMITS, new_tokens=10**6))
    with served(server) as found:
        body = {"prompt": "x", "max_tokens": 10**6, "stream": stream}
        if stream:
            with httpx.stream("POST", f"{found}/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{found}/v1/completions", json=body, timeout=0.7)
        wait_for(lambda: server.engine.load == (0, 0))


def test_too_many_and_too_long(demo: Opened) -> None:
    server = Server(slow(demo, 0.1), "demo", replace(LIMITS, batch=1, queue=1, seconds=2.0))
    with served(server) as found, ThreadPoolExecutor(2) as pool:
        body = {"prompt": "x", "max_tokens": 100}
        running = pool.submit(httpx.post, f"{found}/v1/completions", json=body, timeout=30)
        wait_for(lambda: server.engine.load == (1, 0))
        waiting = pool.submit(httpx.post, f"{found}/v1/completions", json=body, timeout=30)
        wait_for(lambda: server.engine.load == (1, 1))
        refused = httpx.post(f"{found}/v1/completions", json=body)
        assert refused.status_code == 429 and "try again later" in refused.json()["error"]["message"]
        for answer in (running.result(), waiting.result()):
            assert answer.status_code == 504 and "took over 2 s" in answer.json()["error"]["message"]


def test_what_cannot_be_served() -> None:
    opened = Opened("images.pte", object(), 256, None)  # type: ignore[arg-type]
    with pytest.raises(MqAoError, match=r"images.pte cannot be served: it keeps the state of one text alone"):
        Server(opened, "x")


def test_the_command(tmp_path: Path, mq_ao: CommandLine) -> None:
    command = [sys.executable, "-m", "mq_ao", "serve", "demo", "--port", "0", "--name", "mine"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        found = next(match[1] for line in lines if (match := re.search(r"mine at (http://127\.0\.0\.1:\d+/v1)", line)))
        asking = openai.OpenAI(base_url=found, api_key="none")
        assert (
            asking.completions.create(model="mine", prompt=PROMPT, max_tokens=3, temperature=0).choices[0].text == "sys"
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = mq_ao("serve", "demo", "--port", str(taken.getsockname()[1]))
        assert "cannot be listened at" in error(run)


def test_the_load_of_the_bench(address: str) -> None:
    cost = measure("demo", address.removeprefix("http://"), 256, Load(3, 4, prompt=5, beginning=40, rounds=1))
    figures = (cost.one, cost.all, cost.fresh, cost.kept)
    assert all(value > 0 for value in figures) and cost.to_dict()["load"]["clients"] == 3
    assert measure("demo", address.removeprefix("http://"), None, Load(1, 2, prompt=5, beginning=40, rounds=1)).one > 0
    with pytest.raises(MqAoError, match="no server of completions answers at localhost:9: "):
        measure("demo", "localhost:9", None, Load(1, 1, rounds=1))
    with pytest.raises(MqAoError, match="the server refuses: prompt: it has 409 tokens"):
        measure("demo", address.removeprefix("http://"), 256, Load(1, 1, beginning=401, rounds=1))
    with (
        pytest.raises(MqAoError, match="the server of no-such did not start: error: there is no folder no-such"),
        bench_server("no-such"),
    ):
        pass
