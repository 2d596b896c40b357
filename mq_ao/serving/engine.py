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
come, and those who come together with short prompts are decoded together from the start."""


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


@dataclass(frozen=True)
class _Begun:
    """A job, what is left to read of its prompt, and the states before that."""

    job: Job
    rest: Tensor
    states: tuple[Value, ...]


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
            for jobs in self._alike(self._next()):
                self._admit(jobs)
            if self._live:
                self._decode()

    def _next(self) -> list[Job]:
        """Those whose prompts are read now."""
        jobs, read = list[Job](), 0
        with self._changed:
            while self._waiting and len(self._live) + len(jobs) < self._max_batch:
                job = self._waiting[0]
                read += len(job.prompt)
                if jobs and read > _BETWEEN_STEPS:
                    break
                jobs.append(self._waiting.popleft())
        return jobs

    def _alike(self, jobs: Sequence[Job]) -> list[list[_Begun]]:
        """What is to be read of prompts, those together that are one batch."""
        together: dict[object, list[_Begun]] = {}
        for job in jobs:
            if job.cancelled.is_set():
                job.emit(None)
                continue
            try:
                begun = self._begun(job)
            except Exception as error:  # of any kind: the others are served on
                self._fail([job], error)
                continue
            alike = (len(begun.rest), bool(begun.states)) if self._joins else id(job)
            together.setdefault(alike, []).append(begun)
        return list(together.values())

    def _begun(self, job: Job) -> _Begun:
        """Reads the beginning that a prompt shares with others, if it is not known."""
        prompt = job.prompt
        known, shared = self._prefixes.longest(prompt), self._prefixes.shared(prompt)
        if shared <= known.length:
            return _Begun(job, prompt[known.length :], known.states)
        _, *states = self._prefill(prompt[None, known.length : shared], *known.states)
        self._prefixes.keep(prompt[:shared], states)
        return _Begun(job, prompt[shared:], tuple(states))

    def _admit(self, batch: list[_Begun]) -> None:
        """Reads rests of prompts that are as long; their first tokens are chosen, and they are live."""
        given = [begun.states for begun in batch]
        sequences = [_Sequence(begun.job) for begun in batch]
        try:
            before = self._states.joined(given) if len(batch) > 1 and given[0] else given[0]
            logits, *states = self._prefill(torch.stack([begun.rest for begun in batch]), *before)
            tokens = _chosen(sequences, logits[:, -1])
            carried = [*self._carried, tuple(states)]
            if self._joins and self._live:
                carried = [self._states.joined(carried)]
        except Exception as error:
            if len(batch) == 1:
                self._fail([batch[0].job], error)
            else:  # the fault may be in one of them
                for begun in batch:
                    self._admit([begun])
            return
        first = len(self._live)
        self._live, self._carried = [*self._live, *sequences], carried
        self._take(tokens, first)

    def _decode(self) -> None:
        try:
            tokens = _chosen(self._live, self._logits())
        except Exception as error:
            jobs = [sequence.job for sequence in self._live]
            self._live, self._carried = [], []
            self._fail(jobs, error)
            return
        self._take(tokens)

    def _take(self, tokens: Sequence[int | Exception], first: int = 0) -> None:
        """Gives the live sequences from `first` on their next tokens, or fails them."""
        on = list(range(first))
        # Whoever waits for a token wakes with it, and takes the interpreter from here: all were chosen before.
        for place, token in enumerate(tokens, first):
            sequence = self._live[place]
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


def _chosen(sequences: Sequence[_Sequence], logits: Tensor) -> list[int | Exception]:
    """The next token of each, or why it has none."""
    samplings = [sequence.job.sampling for sequence in sequences]
    if all(sampling.greedy for sampling in samplings) and len({sampling.known_tokens for sampling in samplings}) == 1:
        return samplings[0].choose(logits)[:, 0].tolist()
    return [_tried(sequence, logits[place : place + 1]) for place, sequence in enumerate(sequences)]


def _tried(sequence: _Sequence, logits: Tensor) -> int | Exception:
    try:
        return sequence.choose(logits)
    except Exception as error:  # of any kind: the others are served on
        return error
