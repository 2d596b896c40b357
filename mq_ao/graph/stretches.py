"""A graph's calls in order, cut into stretches of which one alone is kept while gradients are computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Graph, Node

from mq_ao.graph import walk

GIVEN = ("placeholder", "get_attr")
"""Nodes that hold what a graph is given, and compute nothing."""


@dataclass(frozen=True)
class Stretch:
    """Calls that follow each other.

    Attributes:
        nodes: the calls, in the graph's order.
        reads: the tensors that they read of earlier stretches.
    """

    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]


def stretches(graph: Graph, starts: Iterable[Node]) -> list[Stretch]:
    """Cuts a graph before each of some calls, unless something else than tensors and sizes would be cut through.

    Args:
        graph: without operators that write to what they are given.
        starts: calls of it, in any order.

    Returns:
        The stretches in order. All calls lie in one; inputs, parameters and the output in none.
    """
    calls = [node for node in graph.nodes if node.op not in (*GIVEN, "output")]
    places = {node: place for place, node in enumerate(calls)}
    uncut = {
        place
        for node in calls
        if isinstance(walk.value(node), tuple | list)
        for place in range(places[node] + 1, max((places.get(user, 0) for user in node.users), default=0) + 1)
    }
    cuts = sorted({0, *(places[node] for node in starts)} - uncut)
    parts = [tuple(calls[first:last]) for first, last in zip(cuts, [*cuts[1:], len(calls)], strict=True)]
    return [Stretch(part, _read(part)) for part in parts if part]


def is_size(node: Node) -> bool:
    """Whether a node's value is a number, which stretches read of earlier ones as it is."""
    return not isinstance(walk.value(node), Tensor | tuple | list)


def _read(part: tuple[Node, ...]) -> tuple[Node, ...]:
    own = set(part)
    found = dict.fromkeys(source for node in part for source in node.all_input_nodes)
    return tuple(node for node in found if node not in own and node.op not in GIVEN and not is_size(node))
