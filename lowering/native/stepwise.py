"""Runs a plan call by call from Python, in place of `plan.cpp`, and times every call."""

from __future__ import annotations

import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.lowering.native import file
from mq_ao.lowering.native.plan import SIZES, Plan, Step, Value
from mq_ao.lowering.native.program import NativeProgram, load

_SIZES = {name: function for function, name in SIZES.items()}


@dataclass(frozen=True)
class Timed:
    """An operator call of a plan.

    Attributes:
        operator: its name with its namespace, such as `mq_ao.linear_packed`.
        arguments: all of them by name, tensors as of the last run and without memory.
        outputs: the tensors that it gives, likewise.
        is_view: whether they are views of an argument, for which nothing moves.
        seconds: of every run.
    """

    operator: str
    arguments: Mapping[str, Any]
    outputs: tuple[Tensor, ...]
    is_view: bool
    seconds: tuple[float, ...]


class Stepwise:
    """A plan on its weights, as `Saved.bound` gives it, but slower: each call comes from Python.

    Args:
        saved: the plan and its weights.
    """

    def __init__(self, saved: file.Saved) -> None:
        self._saved = saved
        self._last_reads = _last_reads(saved.plan, len(saved.weights))
        self._calls: dict[int, Timed] = {}

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Gives what the plan gives, and keeps the time of each call for `take_calls`."""
        plan = self._saved.plan
        values: dict[int, Any] = dict(enumerate([*self._saved.weights.values(), *inputs]))
        for (index, step), done in zip(enumerate(plan.steps), self._last_reads, strict=True):
            results = self._run(index, step, [_filled(item, values) for item in step.arguments])
            values |= {place: result for place, result in zip(step.results, results, strict=True) if place is not None}
            for place in done:
                del values[place]
        return [values[place] for place in plan.outputs]

    def take_calls(self) -> list[Timed]:
        """The calls since the last time that this was asked, in the plan's order; what comes next is counted anew."""
        calls, self._calls = list(self._calls.values()), {}
        return calls

    def _run(self, index: int, step: Step, given: list[Any]) -> Sequence[Any]:
        if step.target in _SIZES:
            return (_SIZES[step.target](*given),)
        namespace, _, name = step.target.partition("::")
        overload = operator.attrgetter(f"{namespace}.{name}")(torch.ops)
        schema = overload._schema
        named = dict(zip((item.name for item in schema.arguments), given, strict=True))
        keywords = {item.name: named[item.name] for item in schema.arguments if item.kwarg_only}
        positional = [value for name, value in named.items() if name not in keywords]
        started = time.perf_counter()
        result = overload(*positional, **keywords)
        seconds = time.perf_counter() - started
        results = result if isinstance(result, tuple | list) else (result,)
        before = self._calls[index].seconds if index in self._calls else ()
        self._calls[index] = Timed(
            f"{namespace}.{name.partition('.')[0]}",
            {name: _without_memory(value) for name, value in named.items()},
            tuple(_without_memory(value) for value in results if isinstance(value, Tensor)),
            any(item.alias_info is not None and not item.alias_info.is_write for item in schema.returns),
            (*before, seconds),
        )
        return results


@dataclass(frozen=True)
class Phase:
    """What a program did.

    Attributes:
        name: "prefill" or "decode".
        tokens: of a sequence.
        seconds: of every run as programs run, from C++.
        calls: of the plan, timed one by one from Python.
    """

    name: str
    tokens: int
    seconds: tuple[float, ...]
    calls: tuple[Timed, ...]


def profile(path: Path, tokens: int, runs: int) -> list[Phase]:
    """Runs prefill and decode of a language model on fixed token ids, and tells what every call took.

    Args:
        path: a `.ptn` program.
        tokens: length of the prompt, at most `piece_tokens` of the program, so that it runs in one piece.
        runs: that count, after one that does not.

    Raises:
        MqAoError: it is no program of a language model, or see `program.load`.
    """
    whole = load(path)
    if not isinstance(whole, NativeProgram):
        raise MqAoError(f"{path} is a program of no language model: it has no prefill and decode to profile.")
    stepwise = Stepwise(whole.saved)
    timed = NativeProgram(whole.saved, stepwise)
    ids = (torch.arange(tokens) % int(whole.info["vocab_size"])).reshape(1, tokens)
    _, *states = whole.prefill(ids)
    inputs: dict[str, tuple[Any, ...]] = {"prefill": (ids,), "decode": (ids[:, :1], *states)}
    phases = []
    for name, given in inputs.items():
        getattr(timed, name)(*given)
        stepwise.take_calls()
        seconds = []
        for _ in range(runs):
            started = time.perf_counter()
            getattr(whole, name)(*given)
            seconds.append(time.perf_counter() - started)
            getattr(timed, name)(*given)
        phases.append(Phase(name, given[0].shape[1], tuple(seconds), tuple(stepwise.take_calls())))
    return phases


def _last_reads(plan: Plan, weights: int) -> list[set[int]]:
    """Of each step the values that none after it reads; so memory is used again as it is by `plan.cpp`."""
    seen, last = {*range(weights), *plan.outputs}, []
    for step in reversed(plan.steps):
        touched = {place for places in step.places for place in places if place >= 0}
        touched |= {place for place in step.results if place is not None}
        last.append(touched - seen)
        seen |= touched
    return last[::-1]


def _filled(argument: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(argument, Value):
        return values[argument.place]
    return [_filled(item, values) for item in argument] if isinstance(argument, list) else argument


def _without_memory(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_memory(item) for item in value]
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
