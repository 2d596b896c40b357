"""From a lowered language-model graph to the graphs of a program's methods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401  (registers the q/dq operators)
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.graph import CodeGen

from mq_ao.errors import MqAoError
from mq_ao.graph import walk
from mq_ao.models.states import State, States

aten = torch.ops.aten
POSITIONS = "positions"
qd = torch.ops.quantized_decomposed
_QUANTIZE = frozenset(
    {
        qd.quantize_per_tensor.default,
        qd.dequantize_per_tensor.default,
        torch.ops.torchao.choose_qparams_affine,
        torch.ops.torchao.quantize_affine,
        torch.ops.torchao.dequantize_affine,
        torch.ops.mq_ao.quantize_per_token.default,
    }
)
_ROW_BY_ROW = _QUANTIZE | walk.NORM
_HEADS = walk.LINEAR | {
    torch.ops.mq_ao.linear_packed.default,
    torch.ops.mq_ao.linear_packed_per_token.default,
    torch.ops.mq_ao.linear_packed_weight_only.default,
}


def states_of(module: GraphModule) -> States:
    """The states of a graph `(input_ids, *states) -> (logits, *states)`.

    Raises:
        MqAoError: the graph is another.
    """
    found = find_states(module)
    if found is None:
        raise MqAoError(
            "the graph is not that of a language model with states: its inputs must be input_ids (batch, length) and "
            "states of that batch, and its outputs logits and the states after them."
        )
    return found


def find_states(module: GraphModule) -> States | None:
    """The same, or None if the graph is another."""
    inputs = [node for node in module.graph.find_nodes(op="placeholder") if node.target != POSITIONS]
    (output,) = module.graph.find_nodes(op="output")
    results = output.args[0]
    values = [node.meta.get("val") for node in inputs]
    if len(inputs) < 2 or not isinstance(results, tuple | list) or len(results) != len(inputs):
        return None
    ids = values[0]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
        return None
    given = [result.meta.get("val") if isinstance(result, Node) else None for result in results[1:]]
    triples = zip(inputs[1:], values[1:], given, strict=True)
    found = [_state(str(node.target), before, after, ids) for node, before, after in triples]
    known = [state for state in found if state is not None]
    return States(tuple(known)) if len(known) == len(found) else None


def _state(name: str, value: Any, after: Any, ids: Tensor) -> State | None:
    """A state by its sizes before and after a call, symbolic ones among them; None: it is none.

    One axis is the batch of the ids. It grows if there are as many rows of it after a call as tokens were given. The
    model fixes all other sizes: what has a value for each token is no state.
    """
    if not isinstance(value, Tensor) or not isinstance(after, Tensor) or value.dim() != after.dim():
        return None
    batch, length = map(str, ids.shape)
    axis = next((axis for axis, size in enumerate(value.shape) if str(size) == batch), None)
    if axis is None:
        return None
    grows = axis != 0 and str(after.shape[0]) == length and str(value.shape[0]) != length
    # Of what the model fixes, only the result may tell the size: torch.export lets an input's vary as the example's.
    sizes = tuple(size for place, size in enumerate(after.shape) if place != axis and not (grows and place == 0))
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return None
    return State(name, sizes, axis, value.dtype, grows)


def head_of(logits: Node) -> Node:
    """The linear that gives some logits, which may be scaled after it; or whatever else does."""
    node = walk.upstream(logits, through=walk.TRANSPARENT | _QUANTIZE)
    while node.target in walk.MUL | walk.DIV and len(list(walk.inputs(node))) == 1:
        node = walk.upstream(next(walk.inputs(node)), through=walk.TRANSPARENT | _QUANTIZE)
    return node


def with_positions(module: GraphModule) -> GraphModule:
    """Adds an input `positions` (count,) int64 and computes logits for those tokens only.

    The head costs as much as many layers, and prefill needs it for the last token alone. Everything from the final
    norm on works row by row, so selecting rows before that gives the same logits as selecting after the head.

    Args:
        module: graph `(input_ids, *states) -> (logits, *states)`.

    Raises:
        MqAoError: the logits do not come from a linear.
    """
    module = flat(module)
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    results: Any = output.args[0]
    head = head_of(results[0])
    if head.target not in _HEADS:
        raise MqAoError(f"the logits come from {head.name}, not from a linear head: this is not a language model.")
    hidden = walk.upstream(next(walk.inputs(head)), through=_ROW_BY_ROW | {walk.getitem})
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        positions = graph.placeholder(POSITIONS)
    readers = _up_to(hidden, head)
    with graph.inserting_before(readers[0]):
        selected = graph.call_function(aten.index_select.default, (hidden, 1, positions))
    selected.meta["val"] = walk.value(hidden)  # of another length
    for reader in readers:
        reader.replace_input_with(hidden, selected)
    module.recompile()
    return module


def _up_to(hidden: Node, head: Node) -> list[Node]:
    """The users of `hidden` that lead to `head` row by row."""

    def leads(node: Node) -> bool:
        return node is head or ((node.target in walk.TRANSPARENT | _ROW_BY_ROW) and any(map(leads, node.users)))

    return [user for user in hidden.users if leads(user)]


def flat(module: GraphModule) -> GraphModule:
    """A copy of the graph, on the same tensors, that takes and returns plain tuples instead of export's pytrees."""
    graph = copy.deepcopy(module.graph)
    graph.set_codegen(CodeGen())
    return GraphModule(module, graph)


class _Callable(torch.nn.Module):
    """Gives a flat GraphModule a signature that torch.export can name inputs by."""

    def __init__(self, module: GraphModule, operators: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.graph_module = module
        self._operators = operators

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Runs the graph."""
        if not self._operators:
            return self.graph_module(*inputs)
        return _Replacing(self.graph_module, self._operators).run(*inputs)


class _Replacing(Interpreter):
    """Runs a graph with other functions in the place of some operators."""

    def __init__(self, module: GraphModule, operators: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__(module)
        self._operators = operators

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the operator, or what stands for it."""
        return super().call_function(self._operators.get(target, target), args, kwargs)


def export(
    module: GraphModule,
    args: tuple[Tensor, ...],
    dynamic: tuple[Mapping[int, Dim | None], ...],
    operators: Mapping[Any, Callable[..., Any]] | None = None,
) -> ExportedProgram:
    """Exports a flat graph.

    Args:
        module: see `flat`.
        args: example inputs.
        dynamic: which of their sizes vary, by axis; None for one that does not.
        operators: functions that are traced in the place of operators.
    """
    shapes = (dynamic,) if args else None
    with torch.no_grad():
        return torch.export.export(_Callable(module, operators or {}), args, dynamic_shapes=shapes)
