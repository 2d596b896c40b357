"""Rewrites a converted graph into what XNNPACK takes whole, and calls of the native operators between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.graph import edit, walk
from mq_ao.graph.gate import gate_of
from mq_ao.graph.rows import pieces
from mq_ao.graph.views import Conv, Linear, Norm
from mq_ao.lowering.executorch.kernels import KERNELS
from mq_ao.lowering.graph_rewriter import GraphRewriter, Step, each
from mq_ao.lowering.patterns import DEQUANTIZE
from mq_ao.ops import hadamard_matrix

aten = torch.ops.aten
mq = torch.ops.mq_ao
_SCANS = walk.SCAN | walk.SSD | {mq.qselective_scan.default, mq.qssd_scan.default}


class Rewriter(GraphRewriter):
    """Edits one converted GraphModule in place; each method handles one pattern.

    Linears keep their q/dq nodes, by which XNNPACK's partitioner knows them.

    Args:
        module: result of `convert_pt2e`, with q/dq nodes on int8.
        native: whether our operators take integers; if not, they stay in float.
    """

    def __init__(self, module: GraphModule, native: bool) -> None:
        super().__init__(module, KERNELS)
        self._native = native

    @property
    def steps(self) -> Sequence[Step]:
        """Our operators, or what stands for them; then what XNNPACK is to take whole."""
        native = (
            each({mq.causal_conv1d.default}, self.conv),
            each(walk.SCAN | walk.SSD, self.scan),
            each(walk.MUL, self._gate),
        )
        portable = (each(walk.CONV, self._taps), each(walk.HADAMARD, self._rotation))
        return (
            *(native if self._native else portable),
            each(walk.EMBEDDING, self.embedding),
            each(walk.LINEAR, self._linear),
            each({aten.rms_norm.default}, self._norm),
        )

    def _taps(self, node: Node) -> None:
        """A float convolution's weight as `portable` takes it: no operator is quantized without its output."""
        conv = Conv.of(node)
        taps = edit.constant(self.module, conv.weight).unsqueeze(1).clone()
        with self.graph.inserting_before(node):
            conv.weight = self.store("taps", taps)

    def _rotation(self, node: Node) -> None:
        """Two products with small matrices, whose Kronecker product is the rotation."""
        width = edit.channels(node)
        order, power = hadamard_matrix.factor(width)
        call = self.graph.call_function
        with self.graph.inserting_before(node):
            x = walk.argument(node, 0)
            if order > 1:
                x = call(aten.unflatten.int, (x, -1, [order, power]))
            inner = hadamard_matrix.sylvester(power) * width**-0.5
            x = call(aten.linear.default, (x, self.constant("sylvester", inner.float())))
            if order > 1:
                outer = self.constant("paley", hadamard_matrix.base(order).t().float().contiguous())
                x = call(aten.linear.default, (call(aten.transpose.int, (x, -1, -2)), outer))
                x = call(aten.flatten.using_ints, (call(aten.transpose.int, (x, -1, -2)), -2))
        self.replace(node, x)

    def _linear(self, node: Node) -> None:
        """One linear for every piece of an output that is split: XNNPACK cannot slice values of dynamic length."""
        linear = Linear.of(node)
        for piece, start, stop in pieces(node) or []:
            with self.graph.inserting_before(piece):
                args = [linear.x, self._rows(linear.weight, start, stop)]
                if linear.bias is not None:
                    args.append(self._rows(linear.bias, start, stop))
                self.replace(piece, self.graph.call_function(aten.linear.default, tuple(args)))

    def _rows(self, value: Node, start: int, stop: int) -> Node:
        """Rows of a parameter, or of what dequantizes one."""
        if value.op == "get_attr":
            # A copy: the serialiser writes a view from the start of its storage, whatever its offset.
            return self.store("part", edit.constant(self.module, value)[start:stop].clone())
        assert callable(value.target) and value.target in DEQUANTIZE, (
            f"{value.name} is neither a parameter nor dequantized"
        )
        args = [self._rows(arg, start, stop) if isinstance(arg, Node) else arg for arg in value.args]
        return self.graph.call_function(value.target, tuple(args), dict(value.kwargs))

    def _norm(self, node: Node) -> None:
        """x / sqrt(mean(x^2) + eps), the mean as a product with a constant: XNNPACK has no mean of the last axis."""
        norm = Norm.of(node)
        if len(norm.shape) != 1:
            return
        epsilon = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        call = self.graph.call_function
        with self.graph.inserting_before(node):
            ones = self.constant("mean", torch.full((1, norm.shape[0]), 1.0 / norm.shape[0]))
            mean = call(aten.linear.default, (call(aten.mul.Tensor, (norm.x, norm.x)), ones))
            inverse = call(
                aten.rsqrt.default, (call(aten.add.Tensor, (mean, self.constant("eps", torch.tensor([epsilon])))),)
            )
            result = call(aten.mul.Tensor, (norm.x, inverse))
            if norm.weight is not None:
                result = call(aten.mul.Tensor, (result, norm.weight))
        self.replace(node, result)

    def _gate(self, product: Node) -> None:
        """Gate and rotation as one native operator."""
        gate = next((found for y in walk.inputs(product) if (found := gate_of(product, y)) is not None), None)
        if gate is None or not gate.is_plain or walk.upstream(gate.y).target not in _SCANS:
            return
        following = walk.only_user(product)
        rotated = (
            following is not None and following.target in walk.HADAMARD and walk.arguments(following)["scale"] is None
        )
        last = following if rotated and following is not None else product
        with self.graph.inserting_before(last):
            args: tuple[Any, ...] = (gate.y, gate.z, gate.scale, rotated)
            self.replace(last, self.graph.call_function(mq.gate.default, args))

    def constant(self, kind: str, value: Tensor) -> Node:
        """A get_attr node for a constant, one for all equal ones."""
        name = f"constant_{kind}_{value.numel()}"
        known = getattr(self.module, name, None)
        if known is not None and not torch.equal(known, value):
            return self.store(kind, value)
        if known is None:
            self.module.register_buffer(name, value)
        return self.graph.get_attr(name)
