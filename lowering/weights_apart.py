"""Graphs apart from their weights, which become inputs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.graph import edit


def without_weights(module: GraphModule) -> tuple[GraphModule, dict[str, Tensor]]:
    """A flat graph, which is changed, with its weights as first inputs, each tensor once; and those weights."""
    graph, first = module.graph, module.graph.find_nodes(op="placeholder")[0]
    weights: dict[str, Tensor] = {}
    known: dict[tuple[Any, ...], Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        tensor = edit.constant(module, node)
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place not in known:
            name = str(node.target).replace(".", "_")
            if name in weights:
                name = f"{name}_{len(weights)}"
            # One storage under two shapes (scales of a tied embedding and head) is no weight that files can share.
            shared = any(tensor.data_ptr() == other.data_ptr() for other in weights.values())
            weights[name] = tensor.clone() if shared else tensor.contiguous()
            with graph.inserting_before(first):
                known[place] = graph.placeholder(name)
            known[place].meta = copy.copy(node.meta)
        node.replace_all_uses_with(known[place])
        graph.erase_node(node)
    return GraphModule(torch.nn.Module(), graph), weights
