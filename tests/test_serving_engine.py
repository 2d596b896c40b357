"""Requests that are decoded as one batch get what each gets alone, whenever they come; and beginnings are read once."""

from __future__ import annotations

import functools
import queue
import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mq_ao
from mq_ao import MqAoError
from mq_ao.lowering.stateful_graph import StatefulGraph
from mq_ao.models import MambaConfig, MambaLM, Sampling
from mq_ao.models.generate import generate
from mq_ao.serving.engine import Engine, Job, QueueFull
from mq_ao.serving.prefixes import Prefixes
from tests.test_capture_states import captured, ids_of
from tests.test_capture_transformers import VOCAB

BYTES = 2**24


@functools.cache
def model_of(kind: str) -> Any:
    if kind == "hybrid":
        return StatefulGraph(captured("Bamba")[1])
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=VOCAB, d_model=16, n_layer=2, d_state=4)).eval()
    if kind == "integers":
        return mq_ao.quantize(model, [ids_of(4, 16)], "mambaquant-w8a8", backend="cuda").lower()
    return model


class Client:
    """What one request gets."""

    def __init__(self, prompt: Tensor, count: int, sampling: Sampling | None = None) -> None:
        self.received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.job = Job(prompt, count, sampling or Sampling(), self.received.put)

    def tokens(self) -> list[int]:
        found = []
        while (item := self.received.get(timeout=60)) is not None:
            if isinstance(item, Exception):
                raise item
            found.append(item)
        return found


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["floats", "integers", "hybrid"])
def test_everyone_gets_what_one_gets_alone(kind: str, data: st.DataObject) -> None:
    model = model_of(kind)
    engine = Engine(model, model.carried, data.draw(st.integers(1, 4)), 64, data.draw(st.sampled_from([0, BYTES])))
    start = ids_of(1, 30, seed=data.draw(st.integers(0, 1)))[0]
    clients = []
    for index in range(data.draw(st.integers(1, 8))):
        shared = data.draw(st.sampled_from([0, 20, 30]))
        prompt = torch.cat([start[:shared], ids_of(1, data.draw(st.integers(1, 9)), seed=index)[0]])
        sampling = Sampling(data.draw(st.sampled_from([0.0, 1.0])), seed=index, eos_token_id=5)
        client = Client(prompt, data.draw(st.integers(1, 12)), sampling)
        clients.append(client)
        engine.submit(client.job)
        if data.draw(st.booleans()):
            time.sleep(0.002)
    found = [client.tokens() for client in clients]
    engine.close()
    for client, tokens in zip(clients, found, strict=True):
        job = client.job
        wanted = generate(model, job.prompt[None], job.max_new_tokens, job.sampling)[0, len(job.prompt) :]
        assert tokens == wanted.tolist()


class Counting:
    """A model that tells what it was given; `gate` lets it run."""

    def __init__(self, model: Any) -> None:
        self.model, self.carried, self.read = model, model.carried, list[tuple[int, int]]()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, ids: Tensor, *states: Any) -> Any:
        self.gate.wait(60)
        self.read.append((ids.shape[0], ids.shape[1]))
        return self.model(ids, *states)


@pytest.mark.parametrize("kind", ["floats", "hybrid"])
def test_a_shared_beginning_is_read_once(kind: str) -> None:
    model = Counting(model_of(kind))
    engine = Engine(model, model.carried, 4, 8, BYTES)
    start = ids_of(1, 100)[0]
    for index in range(4):
        client = Client(torch.cat([start, ids_of(1, 3 + index, seed=index)[0]]), 1)
        engine.submit(client.job)
        client.tokens()
    engine.close()
    # The second prompt shows what both begin with; from the third on it is known.
    assert model.read == [(1, 103), (1, 100), (1, 4), (1, 5), (1, 6)]


def test_a_conversation_goes_on_from_its_last_turn() -> None:
    model = Counting(model_of("floats"))
    engine = Engine(model, model.carried, 4, 8, BYTES)
    prompt = ids_of(1, 40)[0]
    first = Client(prompt, 5)
    engine.submit(first.job)
    said = torch.tensor(first.tokens())
    model.read.clear()
    second = Client(torch.cat([prompt, said, ids_of(1, 3, seed=1)[0]]), 1)
    engine.submit(second.job)
    second.tokens()
    engine.close()
    # All but the last token of the answer were read.
    assert model.read == [(1, 4)]


def test_live_requests_are_one_batch() -> None:
    model = Counting(model_of("floats"))
    model.gate.clear()
    engine = Engine(model, model.carried, 3, 8, 0)
    clients = [Client(ids_of(1, 4, seed=index)[0], 30) for index in range(5)]
    for client in clients:
        engine.submit(client.job)
    model.gate.set()
    for client in clients:
        assert len(client.tokens()) == 30
    engine.close()
    rows = [batch for batch, length in model.read if length == 1]
    assert max(rows) == 3, "no more than are allowed at a time"
    assert len(rows) < 75, "150 tokens in fewer steps, since they share them"


@pytest.mark.parametrize("breaks", [False, True])
def test_prompts_that_wait_are_read_together(breaks: bool) -> None:
    model = Counting(model_of("floats"))
    model.gate.clear()

    def run(ids: Tensor, *states: Any) -> Any:
        if (ids == 7).any() and not states:
            raise RuntimeError("a prompt that breaks it")
        return model(ids, *states)

    engine = Engine(run, model.carried, 8, 8, 0)
    first = Client(torch.tensor([1, 2]), 3)
    engine.submit(first.job)
    while engine.load[1]:
        time.sleep(0.001)
    prompts = [torch.tensor(prompt) for prompt in ([1, 2, 3], [2, 3, 4], [3, 4, 7 if breaks else 5], [1, 2, 3, 4])]
    clients = [Client(prompt, 5) for prompt in prompts]
    for client in clients:
        engine.submit(client.job)
    model.gate.set()
    if breaks:
        with pytest.raises(RuntimeError, match="a prompt that breaks it"):
            clients.pop(2).tokens()
    for client in clients:
        wanted = generate(model.model, client.job.prompt[None], 5)[0, len(client.job.prompt) :]
        assert client.tokens() == wanted.tolist()
    engine.close()
    assert [read for read in model.read if read[1] > 2] == ([(1, 3)] * 2 if breaks else [(3, 3)]) + [(1, 4)]


def test_who_is_gone_is_not_served_on() -> None:
    model = Counting(model_of("floats"))
    engine = Engine(model, model.carried, 4, 8, 0)
    client, other = Client(ids_of(1, 4)[0], 10**6), Client(ids_of(1, 4, seed=1)[0], 50)
    engine.submit(client.job)
    client.received.get(timeout=60)
    client.job.cancelled.set()
    engine.submit(other.job)
    assert len(other.tokens()) == 50
    while engine.load[0]:
        time.sleep(0.001)
    engine.close()


def test_a_queue_has_an_end_and_a_closed_engine_takes_nothing() -> None:
    model = Counting(model_of("floats"))
    model.gate.clear()
    engine = Engine(model, model.carried, 1, 2, 0)
    running = Client(ids_of(1, 4)[0], 3)
    engine.submit(running.job)
    while engine.load[1]:
        time.sleep(0.001)
    waiting = [Client(ids_of(1, 4)[0], 3) for _ in range(2)]
    for client in waiting:
        engine.submit(client.job)
    with pytest.raises(QueueFull, match="2 requests are waiting already: try again later"):
        engine.submit(Client(ids_of(1, 4)[0], 3).job)
    closing = threading.Thread(target=engine.close)
    closing.start()
    for client in waiting:
        with pytest.raises(MqAoError, match="shutting down"):
            client.tokens()
    model.gate.set()
    assert len(running.tokens()) == 3, "what runs ends"
    closing.join(60)
    with pytest.raises(MqAoError, match="shutting down"):
        engine.submit(running.job)


def test_one_failure_is_one_request() -> None:
    model = model_of("floats")

    def fails(ids: Tensor, *states: Any) -> Any:
        if (ids == 7).any() and not states:
            raise RuntimeError("a prompt that breaks it")
        return model(ids, *states)

    engine = Engine(fails, model.carried, 4, 8, 0)
    good, bad = Client(torch.tensor([1, 2]), 20), Client(torch.tensor([7, 7]), 20)
    engine.submit(good.job)
    engine.submit(bad.job)
    with pytest.raises(RuntimeError, match="a prompt that breaks it"):
        bad.tokens()
    assert len(good.tokens()) == 20
    engine.close()


def test_prefixes_keep_to_their_memory() -> None:
    state = (torch.zeros(1000),)
    prefixes = Prefixes(10_000)
    prompts = [ids_of(1, 40, seed=index)[0] for index in range(4)]
    for prompt in prompts[:3]:
        prefixes.keep(prompt, state)
    assert [prefixes.longest(torch.cat([prompt, prompt[:1]])).length for prompt in prompts[:3]] == [0, 40, 40]
    prefixes.longest(torch.cat([prompts[1], prompts[1][:1]]))  # used again: the other goes
    prefixes.keep(prompts[3], state)
    assert [prefixes.longest(torch.cat([prompt, prompt[:1]])).length for prompt in prompts] == [0, 40, 0, 40]
    assert prefixes.longest(prompts[3]).length == 0, "the last token is left to be read"
    prefixes.keep(prompts[0][:3], state)
    prefixes.keep(prompts[0], (torch.zeros(10_000),))
    assert prefixes.longest(torch.cat([prompts[0], prompts[0][:1]])).length == 0, "too short, or too large"
