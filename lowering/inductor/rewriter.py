"""Rewrites a converted graph: every dequantize -> operator pair becomes one integer operator of `mq_ao`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mq_ao.graph import walk
from mq_ao.graph.views import Experts
from mq_ao.lowering.graph_rewriter import LinearRewriter, Step, each
from mq_ao.lowering.inductor.kernels import KERNELS
from mq_ao.lowering.inductor.kv_cache import hold_integers
from mq_ao.lowering.patterns import Q_STATIC, Weight, grid_of

aten = torch.ops.aten
mq = torch.ops.mq_ao

INTEGER_KERNELS = frozenset(
    {
        mq.linear_packed.default,
        mq.linear_packed_per_token.default,
        mq.linear_packed_weight_only.default,
        mq.expert_linear_packed.default,
        mq.expert_linear_packed_per_token.default,
        mq.qcausal_conv1d.default,
        mq.qselective_scan.default,
        mq.qssd_scan.default,
        mq.qgate.default,
        mq.qgate_per_token.default,
    }
)
# A piece that begins inside a panel of the kernel is cheaper as columns of a shared product.
_PANEL = 64


class Rewriter(LinearRewriter):
    """Edits one converted GraphModule in place; each method handles one pattern.

    Args:
        module: result of `convert_pt2e`.
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, KERNELS)

    @property
    def steps(self) -> Sequence[Step]:
        """A gate is known by what reads it."""
        gates = each({Q_STATIC, mq.quantize_per_token.default}, self._gate)
        return (each(walk.EXPERTS, self._experts), *super().steps, gates, each(walk.ATTENTION, self._cache))

    def in_pieces(self, x: Node, weight: Weight, bias: Any, bounds: list[tuple[Node, int, int]]) -> bool:
        """A product for each piece, if all begin with a panel."""
        if bias is not None or any(start % _PANEL for _, start, _ in bounds):
            return False
        for piece, start, stop in bounds:
            self.replace(piece, self.product(piece, x, weight.rows(start, stop), None))
        return True

    def product(self, at: Node, x: Node, weight: Weight, bias: Any) -> Node:
        """Integer product before `at`; quantizes its own output where `at` only feeds one static quantize."""
        graph, operand = self.graph, self.operand(x)
        given = self.tokens(x, weight.group_size)
        tokens = None if given is None else self.per_token(given, x, mq.quantize_per_token.default)
        with graph.inserting_before(at):
            packed = self.store("packed", mq.linear_prepack(weight.values, weight.bits, weight.group_size))
            scale = self._scale(weight)
            layout = (weight.bits, weight.group_size)
            if not operand.static and tokens is None:
                return graph.call_function(mq.linear_packed_weight_only.default, (x, packed, scale, bias, *layout))
            following = self.following(at)
            kernel = mq.linear_packed.default if tokens is None else mq.linear_packed_per_token.default
            inputs = operand.arguments if tokens is None else tokens
            product = graph.call_function(kernel, (*inputs, packed, scale, bias, *grid_of(following), *layout))
        if following is not None:
            self.take_over(following, product)
        return product

    def _gate(self, quantize: Node) -> None:
        """Gate, rotation and quantize step of out_proj's input as one operator."""
        args = self.gate(quantize)
        if args is None:
            return
        with self.graph.inserting_before(quantize):
            if quantize.target == Q_STATIC:
                new = self.graph.call_function(mq.qgate.default, (*args, *grid_of(quantize)))
            else:
                new = self.graph.call_function(mq.qgate_per_token.default, (*args, *quantize.args[1:]))
        self.replace(quantize, new)

    def _experts(self, node: Node) -> None:
        """Integer products of the rows of each expert."""
        given = Experts.of(node)
        weight, operand, read = Weight.of(self.module, given.weight), self.operand(given.x), self.tokens(given.x, 0)
        if weight is None or (read is None and not operand.static):
            return
        tokens = None if read is None else self.per_token(read, given.x, mq.quantize_per_token.default)
        experts = given.ends.meta["val"].shape[0]
        values, scale = (part.unflatten(0, (experts, -1)) for part in (weight.values, weight.scale))
        layout = (weight.bits, weight.group_size)
        with self.graph.inserting_before(node):
            packed = self.store("packed", torch.stack([mq.linear_prepack(each, *layout) for each in values]))
            stored = self.store("scale", scale.mT if weight.group_size else scale)
            kernel = mq.expert_linear_packed if tokens is None else mq.expert_linear_packed_per_token
            inputs = operand.arguments if tokens is None else tokens
            product = self.graph.call_function(kernel.default, (*inputs, packed, stored, given.ends, *layout))
        self.replace(node, product)

    def _cache(self, node: Node) -> None:
        """Keys and values in 8 bits."""
        hold_integers(node, lambda value, before: self.per_token(value, before, mq.quantize_per_token.default))

    def _scale(self, weight: Weight) -> Node:
        """Scales as the linear kernels read them: those of one group next to each other."""
        if not weight.group_size:
            return self.store("scale", weight.scale)
        stored = self.store("scale", weight.scale.t())
        return self.graph.call_function(aten.t.default, (stored,))
