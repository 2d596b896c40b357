"""What a converted graph says about quantization: integer operands, their scales, and folded weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401  (registers the q/dq operators)
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.graph import edit, walk
from mq_ao.graph.views import Argument, View
from mq_ao.ops.linear_packed import TOKEN_LIMITS, TOKEN_REACH
from mq_ao.quantizer.kernels import UINT8
from mq_ao.quantizer.observers import CHOOSE
from mq_ao.quantizer.weights import QuantizedWeight

qd = torch.ops.quantized_decomposed

DQ_CHANNEL = qd.dequantize_per_channel.default
DQ_STATIC = qd.dequantize_per_tensor.default
Q_STATIC = qd.quantize_per_tensor.default
DQ_AFFINE = torch.ops.torchao.dequantize_affine
DQ_STATE = torch.ops.mq_ao.dequantize_state.default
DEQUANTIZE = frozenset({DQ_CHANNEL, DQ_STATIC, DQ_AFFINE, DQ_STATE})
Limits = tuple[int, int, torch.dtype]
"""Smallest and largest integer and dtype of static activations."""
# 3-bit weights are held in 4 bits.
_LIMITS = {(-127, 127): 8, (-8, 7): 4, (-4, 3): 4}
_TOKEN_BITS = {limits: bits for bits, limits in TOKEN_LIMITS.items()}


class Quantized(View):
    """A call that puts a value on a grid of integers, or takes it from one."""

    operators = frozenset({Q_STATIC, DQ_STATIC, DQ_CHANNEL, DQ_AFFINE})

    x = Argument[Node]("input")
    scale = Argument[Any]("scale", "scales")
    zero_point = Argument[Any]("zero_point", "zero_points")
    axis = Argument[int]()
    block_size = Argument[list[int]]()
    low = Argument[int]("quant_min")
    high = Argument[int]("quant_max")
    dtype = Argument[torch.dtype]("dtype", "input_dtype")

    @property
    def limits(self) -> Limits:
        """Smallest and largest integer, and their dtype."""
        return self.low, self.high, self.dtype


@dataclass(frozen=True)
class Operand:
    """A float value, or integers with one scale and zero point.

    Attributes:
        node: the float value, or its integers.
        scale: of the integers; 1 for a float value.
        zero_point: of the integers; 0 for a float value.
        static: whether these are integers.
    """

    node: Any
    scale: float = 1.0
    zero_point: int = 0
    static: bool = False

    @classmethod
    def of(cls, node: Any, limits: Limits = UINT8.limits) -> Operand:
        """What an operator that takes such integers reads at `node`."""
        if not isinstance(node, Node) or node.target != DQ_STATIC:
            return cls(node)
        given = Quantized.of(node)
        return cls(given.x, given.scale, given.zero_point, True) if given.limits == limits else cls(node)

    @property
    def arguments(self) -> tuple[Any, float, int]:
        """As operators take it."""
        return self.node, self.scale, self.zero_point


@dataclass(frozen=True)
class Weight:
    """A folded weight, symmetric.

    Attributes:
        values: (out, ...) int8; within -8..7 for 4 bits.
        scale: (out,) float32, or (out, groups).
        bits: 8 or 4.
        group_size: inputs of a group, or 0 for one scale a channel.
    """

    values: Tensor
    scale: Tensor
    bits: int = 8
    group_size: int = 0

    @classmethod
    def of(cls, module: GraphModule, node: object) -> Weight | None:
        """The weight behind a dequantize node, or None if `node` is not one of a folded symmetric weight."""
        if not isinstance(node, Node) or node.target not in (DQ_CHANNEL, DQ_AFFINE):
            return None
        given, group_size = Quantized.of(node), 0
        if node.target == DQ_CHANNEL:
            fits = given.axis == 0
        else:
            block = given.block_size
            fits = len(block) == 2 and block[0] == 1 and given.dtype == torch.int8
            group_size = int(block[-1])
        parts = (given.x, given.scale, given.zero_point)
        constants = all(isinstance(part, Node) and part.op == "get_attr" for part in parts)
        bits = _LIMITS.get(given.limits[:2], 8 if node.target == DQ_CHANNEL else None)
        if not constants or not fits or bits is None:
            return None
        tensors = [edit.constant(module, part) for part in parts]
        if tensors[0].dtype != torch.int8 or tensors[2].any():
            return None
        return cls(tensors[0], tensors[1].float(), bits, group_size)

    @property
    def quantized(self) -> QuantizedWeight:
        """The same, of a matrix."""
        return QuantizedWeight(self.values, self.scale, self.group_size or None, self.bits)

    def rows(self, start: int, stop: int) -> Weight:
        """Output channels start..stop."""
        return Weight(self.values[start:stop], self.scale[start:stop], self.bits, self.group_size)


def is_dequantized(node: object) -> bool:
    """Whether `node` is a dequantize node, of any kind."""
    return isinstance(node, Node) and node.target in DEQUANTIZE


@dataclass(frozen=True)
class Tokens:
    """A float value that is quantized token by token, as `mq_ao::quantize_per_token` does it.

    Attributes:
        source: the float value.
        bits: of the integers, 8 or 4.
        group_size: channels that share a scale; 0: all of a token.
    """

    source: Node
    bits: int = 8
    group_size: int = 0

    @classmethod
    def of(cls, node: object) -> Tokens | None:
        """What `node` dequantizes, or None if that is something else."""
        if not isinstance(node, Node) or node.target != DQ_AFFINE:
            return None
        given = Quantized.of(node)
        choose = walk.argument(given.scale, 0) if walk.is_result(given.scale, 0) else given.scale
        bits = _TOKEN_BITS.get((given.low, given.high))
        if choose.target != CHOOSE or bits is None or given.dtype != torch.int8:
            return None
        chosen, reach = walk.arguments(choose), TOKEN_REACH[bits]
        symmetric = chosen["mapping_type"] == "SYMMETRIC"
        reaches = (chosen["quant_min"], chosen["quant_max"]) == (-reach, reach)
        if not symmetric or not reaches or not set(given.block_size[:-1]) <= {1}:
            return None
        source, size = walk.argument(given.x, 0), int(given.block_size[-1])
        return cls(source, bits, 0 if size == edit.channels(source) else size)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As operators that quantize tokens take it."""
        options = (self.bits, self.group_size)
        return (self.source,) if options == (8, 0) else (self.source, *options)


def carried(node: object) -> tuple[Any, Any]:
    """(value, scale) of a state that `node` quantizes and dequantizes; (`node`, None) if it does not."""
    if not isinstance(node, Node) or node.target != DQ_STATE:
        return node, None
    value, scale = walk.arguments(walk.argument(node, 0)).values()
    return value, scale


def requantize(value: Node, limits: Limits = UINT8.limits) -> Node | None:
    """The one static quantize to such integers that is all that reads `value`, or None."""
    user = walk.only_user(value)
    return user if user is not None and user.target == Q_STATIC and Quantized.of(user).limits == limits else None


def grid_of(quantize: Node | None) -> tuple[float | None, int]:
    """out_scale and out_zero_point of an operator that takes over a static quantize, or gives a float value."""
    if quantize is None:
        return None, 0
    given = Quantized.of(quantize)
    return given.scale, given.zero_point


def merge_dequantize(module: GraphModule) -> None:
    """Makes all readers of the same integers share one dequantize node; `convert_pt2e` gives each its own."""
    seen: dict[tuple[Any, ...], Node] = {}
    for node in walk.calls(module, {DQ_STATIC}):
        first = seen.setdefault((node.target, *node.args), node)
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)


def simulated_nodes(module: GraphModule) -> list[str]:
    """Names of the nodes of a lowered graph that still read dequantized values: they run in float."""
    readers = (user for node in walk.calls(module, DEQUANTIZE) for user in node.users)
    return sorted({reader.name for reader in readers})
