"""Explicit states become buffers: the program keeps them between calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mq_ao.errors import MqAoError
from mq_ao.graph import walk
from mq_ao.models.states import States

aten = torch.ops.aten
CONV, SSM = "conv_state", "ssm_state"


def buffers(states: States, batch: int) -> dict[str, torch.Tensor]:
    """The states of `batch` sequences, zeros, by the name of their buffer: one a layer and kind."""
    conv, ssm = states.examples(batch, 0)
    return {
        f"{name}_{layer}": state.clone()
        for name, stack in ((CONV, conv), (SSM, ssm))
        for layer, state in enumerate(stack)
    }


def keep_states(module: GraphModule, states: Mapping[str, torch.Tensor]) -> None:
    """Edits a graph with explicit states into one that keeps them: `(input_ids, ...) -> logits`.

    Every layer reads its own buffers and writes them at the end.

    Args:
        module: `(input_ids, conv_state, ssm_state, ...) -> (logits, conv_state, ssm_state)`, flat.
        states: see `buffers`; they become the module's.

    Raises:
        MqAoError: a state is read or given back otherwise than layer by layer.
    """
    graph = module.graph
    for name, value in states.items():
        module.register_buffer(name, value)
    placeholders = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    (output,) = graph.find_nodes(op="output")
    logits, *stacks = output.args[0]
    # Written last, when nothing reads the old state any more.
    with graph.inserting_before(output):
        for name, stack in zip((CONV, SSM), stacks, strict=True):
            source = placeholders[name]
            current = _layers(source, name)
            for layer, last in enumerate(_stacked(stack, name)):
                graph.call_function(aten.copy_.default, (current[layer], last))
    output.args = ((logits,),)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.target == aten.copy_.default)
    for name in (CONV, SSM):
        graph.erase_node(placeholders[name])
    module.recompile()


def _layers(source: Node, name: str) -> dict[int, Node]:
    """A get_attr node in the place of every `source[layer]`."""
    graph = source.graph
    found: dict[int, Node] = {}
    for user in list(source.users):
        if user.target == aten.sym_size.int:
            continue
        given = walk.arguments(user) if user.target == aten.select.int else {}
        layer = given.get("index")
        if given.get("dim") != 0 or not isinstance(layer, int):
            raise MqAoError(f"{user.name} reads {name} otherwise than layer by layer: it cannot become a buffer.")
        with graph.inserting_before(user):
            node = found.setdefault(layer, graph.get_attr(f"{name}_{layer}"))
        user.replace_all_uses_with(node)
        graph.erase_node(user)
    return found


def _stacked(stack: Any, name: str) -> list[Node]:
    if not isinstance(stack, Node) or stack.target != aten.stack.default:
        raise MqAoError(f"the graph's output {name} is not a stack of the layers' states: it cannot become a buffer.")
    return list(walk.inputs(stack))
