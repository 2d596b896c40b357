"""What XNNPACK took of a program, what it left, and why."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.exir.backend.canonical_partitioners.config_partitioner import format_target_name
from executorch.exir.backend.utils import WhyNoPartition
from executorch.exir.lowered_backend_module import LoweredBackendModule, executorch_call_delegate
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

_WEIGHTED = ("linear", "addmm", "mm")
_KNOWN = frozenset(config.target_name for config in ALL_PARTITIONER_CONFIGS)
"""Operators that XNNPACK has, by name and overload; it may refuse a call of one."""
_REFUSALS = logging.getLogger("executorch.backends.xnnpack.partition.config")
"""Parent of the loggers to which XNNPACK says why it refuses a node."""


@dataclass(frozen=True)
class Delegation:
    """One method, after partitioning.

    Attributes:
        delegates: number of calls of XNNPACK.
        inside: operators that they run, by name, with their number.
        outside: operators that the runtime runs itself.
        reasons: why each of those is outside, and each of the operators in the bodies of loops among them.
        integer_linears: linears inside delegates with integer weights, by the kind of their activations.
        linears_outside: linears that XNNPACK did not take.
    """

    delegates: int
    inside: Mapping[str, int]
    outside: Mapping[str, int]
    reasons: Mapping[str, str]
    integer_linears: Mapping[str, int]
    linears_outside: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "delegates": self.delegates,
            "inside": dict(self.inside),
            "outside": dict(self.outside),
            "reasons": dict(self.reasons),
            "integer_linears": dict(self.integer_linears),
            "linears_outside": self.linears_outside,
        }


class _Listener(logging.Handler):
    """Keeps what XNNPACK says of nodes, and passes on what would have been shown without it."""

    def __init__(self, above: logging.Logger | None, shown: int) -> None:
        super().__init__(logging.DEBUG)
        self.refusals: dict[str, str] = {}
        self._above = above
        self._shown = shown

    def emit(self, record: logging.LogRecord) -> None:
        """One object says everything, with other content every time: it is read at once."""
        why: Any = record.msg
        if isinstance(why, WhyNoPartition) and why.node is not None:
            self.refusals[why.node.name] = why.reason.rstrip(".")
        if self._above is not None and record.levelno >= self._shown:
            self._above.handle(record)


@contextlib.contextmanager
def refusals() -> Iterator[Mapping[str, str]]:
    """Collects, by name of the node, why XNNPACK refuses nodes while it partitions a program."""
    level, propagate = _REFUSALS.level, _REFUSALS.propagate
    listener = _Listener(_REFUSALS.parent, _REFUSALS.getEffectiveLevel())
    _REFUSALS.addHandler(listener)
    _REFUSALS.setLevel(logging.DEBUG)
    # Else handlers above, which have no level of their own, would print it all.
    _REFUSALS.propagate = False
    try:
        yield listener.refusals
    finally:
        _REFUSALS.propagate = propagate
        _REFUSALS.setLevel(level)
        _REFUSALS.removeHandler(listener)


def delegation(program: ExportedProgram, refused: Mapping[str, str]) -> Delegation:
    """Counts the operators of a partitioned method.

    Args:
        program: the method.
        refused: see `refusals`.
    """
    module = program.graph_module
    calls = [node for node in module.graph.nodes if node.target is executorch_call_delegate]
    delegated = [_delegated(module, node) for node in calls]
    inside = [node for graph in delegated for node in _operators(graph)]
    outside = list(_operators(module.graph))
    kinds = Counter(kind for node in inside if _name(node) == "linear" and (kind := _integer(node)) is not None)
    return Delegation(
        delegates=len(calls),
        inside=Counter(map(_name, inside)),
        outside=Counter(map(_name, outside)),
        reasons=_reasons(module, outside, refused),
        integer_linears=kinds,
        linears_outside=sum(_name(node) in _WEIGHTED for node in outside),
    )


def _reasons(module: GraphModule, outside: list[Node], refused: Mapping[str, str]) -> dict[str, str]:
    """By name of the operator; the reasons of several nodes are joined where they differ."""
    found: dict[str, dict[str, None]] = {}
    for node in outside:
        found.setdefault(_name(node), {})[_reason(node, refused)] = None
    for loop in outside:
        for body in _bodies(module, loop):
            for node in _operators(body):
                # Its partitioner matches the outermost graph alone.
                found.setdefault(_name(node), {})[f"in the body of a {_name(loop)}, where XNNPACK does not look"] = None
    return {name: "; ".join(reasons) for name, reasons in found.items()}


def _reason(node: Node, refused: Mapping[str, str]) -> str:
    if _name(node).startswith("mq_ao::"):
        return "a native operator of mq_ao"
    if node.name in refused:
        return refused[node.name]
    target: Any = node.target
    if format_target_name(target.__name__) in _KNOWN:
        return "XNNPACK has this operator, and does not say why it left it"
    return "XNNPACK has no such operator"


def _bodies(module: GraphModule, call: Node) -> Iterator[Graph]:
    """Graphs that a higher-order operator is given."""
    for argument in call.all_input_nodes:
        body = getattr(module, str(argument.target), None) if argument.op == "get_attr" else None
        if isinstance(body, GraphModule):
            yield body.graph


def _delegated(module: GraphModule, call: Node) -> Graph:
    target = call.args[0]
    assert isinstance(target, Node)
    lowered = getattr(module, str(target.target))
    assert isinstance(lowered, LoweredBackendModule)
    return lowered.original_module.graph_module.graph


def _operators(graph: Graph) -> Iterator[Node]:
    """Calls that compute something."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is not executorch_call_delegate and _name(node) != "getitem":
            yield node


def _name(node: Node) -> str:
    """Name of an operator without its overload, and without its namespace where that is aten."""
    target: Any = node.target
    if target is torch.ops.higher_order.auto_functionalized_v2:
        # An operator that writes into what it is given, as torch.export puts it.
        target = node.args[0]
    schema = getattr(target, "_schema", None)
    return target.__name__ if schema is None else schema.name.removeprefix("aten::")


def _integer(linear: Node) -> str | None:
    """Kind of the activations of a linear with integer weights, or None for one in float."""
    x, weight = linear.args[:2]
    if not isinstance(weight, Node) or "dequantize" not in str(weight.target):
        return None
    bits = 4 if -8 in weight.args and 7 in weight.args else 8
    dynamic = isinstance(x, Node) and "affine" in str(x.target)
    return f"int{bits} weight, {'int8 per token' if dynamic else 'static int8'} input"
