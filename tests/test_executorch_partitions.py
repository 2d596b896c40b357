"""What XNNPACK runs together never waits for something that waits for it."""

from __future__ import annotations

import graphlib
import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, Node

pytest.importorskip("executorch.exir", reason='needs pip install "mq-ao[executorch]"')

from mq_ao.lowering.executorch.partitioner import _stages


def drawn_graph(data: st.DataObject) -> tuple[list[Node], dict[Node, int]]:
    """A graph, and the matches of some of its nodes: single ones, and some of two neighbours."""
    graph = Graph()
    nodes = [graph.placeholder("x")]
    matches: dict[Node, int] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        inputs = [nodes[data.draw(st.integers(0, len(nodes) - 1))] for _ in range(2)]
        node = graph.call_function(operator.add, tuple(inputs))
        nodes.append(node)
        kind = data.draw(st.sampled_from(["outside", "single", "with its input"]))
        if kind == "with its input" and inputs[0] in matches:
            # As a quantize step with all linears that read it: whatever lies between in the graph's order.
            matches[node] = matches[inputs[0]]
        elif kind != "outside":
            matches[node] = len(nodes)
    return nodes, matches


def waits_for(nodes: list[Node], part_of: dict[Node, object]) -> dict[object, set[object]]:
    """Which parts each part waits for; a node outside is a part of its own."""
    found: dict[object, set[object]] = {part_of.get(node, node): set() for node in nodes}
    for node in nodes:
        for item in node.all_input_nodes:
            if part_of.get(item, item) != part_of.get(node, node):
                found[part_of.get(node, node)].add(part_of.get(item, item))
    return found


def has_cycle(waits: dict[object, set[object]]) -> bool:
    try:
        list(graphlib.TopologicalSorter(waits).static_order())
    except graphlib.CycleError:
        return True
    return False


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_partitions_wait_in_one_direction(data: st.DataObject) -> None:
    nodes, matches = drawn_graph(data)
    try:
        stages = _stages(nodes, matches)
    except RuntimeError as error:
        assert "wait for others in between" in str(error)
        assert has_cycle(waits_for(nodes, dict(matches))), "only matches that cannot be run one by one are refused"
        return
    part_of: dict[Node, object] = {node: ("stage", stages[match]) for node, match in matches.items()}
    assert not has_cycle(waits_for(nodes, part_of))


def test_stages_count_the_ways_out() -> None:
    """x -> a -> b; a -> outside -> c; b and c -> d: two partitions, and what follows the way out is in the second."""
    graph = Graph()
    x = graph.placeholder("x")
    a = graph.call_function(operator.neg, (x,))
    b = graph.call_function(operator.neg, (a,))
    outside = graph.call_function(operator.inv, (a,))
    c = graph.call_function(operator.neg, (outside,))
    d = graph.call_function(operator.add, (b, c))
    stages = _stages(list(graph.nodes), {a: 0, b: 1, c: 2, d: 3})
    assert [stages[match] for match in range(4)] == [0, 0, 1, 1]
