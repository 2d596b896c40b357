"""The integer graph of a language model apart from its weights: no machine code, so that any machine compiles it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

import mq_ao.ops  # noqa: F401  (the operators of saved graphs)
from mq_ao.errors import MqAoError
from mq_ao.graph import edit
from mq_ao.lowering import archive
from mq_ao.lowering.language_graphs import flat
from mq_ao.lowering.prefill_decode import export_whole
from mq_ao.models.states import States

FORMAT = 1
_VERSIONS = archive.versions("portable_format", FORMAT)


@dataclass(frozen=True)
class Portable:
    """A graph `(*weights, input_ids, *states) -> (logits, *states)`, and what it is to be given.

    Attributes:
        exported: the graph.
        weights: its first inputs, in order; on the meta device where they lie in another file.
        info: what a program of it says of itself: vocabulary, states, kernel counts.
    """

    exported: ExportedProgram
    weights: Mapping[str, Tensor]
    info: Mapping[str, Any]

    @classmethod
    def of(cls, module: GraphModule, states: States, info: Mapping[str, Any]) -> Portable:
        """Takes the weights out of a graph `(input_ids, *states) -> (logits, *states)`, which is not changed."""
        module, weights = without_weights(flat(module))
        exported = export_whole(module, states, tuple(weights.values()))
        exported.example_inputs = None  # which are the weights
        return cls(exported, weights, {**info, "states": states.described})

    @property
    def states(self) -> States:
        """What the graph carries."""
        return States.read(self.info["states"])

    def with_weights(self, weights: Mapping[str, Tensor]) -> Portable:
        """The same, with weights from elsewhere under the same names."""
        return replace(self, weights={name: weights[name] for name in self.weights})

    @cached_property
    def module(self) -> GraphModule:
        """The graph `(input_ids, *states) -> (logits, *states)`, which has its weights as buffers."""
        exported = self.exported.module(check_guards=False)
        assert isinstance(exported, GraphModule)
        module = flat(exported)
        graph = module.graph
        inputs = graph.find_nodes(op="placeholder")
        with graph.inserting_before(inputs[-1].next):
            for node, (name, tensor) in zip(inputs, self.weights.items(), strict=False):
                module.register_buffer(name, tensor)
                edit.replace(node, graph.get_attr(name))
        module.recompile()
        return module

    def save(self, path: Path) -> None:
        """Writes all but the weights, under a temporary name that is renamed when it is complete.

        Raises:
            MqAoError: the path cannot be written.
        """
        shapes = {name: [list(item.shape), str(item.dtype)[6:]] for name, item in self.weights.items()}
        archive.write_graph(path, self.exported, {**self.info, "weights": shapes, **_VERSIONS})


def read(path: Path) -> Portable:
    """What `Portable.save` wrote, with weights on the meta device.

    Raises:
        MqAoError: the file is missing, damaged, not ours, or of another version.
    """
    exported, info = archive.read_graph(path, _VERSIONS)
    shapes = info.pop("weights").items()
    weights = {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, (shape, dtype) in shapes}
    for name in _VERSIONS:
        del info[name]
    if len(weights) + 1 + len(info["states"]) != len(exported.graph_signature.user_inputs):
        raise MqAoError(f"{path} does not fit its own description: copy or make it again.")
    return Portable(exported, weights, info)


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
