"""The graph of one decode step: states are overwritten where they lie, instead of being gathered anew."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from mq_ao.graph import walk
from mq_ao.lowering.graphs import flat
from mq_ao.ops.in_place import STATEFUL

aten = torch.ops.aten
mq = torch.ops.mq_ao

_TWINS: dict[object, Any] = {getattr(mq, name).default: getattr(mq, f"{name}_").default for name in STATEFUL}


def one_token(module: GraphModule) -> GraphModule:
    """Makes the graph of a step from that of any length, on the same tensors.

    Args:
        module: graph `(input_ids, conv_state, ssm_state, positions) -> (logits, conv_state, ssm_state)`, lowered or in
            float; it is not changed.

    Returns:
        A graph `(input_ids, conv_state, ssm_state, positions) -> logits` that overwrites the states. Where what carries
        one has no operator that does so, it is computed and then copied.
    """
    step = flat(module)
    graph = step.graph
    (output,) = graph.find_nodes(op="output")
    logits, *results = output.args[0]
    states = graph.find_nodes(op="placeholder")[1:3]
    output.args = (logits,)
    for state, result in zip(states, results, strict=True):
        carriers = _carried(state, result)
        for carrier in carriers:
            _overwrite(step, carrier)
        if not carriers:
            with graph.inserting_before(output):
                graph.call_function(aten.copy_.default, (state, result))
    graph.eliminate_dead_code()
    step.recompile()
    return step


def _carried(state: Node, result: Node) -> list[Node]:
    """The operators that read the layers of a state and give those of the result; none where that is not all."""
    if result.target != aten.stack.default or not isinstance(result.args[0], list | tuple):
        return []
    carriers: list[Node] = []
    for layer, last in enumerate(result.args[0]):
        carrier: Any = last.args[0] if last.target == walk.getitem and last.args[1] == 1 else None
        if carrier is None or carrier.target not in _TWINS:
            return []
        first = walk.arguments(carrier)["initial_state"]
        if first is None or first.target != aten.select.int or first.args != (state, 0, layer):
            return []
        if len(first.users) != 1 or len(last.users) != 1:
            return []
        carriers.append(carrier)
    return carriers if len(state.users) == len(carriers) else []


def _overwrite(step: GraphModule, carrier: Node) -> None:
    """The operator's twin in its place."""
    with step.graph.inserting_before(carrier):
        twin = step.graph.call_function(_TWINS[carrier.target], tuple(walk.arguments(carrier).values()))
    for user in list(carrier.users):
        if user.args[1] == 0:
            twin.meta = dict(user.meta)
            user.replace_all_uses_with(twin)
