"""From a lowered language-model graph to the graphs of a program's methods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401  (registers the q/dq operators)
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.graph import CodeGen

from mq_ao.errors import MqAoError
from mq_ao.graph import walk

aten = torch.ops.aten
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
    torch.ops.mq_ao.qlinear.default,
    torch.ops.mq_ao.qlinear_per_token.default,
    torch.ops.mq_ao.wlinear.default,
}


@dataclass(frozen=True)
class StateShapes:
    """Shapes of a language model's carried states, without the batch.

    Attributes:
        n_layer: number of blocks.
        conv: (d_conv - 1, channels of the convolution).
        ssm: (d_inner, d_state), or (heads, headdim, d_state) in Mamba-2.
        conv_dtype: of the convolutions' states.
        ssm_dtype: of the scans' states: int8 where they are carried as integers.
    """

    n_layer: int
    conv: tuple[int, ...]
    ssm: tuple[int, ...]
    conv_dtype: torch.dtype = torch.float32
    ssm_dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, module: GraphModule) -> StateShapes:
        """Reads them from the placeholders of `(input_ids, conv_state, ssm_state)`.

        Raises:
            MqAoError: the graph has other inputs.
        """
        return cls.of_values(*(node.meta["val"] for node in module.graph.find_nodes(op="placeholder")))

    @classmethod
    def find(cls, module: GraphModule) -> StateShapes | None:
        """The same, or None if the graph has other inputs."""
        values = [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
        if not all(isinstance(value, Tensor) for value in values) or not _are_states(values):
            return None
        return cls.of_values(*values)

    @classmethod
    def of_values(cls, *values: Tensor) -> StateShapes:
        """From example values of these inputs.

        Raises:
            MqAoError: they are others.
        """
        if not _are_states(values):
            raise MqAoError(
                "the graph is not that of a language model with states: its inputs must be input_ids (batch, length), "
                "conv_state (n_layer, batch, d_conv - 1, channels) and ssm_state (n_layer, batch, d_inner, d_state) or "
                "(n_layer, batch, heads, headdim, d_state)."
            )
        _, conv, ssm = values
        conv_shape, ssm_shape = (tuple(map(int, state.shape[2:])) for state in (conv, ssm))
        return cls(int(conv.shape[0]), conv_shape, ssm_shape, conv.dtype, ssm.dtype)

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> StateShapes:
        """From what `described` gave."""
        dtypes = (getattr(torch, described[name]) for name in ("conv_dtype", "ssm_dtype"))
        return cls(described["n_layer"], tuple(described["conv"]), tuple(described["ssm"]), *dtypes)

    @property
    def described(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        dtypes = {"conv_dtype": str(self.conv_dtype)[6:], "ssm_dtype": str(self.ssm_dtype)[6:]}
        return {"n_layer": self.n_layer, "conv": self.conv, "ssm": self.ssm, **dtypes}

    def zeros(self, batch: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Initial conv and ssm states."""
        conv = torch.zeros(self.n_layer, batch, *self.conv, dtype=self.conv_dtype, device=device)
        return conv, torch.zeros(self.n_layer, batch, *self.ssm, dtype=self.ssm_dtype, device=device)


def _are_states(values: Sequence[Tensor]) -> bool:
    return [value.dim() for value in values] in ([2, 4, 4], [2, 4, 5])


def with_positions(module: GraphModule) -> GraphModule:
    """Adds an input `positions` (count,) int64 and computes logits for those tokens only.

    The head costs as much as many layers, and prefill needs it for the last token alone. Everything from the final
    norm on works row by row, so selecting rows before that gives the same logits as selecting after the head.

    Args:
        module: graph `(input_ids, conv_state, ssm_state) -> (logits, conv_state, ssm_state)`.

    Raises:
        MqAoError: the logits do not come from a linear.
    """
    module = flat(module)
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    results: Any = output.args[0]
    head = walk.upstream(results[0], through=walk.TRANSPARENT | _QUANTIZE)
    if head.target not in _HEADS:
        raise MqAoError(f"the logits come from {head.name}, not from a linear head: this is not a language model.")
    hidden = walk.upstream(next(walk.inputs(head)), through=_ROW_BY_ROW | {walk.getitem})
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        positions = graph.placeholder("positions")
    readers = _up_to(hidden, head)
    with graph.inserting_before(readers[0]):
        selected = graph.call_function(aten.index_select.default, (hidden, 1, positions))
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
