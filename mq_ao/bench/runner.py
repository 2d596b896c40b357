"""The rounds of a bench: contenders take turns, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from mq_ao.bench.prepare import Step, random_ids
from mq_ao.bench.results import Measured, Results
from mq_ao.bench.worker import Spec, Worker
from mq_ao.errors import MqAoError

P = ParamSpec("P")
T = TypeVar("T")
Bar = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
"""`bar(what, total)` shows progress; it yields `advance(count, what)`."""

PROMPT_TOKENS = 64
"""Tokens before the ones that a decode measurement times, where the user does not say."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        lengths: prefill lengths in tokens.
        repeats: rounds a length.
        decode_tokens: tokens a decode measurement.
        contexts: tokens before the ones that a decode measurement times.
        patience: a contender that has spent this many seconds at one length sits out its remaining
            rounds: few want to wait for the slowest one many times.
    """

    lengths: tuple[int, ...] = (128, 1024, 4096)
    repeats: int = 5
    decode_tokens: int = 64
    contexts: tuple[int, ...] = (PROMPT_TOKENS,)
    patience: float = 60.0

    @property
    def longest(self) -> int:
        """Most tokens in a sequence."""
        return max(*self.lengths, max(PROMPT_TOKENS, *self.contexts) + self.decode_tokens)


class Bench:
    """Measures contenders in turns.

    Args:
        model: name of the model.
        specs: the contenders; the first is the one that logits are compared with.
        vocab_size: of the model.
        plan: what to measure.
    """

    def __init__(self, model: str, specs: Sequence[Spec], vocab_size: int, plan: Plan) -> None:
        self._specs = specs
        self._plan = plan
        self._ids = random_ids(vocab_size, plan.longest)
        measured = {spec.name: Measured(spec.name) for spec in specs}
        self._results = Results(model, plan.lengths, plan.contexts, plan.decode_tokens, measured)
        self._workers: dict[str, Worker] = {}

    def run(self, step: Step, bar: Bar) -> Results:
        """Opens the contenders, runs all rounds, and closes them.

        A contender that fails keeps what it has; the others go on.

        Args:
            step: shows what is being done.
            bar: shows the progress of the rounds.
        """
        model, lengths = self._results.model, self._plan.lengths
        with ExitStack() as stack:
            for spec in self._specs:
                with step(f"opening {spec.name}"):
                    self._guard(spec.name, self._open, spec, stack)
            with step("comparing logits"):
                self._compare_logits()
            total = len(self._specs) * self._plan.repeats * (1 + len(lengths) + len(self._plan.contexts))
            with bar(model, total) as advance:
                self._rounds(f"{model}, start", self._start, advance)
                for tokens in lengths:
                    self._rounds(f"{model}, {tokens} tokens", partial(self._prefill, tokens), advance)
                for context in self._plan.contexts:
                    self._rounds(f"{model}, decode after {context} tokens", partial(self._decode, context), advance)
            for name in list(self._workers):
                self._guard(name, self._memory, name)
        return self._results

    def _open(self, spec: Spec, stack: ExitStack) -> None:
        self._workers[spec.name] = stack.enter_context(Worker(spec))

    def _rounds(self, what: str, measure: Callable[[str], float], advance: Callable[..., None]) -> None:
        spent = dict.fromkeys(self._results.contenders, 0.0)
        for index in range(self._plan.repeats):
            for name in self._results.contenders:
                advance(0, f"{what}, round {index + 1}: {name}")
                if name in self._workers and (index == 0 or spent[name] < self._plan.patience):
                    started = time.perf_counter()
                    measured = self._guard(name, measure, name) or 0.0
                    # What comes before a measurement takes time as well: a long prompt.
                    spent[name] += max(measured, time.perf_counter() - started)
                advance(1)

    def _start(self, name: str) -> float:
        prompt, ids = self._ids[:PROMPT_TOKENS], self._ids[PROMPT_TOKENS : PROMPT_TOKENS + self._plan.decode_tokens]
        with Worker(self._workers[name].spec) as fresh:
            start = fresh.start(prompt, ids)
        self._results.contenders[name].starts.append(start)
        return start.seconds

    def _prefill(self, tokens: int, name: str) -> float:
        seconds = self._workers[name].prefill(self._ids[:tokens])
        self._results.contenders[name].prefill.setdefault(tokens, []).append(seconds)
        return seconds

    def _decode(self, context: int, name: str) -> float:
        count = self._plan.decode_tokens
        prompt, ids = self._ids[:context], self._ids[context : context + count]
        seconds = self._workers[name].decode(prompt, ids)
        self._results.contenders[name].decode.setdefault(context, []).append(seconds)
        return seconds * count

    def _compare_logits(self) -> None:
        """Also warms every contender up."""
        reference: list[float] | None = None
        prompt, ids = self._ids[:PROMPT_TOKENS], self._ids[PROMPT_TOKENS : PROMPT_TOKENS + 8]
        for name in list(self._workers):
            logits = self._guard(name, self._workers[name].logits, prompt, ids)
            if logits is not None:
                reference = reference or logits
                error = math.dist(logits, reference) / math.hypot(*reference)
                self._results.contenders[name].logits_error = error

    def _memory(self, name: str) -> None:
        self._results.contenders[name].memory = self._workers[name].memory()

    def _guard(self, name: str, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Runs `action`, or takes a contender that fails out of the rounds and returns None."""
        try:
            return action(*args, **kwargs)
        except MqAoError as error:
            self._results.contenders[name].failure = str(error)
            worker = self._workers.pop(name, None)
            if worker is not None:
                worker.close()
            return None
