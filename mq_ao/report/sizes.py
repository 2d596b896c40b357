"""Bytes of the constants of a graph, by the role that reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.fx import GraphModule

from mq_ao.graph import Role, edit, match, walk
from mq_ao.lowering.patterns import DQ_AFFINE, DQ_CHANNEL, Quantized, Weight
from mq_ao.report.data import Size

OTHER = "other"
"""Part of what no role reads, such as the weights of norms."""

_ORDER = (*map(str, Role), OTHER)


@dataclass(frozen=True)
class Stored:
    """One constant of a graph.

    Attributes:
        parts: roles of the nodes that read it, or `OTHER`.
        size: in bytes.
    """

    parts: frozenset[str]
    size: int


def roles(graph: GraphModule) -> dict[str, str]:
    """Role of every node of a float graph that has one, by name."""
    found = match(graph)
    pairs = [*found.by_role(), *(pair[:2] for block in found.blocks for pair in block.operands())]
    return {node.name: str(role) for role, node in pairs}


def stored(graph: GraphModule, by_node: Mapping[str, str]) -> tuple[Stored, ...]:
    """The constants that a graph reads, each once.

    In a converted graph a folded weight counts with its bits, 4-bit weights as half a byte, and with its scales; the
    zero points of symmetric weights are not kept by any backend and count as nothing.

    Args:
        graph: float or converted.
        by_node: role of the nodes, see `roles`.
    """
    integers = _integers(graph)
    constants = {str(node.target): node for node in graph.graph.find_nodes(op="get_attr")}
    result = []
    for target, node in constants.items():
        parts = frozenset(by_node.get(reader.name, OTHER) for reader in edit.readers(node))
        # torch.export also lists the second name of a tied weight, which nothing reads.
        if parts:
            result.append(Stored(parts, integers.get(target, edit.constant(graph, node).nbytes)))
    return tuple(result)


def compare(before: Iterable[Stored], after: Iterable[Stored]) -> tuple[Size, ...]:
    """Sizes by role; roles that share a tensor in either graph are one part."""
    before, after = list(before), list(after)
    groups = _groups([*before, *after])
    return tuple(Size(_name(group), _total(before, group), _total(after, group)) for group in groups)


def _integers(graph: GraphModule) -> dict[str, int]:
    """Bytes of folded weights and of their zero points, by name."""
    found: dict[str, int] = {}
    for node in walk.calls(graph, {DQ_CHANNEL, DQ_AFFINE}):
        weight = Weight.of(graph, node)
        if weight is None:
            continue
        given = Quantized.of(node)
        found[str(given.x.target)] = -(-weight.values.numel() * weight.bits // 8)
        found[str(given.zero_point.target)] = 0
    return found


def _groups(items: Iterable[Stored]) -> list[frozenset[str]]:
    groups: list[frozenset[str]] = []
    for item in items:
        touched = [group for group in groups if group & item.parts]
        groups = [group for group in groups if group not in touched]
        groups.append(item.parts.union(*touched))
    return sorted(groups, key=lambda group: min(map(_ORDER.index, group)))


def _name(group: frozenset[str]) -> str:
    return " + ".join(sorted(group, key=_ORDER.index))


def _total(items: Iterable[Stored], group: frozenset[str]) -> int:
    return sum(item.size for item in items if item.parts & group)
