"""What `mq-ao serve` gives: many clients against one after the other, and the first token behind a kept beginning."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mq_ao.errors import MqAoError

Prompt = list[int] | list[str]
"""Tokens, or words."""


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Attributes:
        clients: that ask at a time.
        tokens: of each answer.
        prompt: tokens of each prompt.
        beginning: tokens that prompts begin with in common, for the first token.
        rounds: of everything; medians are reported.
    """

    clients: int = 16
    tokens: int = 64
    prompt: int = 16
    beginning: int = 1000
    rounds: int = 3


@dataclass(frozen=True)
class ServingCost:
    """What was measured of one model.

    Attributes:
        model: that was served.
        load: what was asked.
        one: tokens a second of one client after the other.
        all: ... of all clients at a time.
        fresh: seconds to the first token of a prompt that begins with something new.
        kept: ... with a beginning that the server has read before.
    """

    model: str
    load: Load
    one: float
    all: float
    fresh: float
    kept: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {**asdict(self), "throughput_ratio": self.all / self.one, "first_token_ratio": self.fresh / self.kept}


@contextmanager
def served(source: str, *options: str) -> Iterator[str]:
    """A server of its own process, at a free port; gives the host and port.

    Raises:
        MqAoError: it did not start; with what it said.
    """
    command = [sys.executable, "-m", "mq_ao", "serve", source, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = ""
        for line in process.stderr:
            said = line.strip() or said
            if " at http://" in line:
                break
        else:
            raise MqAoError(f"the server of {source} did not start: {said}")
        yield urlsplit(line.split(" at ")[1].strip()).netloc
    finally:
        process.terminate()
        process.wait(timeout=60)


WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not"]
"""Prompts for servers that take text alone: common words, which are mostly a token each."""


def measure(source: str, address: str, vocab_size: int | None, load: Load) -> ServingCost:
    """Asks a server for answers, in rounds.

    Args:
        source: name of the model.
        address: host and port.
        vocab_size: prompts are random tokens below it; None: so many words.
        load: what to ask.

    Raises:
        MqAoError: an answer is an error.
    """
    draw = random.Random(0)

    def prompt(length: int) -> Prompt:
        if vocab_size is None:
            return draw.choices(WORDS, k=length)
        return [draw.randrange(1, vocab_size) for _ in range(length)]

    with ThreadPoolExecutor(load.clients) as pool:
        clients = [HTTPConnection(address, timeout=600) for _ in range(load.clients)]
        one, many, fresh, kept = list[float](), list[float](), list[float](), list[float]()
        _ask(clients[0], prompt(load.prompt), 2)  # what is done once
        for _ in range(load.rounds):
            prompts = [prompt(load.prompt) for _ in clients]
            started = time.perf_counter()
            count = sum(_ask(clients[0], each, load.tokens) for each in prompts)
            one.append(count / (time.perf_counter() - started))
            _close(clients)
            started = time.perf_counter()
            count = sum(pool.map(_ask, clients, prompts, [load.tokens] * load.clients))
            many.append(count / (time.perf_counter() - started))
            _close(clients)
            beginning = prompt(load.beginning)
            # A beginning is known to be one when a second prompt has it, and is kept from there on.
            times = [_first(clients[0], [*beginning, *prompt(8)]) for _ in range(4)]
            fresh.append(times[0])
            kept.append(min(times[2:]))
        _close(clients)
    medians = map(statistics.median, (one, many, fresh, kept))
    return ServingCost(Path(source).name, load, *medians)


def _close(clients: list[HTTPConnection]) -> None:
    """They connect again when they are used: servers close what is idle for some seconds."""
    for client in clients:
        client.close()


def _first(client: HTTPConnection, prompt: Prompt) -> float:
    started = time.perf_counter()
    _ask(client, prompt, 1)
    return time.perf_counter() - started


def _ask(client: HTTPConnection, prompt: Prompt, tokens: int) -> int:
    """Tokens of an answer."""
    given = " ".join(map(str, prompt)) if isinstance(prompt[0], str) else prompt
    body = {"prompt": given, "max_tokens": tokens, "temperature": 0}
    try:
        client.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = json.loads(client.getresponse().read())
    except (OSError, HTTPException, ValueError) as error:
        raise MqAoError(f"no server of completions answers at {client.host}:{client.port}: {error}") from error
    if "error" in answer:
        raise MqAoError(f"the server refuses: {answer['error']['message']}")
    return answer["usage"]["completion_tokens"]
