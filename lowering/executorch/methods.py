"""The methods of a program: prefill, decode and reset, on the same buffers."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule

from mq_ao.lowering.executorch.info import FORWARD
from mq_ao.lowering.executorch.options import Options, Scan
from mq_ao.lowering.executorch.portable import OPERATORS
from mq_ao.lowering.executorch.state_buffers import buffers, cleared, keep_states
from mq_ao.lowering.language_graphs import export, flat, with_positions
from mq_ao.models.states import States

aten = torch.ops.aten


def export_methods(module: GraphModule, states: States, options: Options, max_count: int) -> dict[str, ExportedProgram]:
    """Exports the methods of a language model's graph `(input_ids, *states) -> (logits, *states)`.

    `prefill(input_ids (batch, length), positions (count,)) -> logits (batch, count, vocab_size)` of the tokens at
    `positions`; `decode(input_ids (batch, 1)) -> logits (batch, 1, vocab_size)`; `reset() -> 0` sets the states to
    zero. For ExecuTorch's LLM runner it is one instead, since methods have states of their own there:
    `forward(input_ids (batch, length), start_pos (1,)) -> logits (batch, 1, vocab_size)` of the last token, which
    starts anew where `start_pos` is 0. Token ids and positions are int64, logits float32.

    Args:
        module: the graph; it is not changed.
        states: its states.
        options: batch, longest prefill and context.
        max_count: most positions in one call.
    """
    batch, longest = options.batch, options.max_length
    ids, positions = torch.zeros(batch, min(8, longest), dtype=torch.int64), torch.arange(min(3, max_count))
    operators = OPERATORS if options.scan is Scan.PORTABLE else {}
    dynamic = ({1: _up_to("length", longest)}, {0: _up_to("count", max_count)})
    kept = buffers(states, batch, options.max_context)
    if options.runner:
        given = (ids, torch.zeros(1, dtype=torch.int64))
        return {FORWARD: export(_for_runner(module, states, kept), given, (dynamic[0], {}), operators)}
    prefill, decode = with_positions(module), flat(module)
    for graph in (prefill, decode):
        keep_states(graph, states, kept)
    return {
        "prefill": export(prefill, (ids, positions), dynamic, operators),
        "decode": export(decode, (ids[:, :1].clone(),), ({},), operators),
        "reset": export(_reset(cleared(states, kept)), (), ()),
    }


def _for_runner(module: GraphModule, states: States, kept: Mapping[str, Tensor]) -> GraphModule:
    """The graph of `forward`: where logits are wanted becomes the last token, and its input says where tokens start."""
    graph_module = with_positions(module)
    graph = graph_module.graph
    ids, *_, start_pos = graph.find_nodes(op="placeholder")
    with graph.inserting_after(start_pos):
        count = graph.call_function(aten.sym_size.int, (ids, 1))
    with graph.inserting_after(count):
        last = graph.call_function(operator.sub, (count, 1))
    with graph.inserting_after(last):
        wanted = graph.call_function(aten.arange.start, (last, count))
    start_pos.replace_all_uses_with(wanted)
    keep_states(graph_module, states, kept, start_pos)
    return graph_module


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
