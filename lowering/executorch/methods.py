"""The methods of a program: prefill, decode and reset, on the same buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule

from mq_ao.lowering.executorch.options import Options, Scan
from mq_ao.lowering.executorch.portable import OPERATORS
from mq_ao.lowering.executorch.state_buffers import buffers, cleared, keep_states
from mq_ao.lowering.language_graphs import export, flat, with_positions
from mq_ao.models.states import States

aten = torch.ops.aten
METHODS = ("prefill", "decode", "reset")


def export_methods(module: GraphModule, states: States, options: Options, max_count: int) -> dict[str, ExportedProgram]:
    """Exports the methods of a language model's graph `(input_ids, *states) -> (logits, *states)`.

    `prefill(input_ids (batch, length), positions (count,)) -> logits (batch, count, vocab_size)` of the tokens at
    `positions`; `decode(input_ids (batch, 1)) -> logits (batch, 1, vocab_size)`; `reset() -> 0` sets the states to
    zero. Token ids and positions are int64, logits float32.

    Args:
        module: the graph; it is not changed.
        states: its states.
        options: batch, longest prefill and context.
        max_count: most positions in one call.
    """
    batch, longest = options.batch, options.max_length
    ids, positions = torch.zeros(batch, min(8, longest), dtype=torch.int64), torch.arange(min(3, max_count))
    operators = OPERATORS if options.scan is Scan.PORTABLE else {}
    prefill, decode = with_positions(module), flat(module)
    kept = buffers(states, batch, options.max_context)
    for graph in (prefill, decode):
        keep_states(graph, states, kept)
    dynamic = ({1: _up_to("length", longest)}, {0: _up_to("count", max_count)})
    return {
        "prefill": export(prefill, (ids, positions), dynamic, operators),
        "decode": export(decode, (ids[:, :1].clone(),), ({},), operators),
        "reset": export(_reset(cleared(states, kept)), (), ()),
    }


def _up_to(name: str, largest: int) -> Dim | None:
    """A size from 1 on; None for one that is always 1, which is no range."""
    return Dim(name, min=1, max=largest) if largest > 1 else None


def _reset(states: Mapping[str, Tensor]) -> GraphModule:
    root, graph = torch.nn.Module(), Graph()
    for name, value in states.items():
        root.register_buffer(name, value)
        state = graph.get_attr(name)
        graph.call_function(aten.copy_.default, (state, graph.call_function(aten.zeros_like.default, (state,))))
    # A method gives something.
    graph.output((graph.call_function(aten.scalar_tensor.default, (0.0,)),))
    return GraphModule(root, graph)
