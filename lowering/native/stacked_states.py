"""States of all layers in one tensor: every layer writes its own where it belongs, and nothing is stacked."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from mq_ao.graph import walk
from mq_ao.ops.in_place import STATEFUL, state_index

aten = torch.ops.aten
mq = torch.ops.mq_ao

_TWINS = {getattr(mq, name).default: (getattr(mq, f"{name}_into").default, state_index(name)) for name in STATEFUL}
"""What writes the last state to given memory, for each operator that has one, and which argument is the first state."""


def write_in_place(module: GraphModule) -> None:
    """Edits a graph whose states come as one tensor, and go as one of the same sizes."""
    for stack in walk.calls(module, {aten.stack.default}):
        _write(module, stack)
    module.graph.eliminate_dead_code()
    module.recompile()


def _write(module: GraphModule, stack: Node) -> None:
    states: Any = stack.args[0]
    axis = walk.arguments(stack).get("dim", 0)
    layers = [layer for state in states if (layer := _layer(state)) is not None]
    before = {source for _, source, _ in layers}
    if axis != 0 or len(layers) != len(states) or len(before) != 1:
        return
    (all_before,) = before
    if [index for _, _, index in layers] != list(range(walk.value(all_before).shape[0])):
        return
    graph = module.graph
    first = min((scan for scan, _, _ in layers), key=list(graph.nodes).index)
    with graph.inserting_before(first):
        all_after = graph.call_function(aten.empty_like.default, (all_before,))
    for scan, _, index in layers:
        twin, _ = _TWINS[scan.target]
        given = [*walk.arguments(scan).values()]
        with graph.inserting_before(scan):
            own = graph.call_function(aten.select.int, (all_after, 0, index))
            y = graph.call_function(twin, (*given, own))
        for user in list(scan.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(y)
    stack.replace_all_uses_with(all_after)
    graph.erase_node(stack)


def _layer(state: object) -> tuple[Node, Node, int] | None:
    """The operator that gives a state, the input that holds the states before, and which of them it reads."""
    if not isinstance(state, Node) or state.target is not walk.getitem or state.args[1] != 1 or len(state.users) != 1:
        return None
    scan = walk.argument(state, 0)
    if scan.target not in _TWINS or any(user.target is not walk.getitem for user in scan.users):
        return None
    _, place = _TWINS[scan.target]
    first = [*walk.arguments(scan).values()][place]
    if not isinstance(first, Node) or first.target != aten.select.int:
        return None
    source, axis, index = (*first.args, *first.kwargs.values())
    if not isinstance(source, Node) or source.op != "placeholder" or axis != 0 or not isinstance(index, int):
        return None
    return scan, source, index
