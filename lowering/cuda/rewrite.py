"""Rewrites a converted graph: every dequantize -> linear becomes an int8 product with its scales."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.graph import walk
from mq_ao.lowering.integer_graph import count_kernels
from mq_ao.lowering.patterns import INT8, Weight, merge_dequantize, per_token_source
from mq_ao.lowering.rewrite import GraphRewriter
from mq_ao.ops.qlinear import quantize_per_token

aten = torch.ops.aten
mq = torch.ops.mq_ao

INTEGER_KERNELS: frozenset[object] = frozenset({mq.int8_mm.default})


class Rewriter(GraphRewriter):
    """Edits one converted GraphModule in place; each method handles one pattern.

    Args:
        module: result of `convert_pt2e`, with q/dq nodes on int8.
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, INT8)
        self._stored: dict[tuple[int, torch.Size, torch.dtype], str] = {}

    def run(self) -> Counter[str]:
        """Rewrites everything; returns how many integer kernels of each kind the graph calls.

        Raises:
            MqAoError: the graph calls none.
        """
        merge_dequantize(self.module)
        for node in walk.calls(self.module, walk.LINEAR):
            self._linear(node)
        for node in walk.calls(self.module, {aten.embedding.default}):
            self.embedding(node)
        self.graph.eliminate_dead_code()
        self.module.recompile()
        self.module.delete_all_unused_submodules()
        return count_kernels(self.module, INTEGER_KERNELS)

    def _linear(self, node: Node) -> None:
        """Product of integers, less the zero point times the weight's row sums, times the scales, plus the bias."""
        x, weight_node, bias = walk.padded(node, 3)
        weight, operand, source = Weight.of(self.module, weight_node), self.operand(x), per_token_source(x)
        if weight is None or weight.bits != 8 or weight.group_size or not (operand.static or source is not None):
            return
        call, scale = self.graph.call_function, weight.scale
        values, tokens = operand.node, None
        if source is not None:
            # Traced, these are plain operators, which Inductor fuses with the norm or the gate before them.
            values, tokens = self.per_token(source, x, quantize_per_token)
        with self.graph.inserting_before(node):
            matrix = call(aten.t.default, (self.store("weight", weight.values),))
            y = call(mq.int8_mm.default, (self._rows(values, node, weight.values.shape[1]), matrix))
            if tokens is not None:
                y = call(aten.mul.Tensor, (y, self._rows(tokens, node, 1)))
            else:
                if operand.zero_point:
                    sums = weight.values.sum(1, dtype=torch.int32)
                    y = call(aten.sub.Tensor, (y, self.store("correction", sums * operand.zero_point)))
                scale = scale * operand.scale
            y = call(aten.mul.Tensor, (y, self.store("scale", scale)))
            if bias is not None:
                y = call(aten.add.Tensor, (y, bias))
            if (axes := _leading_axes(node)) != 1:
                sizes = [call(aten.sym_size.int, (values, axis)) for axis in range(axes)]
                y = call(aten.reshape.default, (y, [*sizes, weight.values.shape[0]]))
            self.replace(node, y)

    def _rows(self, value: Node, linear: Node, channels: int) -> Node:
        """`value`, which has the leading axes of `linear`, as a matrix."""
        if _leading_axes(linear) == 1:
            return value
        return self.graph.call_function(aten.reshape.default, (value, [-1, channels]))

    def store(self, kind: str, value: Tensor) -> Node:
        """A get_attr node for a buffer, one for each tensor: embedding and head may share their integers."""
        value = value.contiguous()
        key = (value.data_ptr(), value.shape, value.dtype)
        if key in self._stored:
            return self.graph.get_attr(self._stored[key])
        node = super().store(kind, value)
        self._stored[key] = str(node.target)
        return node


def _leading_axes(linear: Node) -> int:
    return int(linear.meta["val"].dim()) - 1
