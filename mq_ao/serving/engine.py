"""Decodes all live requests as one batch: kernels take more rows nearly free, and a new request joins at any step."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mq_ao.errors import MqAoError, first_line
from mq_ao.models.generate import Sampling
from mq_ao.models.states import States, Value
from mq_ao.serving.model_thread import ModelThread
from mq_ao.serving.prefixes import Prefixes

logger = logging.getLogger(__name__)

_BETWEEN_STEPS = 256
"""Tokens of prompts that are read between two steps, or one prompt: whoever is being served does not wait for all who
come, and few who come together are soon served together."""


class QueueFull(MqAoError):
    """There are as many waiting requests as are allowed."""


@dataclass
class Job:
    """A request on its way.

    Attributes:
        prompt: tokens, (length,) int64.
        max_new_tokens: how many it gets at most.
        sampling: how they are chosen, and with which it ends.
        emit: called with each token, at the end with None, and with an error where there is one; from the engine's
            thread, so it must not take long.
        cancelled: set by whoever does not want it any more.
    """

    prompt: Tensor
    max_new_tokens: int
    sampling: Sampling
    emit: Callable[[int | Exception | None], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class _Sequence:
    """A job that is being decoded."""

    def __init__(self, job: Job) -> None:
        self.job, self.tokens = job, list[int]()
        self._generator: torch.Generator | None = None

    def choose(self, logits: Tensor) -> int:
        """The next token, from logits (1, vocab_size)."""
        self._generator = self._generator or self.job.sampling.generator(logits.device)
        return int(self.job.sampling.choose(logits, self._generator))

    def take(self, token: int) -> bool:
        """Gives the next token out; returns whether the sequence goes on."""
        self.tokens.append(token)
        self.job.emit(token)
        return token not in self.job.sampling.ends and len(self.tokens) < self.job.max_new_tokens

    @property
    def read(self) -> Tensor:
        """The tokens that its states stand for: all but the last."""
        return torch.cat([self.job.prompt, torch.tensor(self.tokens[:-1], dtype=torch.int64)])


class Engine:
    """Runs one model for many requests.

    Args:
        run: model or program, `(input_ids, *states) -> (logits, *states)`; its `prefill` is used where it has one.
        states: what it carries. Keys and values of attention keep their rows apart: each sequence is a call there.
        max_batch: sequences that are decoded at a time.
        max_queue: requests that may wait besides.
        prefix_bytes: of states that are kept for beginnings of prompts.
        thread: where it runs, until it is closed: the one that loaded the model, if that is known.
    """

    def __init__(
        self,
        run: Any,
        states: States,
        max_batch: int,
        max_queue: int,
        prefix_bytes: int,
        thread: ModelThread | None = None,
    ) -> None:
        self._step, self._states = getattr(run, "step", run), states
        self._prefill = getattr(run, "prefill", run)
        self._joins = not any(item.grows for item in states.items)
        self._max_batch, self._max_queue = max_batch, max_queue
        self._prefixes = Prefixes(prefix_bytes)
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._live: list[_Sequence] = []
        self._carried: list[tuple[Value, ...]] = []
        """States of all live sequences together, or one for each where they do not join."""
        self._running = (thread or ModelThread()).submit(self._run)

    @property
    def load(self) -> tuple[int, int]:
        """Sequences that are decoded, and requests that wait."""
        with self._changed:
            return len(self._live), len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queues a job.

        Raises:
            QueueFull: too many wait.
            MqAoError: the engine was closed.
        """
        with self._changed:
            if self._closing:
                raise MqAoError("the server is shutting down.")
            if len(self._waiting) >= self._max_queue:
                raise QueueFull(f"{len(self._waiting)} requests are waiting already: try again later.")
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Ends what waits with an error, lets what runs end, and returns when all is done."""
        with self._changed:
            self._closing = True
            refused, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for job in refused:
            job.emit(MqAoError("the server is shutting down."))
        self._running.result()

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._live or self._closing):
                    self._changed.wait()
                if self._closing and not self._live:
                    return
            read = 0
            while job := self._next(read):
                read += len(job.prompt)
                self._admit(job)
            if self._live:
                self._decode()

    def _next(self, read: int) -> Job | None:
        """The job whose prompt is read now, where `read` tokens were since the last step."""
        with self._changed:
            if not self._waiting or len(self._live) == self._max_batch:
                return None
            if read and read + len(self._waiting[0].prompt) > _BETWEEN_STEPS:
                return None
            return self._waiting.popleft()

    def _admit(self, job: Job) -> None:
        if job.cancelled.is_set():
            job.emit(None)
            return
        try:
            logits, states = self._read(job.prompt)
            sequence = _Sequence(job)
            if sequence.take(sequence.choose(logits[:, -1])):
                self._join(sequence, states)
            else:
                self._end(sequence, states)
        except Exception as error:  # of any kind: the others are served on
            self._fail([job], error)

    def _read(self, prompt: Tensor) -> tuple[Tensor, tuple[Value, ...]]:
        """Logits of a prompt's last token, and the states after it."""
        known, shared = self._prefixes.longest(prompt), self._prefixes.shared(prompt)
        start, states = known.length, known.states
        if shared > start:
            _, *new = self._prefill(prompt[None, start:shared], *states)
            start, states = shared, tuple(new)
            self._prefixes.keep(prompt[:shared], states)
        logits, *new = self._prefill(prompt[None, start:], *states)
        return logits, tuple(new)

    def _join(self, sequence: _Sequence, states: tuple[Value, ...]) -> None:
        self._live.append(sequence)
        self._carried.append(states)
        if self._joins:
            self._carried = [self._states.joined(self._carried)]

    def _decode(self) -> None:
        try:
            logits = self._logits()
        except Exception as error:
            jobs = [sequence.job for sequence in self._live]
            self._live, self._carried = [], []
            self._fail(jobs, error)
            return
        on: list[int] = []
        # Whoever waits for a token wakes with it, and takes the interpreter from here: all are chosen before.
        for place, (sequence, token) in enumerate(zip(self._live, self._chosen(logits), strict=True)):
            if sequence.job.cancelled.is_set():
                sequence.job.emit(None)
            elif isinstance(token, Exception):
                self._fail([sequence.job], token)
            elif sequence.take(token):
                on.append(place)
            else:
                self._end(sequence, self._of(place))
        if len(on) < len(self._live):
            self._keep(on)

    def _chosen(self, logits: Tensor) -> list[int | Exception]:
        """The next token of every live sequence, or why it has none."""
        samplings = [sequence.job.sampling for sequence in self._live]
        if all(sampling.temperature == 0 for sampling in samplings) and len({s.known_tokens for s in samplings}) == 1:
            return samplings[0].choose(logits)[:, 0].tolist()
        return [_tried(sequence, logits[place : place + 1]) for place, sequence in enumerate(self._live)]

    def _logits(self) -> Tensor:
        """Those of the next token of every live sequence, (sequences, vocab_size)."""
        tokens = torch.tensor([[sequence.tokens[-1]] for sequence in self._live])
        given = [tokens] if self._joins else tokens.split(1)
        found, after = [], []
        for ids, states in zip(given, self._carried, strict=True):
            logits, *new = self._step(ids, *states)
            found.append(logits[:, -1])
            after.append(tuple(new))
        self._carried = after
        return torch.cat(found)

    def _of(self, place: int) -> tuple[Value, ...]:
        """The states of one live sequence."""
        if not self._joins:
            return self._carried[place]
        return self._states.taken(self._carried[0], torch.tensor([place]))

    def _keep(self, places: Sequence[int]) -> None:
        """Goes on with these sequences alone."""
        self._live = [self._live[place] for place in places]
        if not self._joins:
            self._carried = [self._carried[place] for place in places]
        elif places:
            self._carried = [self._states.taken(self._carried[0], torch.tensor(places))]
        else:
            self._carried = []

    def _end(self, sequence: _Sequence, states: tuple[Value, ...]) -> None:
        """A next turn of a conversation begins with what was read."""
        self._prefixes.keep(sequence.read, states)
        sequence.job.emit(None)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        logger.warning("%d requests failed: %s", len(jobs), first_line(error, type(error).__name__))
        for job in jobs:
            job.emit(error)


def _tried(sequence: _Sequence, logits: Tensor) -> int | Exception:
    try:
        return sequence.choose(logits)
    except Exception as error:  # of any kind: the others are served on
        return error
