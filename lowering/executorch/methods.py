"""The methods of a program: prefill, decode and reset, on the same buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule

from mq_ao.lowering.executorch.states import keep_states
from mq_ao.lowering.graphs import export, flat, with_positions

aten = torch.ops.aten


def export_methods(
    module: GraphModule, states: Mapping[str, Tensor], batch: int, max_length: int
) -> dict[str, ExportedProgram]:
    """Exports the methods of a language model's graph `(input_ids, conv_state, ssm_state) -> (logits, ...)`.

    `prefill(input_ids (batch, length), positions (count,)) -> logits (batch, count, vocab)`, length and count up to
    max_length; `decode(input_ids (batch, 1)) -> logits (batch, 1, vocab)`; `reset() -> 0` sets the states to zero.
    """
    length, count = Dim("length", min=1, max=max_length), Dim("count", min=1, max=max_length)
    ids, positions = torch.zeros(batch, min(8, max_length), dtype=torch.int64), torch.arange(min(3, max_length))
    prefill, decode = with_positions(module), flat(module)
    for graph in (prefill, decode):
        keep_states(graph, states)
    return {
        "prefill": export(prefill, (ids, positions), ({1: length}, {0: count})),
        "decode": export(decode, (ids[:, :1].clone(),), ({},)),
        "reset": export(_reset(states), (), ()),
    }


def _reset(states: Mapping[str, Tensor]) -> GraphModule:
    root = torch.nn.Module()
    graph = Graph()
    for name, value in states.items():
        root.register_buffer(name, value)
        state = graph.get_attr(name)
        graph.call_function(aten.copy_.default, (state, graph.call_function(aten.zeros_like.default, (state,))))
    graph.output((graph.call_function(aten.scalar_tensor.default, (0.0,)),))
    return GraphModule(root, graph)
