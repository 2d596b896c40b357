"""Time per operator of a program, from the events that ExecuTorch's runtime records (ETDump)."""

from __future__ import annotations

import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mq_ao.errors import MqAoError, first_line
from mq_ao.lowering.executorch import anatomy
from mq_ao.lowering.executorch.anatomy import MethodPlan
from mq_ao.lowering.executorch.info import FORWARD
from mq_ao.lowering.executorch.program import ExecutorchProgram, open_program

RUNS = {"prefill": 5, "decode": 20}
"""Runs that count, after one that does not: it loads the method and packs its weights."""
_RUN, _OPERATOR, _DELEGATE = "Method::execute", "OPERATOR_CALL", "DELEGATE_CALL"
_MS = 1e-6
"""Events are in nanoseconds."""


@dataclass
class Timing:
    """Calls of one operator, or of one delegate's backend.

    Attributes:
        calls: milliseconds of every call, over all runs.
        inside: what a backend reports of its own operators, by name.
    """

    calls: list[float] = field(default_factory=list)
    inside: dict[str, Timing] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Milliseconds of all calls."""
        return sum(self.calls)

    @property
    def median(self) -> float:
        """Milliseconds of a call."""
        return statistics.median(self.calls)


@dataclass(frozen=True)
class MethodProfile:
    """Time of one method.

    Attributes:
        name: of the method.
        tokens: that a sequence has in each run.
        runs: milliseconds of every run.
        operators: operators and backends by name.
    """

    name: str
    tokens: int
    runs: tuple[float, ...]
    operators: Mapping[str, Timing]

    @property
    def total(self) -> float:
        """Milliseconds of all runs."""
        return sum(self.runs)

    @property
    def rest(self) -> float:
        """Milliseconds of all runs that no operator accounts for."""
        return self.total - sum(timing.total for timing in self.operators.values())


def profile(path: Path, tokens: int | None = None) -> list[MethodProfile]:
    """Runs prefill and decode of a program on fixed token ids, and tells what its operators took.

    Args:
        path: the program.
        tokens: length of the prefill; by default 128, or what the program takes at most if that is less.

    Raises:
        MqAoError: the program takes fewer tokens, does not load (see `ExecutorchProgram.load`), or the installed
            runtime records no events.
    """
    program, info = open_program(path, enable_etdump=True)
    if FORWARD in info["methods"]:
        raise MqAoError(f"{path} was made for ExecuTorch's runner (--runner): profile one that was made without.")
    longest = info["max_length"]
    length = min(128, longest) if tokens is None else tokens
    if length > longest:
        raise MqAoError(
            f"{path} takes {longest} tokens at most in one prefill, not {length}: give fewer with --tokens."
        )
    plans = anatomy.read(path).methods
    # Loads the native operators where the program has them; what runs is the program that records.
    ExecutorchProgram.load(path)
    ids = torch.arange(info["batch"] * length).reshape(info["batch"], length) % info["vocab_size"]
    inputs = {"prefill": (ids, torch.tensor([length - 1])), "decode": (ids[:, :1].contiguous(),)}
    _execute(path, program, "reset", ())
    for method, count in RUNS.items():
        for _ in range(count + 1):
            _execute(path, program, method, inputs[method])
    runs = _runs(program, sum(RUNS.values()) + len(RUNS))
    profiles = []
    for method, count in RUNS.items():
        profiles.append(_profile(plans[method], inputs[method][0].shape[1], runs[1 : count + 1]))
        runs = runs[count + 1 :]
    return profiles


def _execute(path: Path, program: Any, method: str, inputs: tuple[Tensor, ...]) -> None:
    try:
        program.load_method(method).execute(inputs)
    except RuntimeError as error:
        raise MqAoError(f"ExecuTorch cannot run {method!r} of {path}: {first_line(error)}") from error


def _runs(program: Any, count: int) -> list[list[Any]]:
    """Events of the last `count` calls of a method, in order.

    `Inspector` reads the same file, but keeps the last pass alone of an operator that runs in a loop.
    """
    from executorch.devtools.etdump.serialize import deserialize_from_etdump_flatcc

    with tempfile.TemporaryDirectory(prefix="mq_ao_") as folder:
        target = Path(folder) / "events.etdp"
        try:
            program.write_etdump_result_to_file(str(target), str(Path(folder) / "debug.bin"))
        except RuntimeError as error:
            raise MqAoError(f"the installed ExecuTorch runtime records no events: {error}.") from error
        dump = deserialize_from_etdump_flatcc(target.read_bytes())
    events = [[event.profile_event for event in run.events or []] for run in dump.run_data]
    runs = [run for run in events if any(event is not None and event.name == _RUN for event in run)]
    if len(runs) < count:
        raise MqAoError(
            f"the installed ExecuTorch runtime recorded {len(runs)} runs of {count}: it cannot be profiled."
        )
    return runs[-count:]


def _profile(plan: MethodPlan, tokens: int, runs: list[list[Any]]) -> MethodProfile:
    operators: dict[str, Timing] = {}
    totals = []
    for run in runs:
        for event, milliseconds in _timed(run):
            if event.name == _RUN:
                totals.append(milliseconds)
                continue
            name = plan.instructions[event.chain_index][event.instruction_id]
            if name is None:
                continue
            timing = operators.setdefault(name, Timing())
            if event.name in (_OPERATOR, _DELEGATE):
                timing.calls.append(milliseconds)
            elif event.delegate_debug_id_str:
                # "Add (ND) #2": the second one in this delegate.
                kind = re.sub(r" #\d+$", "", event.delegate_debug_id_str)
                timing.inside.setdefault(kind, Timing()).calls.append(milliseconds)
    return MethodProfile(plan.name, tokens, tuple(totals), operators)


def _timed(run: list[Any]) -> Iterator[tuple[Any, float]]:
    for event in run:
        if event is not None:
            yield event, (event.end_time - event.start_time) * _MS
