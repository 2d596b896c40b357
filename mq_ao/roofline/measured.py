"""Measured times of a program on this machine's CPU beside what its bytes and operations would take at the peaks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mq_ao.lowering.native.stepwise import Phase, Timed
from mq_ao.ops.in_place import STATEFUL
from mq_ao.roofline.cost import RULES, Call, Cost, Rule, cost_of
from mq_ao.roofline.fusing import GATHERS
from mq_ao.roofline.machine import Peaks


def _packed(call: Call) -> Cost:
    """A product with packed integer weights: on integers, or on floats that are taken apart into three planes."""
    x = call.arguments["q" if "q" in call.arguments else "x"]
    return call.cost(int8=2 * math.prod(x.shape) * call.y.shape[-1])


def _recurrence(call: Call) -> Cost:
    """Mamba-2's scan by its recurrence: decay, a multiply-add for the state, and one for the output."""
    x, states = call.arguments["x"], call.arguments["B"].shape[-1]
    return call.cost(fp32=5 * x.numel() * states)


_LINEARS = ("linear_packed", "linear_packed_per_token", "linear_packed_weight_only")
_RULES: Mapping[str, Rule] = {
    **{f"mq_ao.{name}": _packed for name in _LINEARS},
    **dict.fromkeys(("mq_ao.ssd_scan", "mq_ao.qssd_scan"), _recurrence),
    **dict.fromkeys(("mq_ao.qgate", "mq_ao.qgate_per_token", "mq_ao.gate"), RULES["mq_ao.int8_gate"]),
    "mq_ao.qrms_norm": RULES["mq_ao.int8_rms_norm"],
}
"""Of operators that GPUs do not have, or that CPUs compute in another way."""
_NOTHING = frozenset({"aten.empty", "aten.empty_like", "aten.new_empty"})


@dataclass(frozen=True)
class Line:
    """Calls of one operator on one shape.

    Attributes:
        operator: its name.
        shape: inputs and outputs of a linear, else that of the first output.
        calls: how many there are in a run.
        seconds: of all calls of a run: of each the median over the runs.
        cost: bytes and operations of all calls of a run.
        peaks: of the machine.
    """

    operator: str
    shape: str
    calls: int
    seconds: float
    cost: Cost
    peaks: Peaks

    @property
    def memory_share(self) -> float:
        """Of the memory's bandwidth. Beyond 1: what is read lies in a cache."""
        return self.cost.moved / self.seconds / self.peaks.bandwidth

    @property
    def compute_share(self) -> float:
        """Of the peak of products: of int8 for products of integers, else of float32."""
        at_peak = self.cost.int8 / self.peaks.int8 + (self.cost.operations - self.cost.int8) / self.peaks.fp32
        return at_peak / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {
            "operator": self.operator,
            "shape": self.shape,
            "calls": self.calls,
            "ms": 1e3 * self.seconds,
            "bytes": self.cost.moved,
            "operations": self.cost.operations,
            "memory_share": self.memory_share,
            "compute_share": self.compute_share,
        }


def lines(phase: Phase, peaks: Peaks) -> list[Line]:
    """The calls of a phase, those of one operator and shape together, the longest first."""
    groups: dict[tuple[str, str], list[Timed]] = {}
    for timed in phase.calls:
        groups.setdefault((timed.operator, _shape(timed)), []).append(timed)
    found = [
        Line(
            *key,
            len(calls),
            sum(statistics.median(timed.seconds) for timed in calls),
            sum((_cost(timed) for timed in calls), Cost()),
            peaks,
        )
        for key, calls in groups.items()
    ]
    return sorted(found, key=lambda line: -line.seconds)


def _shape(timed: Timed) -> str:
    y = timed.outputs[0]
    if _name(timed) in _RULES and _RULES[_name(timed)] is _packed:
        x = timed.arguments["q" if "q" in timed.arguments else "x"]
        return f"{x.shape[-1]} -> {y.shape[-1]}"
    return " x ".join(map(str, y.shape))


def _cost(timed: Timed) -> Cost:
    name = _name(timed)
    call = Call(name, timed.arguments, timed.outputs, multiprocessors=0)  # one walk over time, as if all were busy
    if timed.is_view or name in _NOTHING:
        return Cost()
    if name in GATHERS:
        return Cost(moved=2 * call.y.nbytes)
    if name in _RULES:
        return _RULES[name](call)
    return cost_of(call) if name in RULES else call.cost(fp32=call.y.numel())


def _name(timed: Timed) -> str:
    """Of the operator that this one is, but for where the state goes."""
    name = timed.operator.removesuffix("_into")
    return name if name.partition(".")[2] in STATEFUL else timed.operator
