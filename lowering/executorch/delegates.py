"""What XNNPACK took of a program, and what it left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from executorch.exir.lowered_backend_module import LoweredBackendModule, executorch_call_delegate
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

_WEIGHTED = ("linear", "addmm", "mm")


@dataclass(frozen=True)
class Delegation:
    """One method, after partitioning.

    Attributes:
        delegates: number of calls of XNNPACK.
        inside: operators that they run, by name, with their number.
        outside: operators that the runtime runs itself.
        integer_linears: linears inside delegates with integer weights, by the kind of their activations.
        linears_outside: linears that XNNPACK did not take.
    """

    delegates: int
    inside: Mapping[str, int]
    outside: Mapping[str, int]
    integer_linears: Mapping[str, int]
    linears_outside: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "delegates": self.delegates,
            "inside": dict(self.inside),
            "outside": dict(self.outside),
            "integer_linears": dict(self.integer_linears),
            "linears_outside": self.linears_outside,
        }


def delegation(program: ExportedProgram) -> Delegation:
    """Counts the operators of a partitioned method."""
    module = program.graph_module
    calls = [node for node in module.graph.nodes if node.target is executorch_call_delegate]
    delegated = [_delegated(module, node) for node in calls]
    inside = [node for graph in delegated for node in _operators(graph)]
    outside = list(_operators(module.graph))
    kinds = Counter(kind for node in inside if _name(node) == "linear" and (kind := _integer(node)) is not None)
    weighted_outside = sum(_name(node) in _WEIGHTED for node in outside)
    return Delegation(len(calls), Counter(map(_name, inside)), Counter(map(_name, outside)), kinds, weighted_outside)


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
