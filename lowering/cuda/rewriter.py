"""Rewrites a converted graph: every dequantize -> operator pair becomes one int8 operator of `mq_ao`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.errors import MqAoError
from mq_ao.graph import walk
from mq_ao.lowering.cuda.kernels import KERNELS
from mq_ao.lowering.graph_rewriter import LinearRewriter, Step, each
from mq_ao.lowering.patterns import Q_STATIC, Weight, grid_of
from mq_ao.ops import nibbles
from mq_ao.ops.linear_packed import int8_per_token
from mq_ao.ops.linear_rows import MOST_PIECES

aten = torch.ops.aten
mq = torch.ops.mq_ao

INTEGER_LINEARS: frozenset[object] = frozenset(
    {mq.linear_rows.default, mq.linears_rows.default, mq.linear_rows_weight_only.default}
)
INTEGER_KERNELS: frozenset[object] = INTEGER_LINEARS | {
    mq.qcausal_conv1d.default,
    mq.qselective_scan.default,
    mq.qssd_scan.default,
    mq.int8_gate.default,
    mq.int8_rms_norm.default,
}
# What int4 weights with one scale a channel are packed in: their groups then have equal scales. Where it does not
# divide a linear's inputs, they take a byte each.
_GROUP = 64


class Rewriter(LinearRewriter):
    """Edits one converted GraphModule in place; each method handles one pattern.

    Args:
        module: result of `convert_pt2e`, with q/dq nodes on int8.
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, KERNELS)
        self._stored: dict[tuple[int, torch.Size, torch.dtype], str] = {}

    @property
    def steps(self) -> Sequence[Step]:
        """Gates and norms are known by what reads them."""
        return (
            *super().steps,
            each({Q_STATIC, int8_per_token}, self._gate),
            each({Q_STATIC, int8_per_token}, partial(self.norm, mq.int8_rms_norm.default)),
        )

    def in_pieces(self, x: Node, weight: Weight, bias: Any, bounds: list[tuple[Node, int, int]]) -> bool:
        """One kernel for all pieces, if it can round one of them for what follows."""
        stops = [0, *(stop for _, _, stop in bounds)]
        joined = [start for _, start, _ in bounds] == stops[:-1] and stops[-1] == len(weight.values)
        following = [self.following(piece) for piece, _, _ in bounds]
        if not joined or len(bounds) > MOST_PIECES or not any(following):
            return False
        at = walk.argument(walk.argument(bounds[0][0], 0), 0)  # the linear
        operands = self._operands(at, x, weight)
        if operands is None:
            return False
        *first, group_size = operands
        sizes = [stop - start for _, start, stop in bounds]
        # A scale of 0 is that of a float piece.
        grids = [(0.0, 0) if quantize is None else grid_of(quantize) for quantize in following]
        scales, zero_points = (list(values) for values in zip(*grids, strict=True))
        with self.graph.inserting_before(at):
            args = (*first, bias, sizes, scales, zero_points, group_size)
            new = self.graph.call_function(mq.linears_rows.default, args)
            new.meta = {key: value for key, value in at.meta.items() if key != "val"}
            values = [self.graph.call_function(walk.getitem, (new, index)) for index in range(len(bounds))]
        for (piece, _, _), value, quantize in zip(bounds, values, following, strict=True):
            self.replace(piece, value)
            if quantize is not None:
                self.take_over(quantize, value)
        return True

    def product(self, at: Node, x: Node, weight: Weight, bias: Any) -> Node:
        """Product with integer weights before `at`; quantizes its output where `at` only feeds one static quantize."""
        operands = self._operands(at, x, weight)
        with self.graph.inserting_before(at):
            if operands is None:
                values, scale, group_size = self._layout(at, weight)
                args = (x, self.store("weight", values), self._scale(scale, group_size), bias, group_size)
                return self.graph.call_function(mq.linear_rows_weight_only.default, args)
            *first, group_size = operands
            following = self.following(at)
            args = (*first, bias, *grid_of(following), group_size)
            new = self.graph.call_function(mq.linear_rows.default, args)
        if following is not None:
            self.take_over(following, new)
        return new

    def _operands(self, at: Node, x: Node, weight: Weight) -> tuple[Any, ...] | None:
        """q, token_scale, weight, scale, correction and group_size of `linear_rows`; None if x stays in float."""
        operand, tokens = self.operand(x), self.tokens(x, 0)
        if tokens is None and not operand.static:
            return None
        # Traced, the rounding of tokens is plain operators, which Inductor fuses with what is before them.
        q, token_scale = (operand.node, None) if tokens is None else self.per_token(tokens, x, int8_per_token)
        values, scale, group_size = self._layout(at, weight)
        correction = None
        with self.graph.inserting_before(at):
            if operand.static:
                scale = scale * operand.scale
                if operand.zero_point:
                    groups = weight.values.unflatten(1, (-1, group_size or weight.values.shape[1]))
                    sums = groups.sum(-1, dtype=torch.int32).view(scale.shape) * operand.zero_point
                    correction = self.store("correction", sums)
            return q, token_scale, self.store("weight", values), self._scale(scale, group_size), correction, group_size

    def _layout(self, at: Node, weight: Weight) -> tuple[Tensor, Tensor, int]:
        """Integers, scales and group size as the kernels read them."""
        scale, group_size, inputs = weight.scale, weight.group_size, weight.values.shape[1]
        packed = weight.bits == 4 and inputs % _GROUP == 0
        if packed and not group_size:
            group_size = _GROUP
            scale = scale[:, None].expand(-1, inputs // _GROUP)
        if group_size and inputs % group_size:
            raise MqAoError(
                f"{at.name}: groups of {group_size} weights do not divide its {inputs} inputs, which the GPU kernels "
                "need: choose another group_size, or None for one scale a channel."
            )
        return nibbles.pack(weight.values, group_size) if packed else weight.values, scale, group_size

    def _scale(self, scale: Tensor, group_size: int) -> Node:
        """Scales of groups in half the bytes, where they are bfloat16 numbers as the quantizer makes them."""
        half = scale.to(torch.bfloat16)
        return self.store("scale", half if group_size and torch.equal(half.to(scale.dtype), scale) else scale)

    def _gate(self, quantize: Node) -> None:
        """Gate, rotation and quantize step of out_proj's input as one operator."""
        args = self.gate(quantize)
        if args is not None:
            self.fused(quantize, mq.int8_gate.default, args)

    def store(self, kind: str, value: Tensor) -> Node:
        """A get_attr node for a buffer, one for each tensor: embedding and head may share their integers."""
        value = value.contiguous()
        key = (value.data_ptr(), value.shape, value.dtype)
        if key in self._stored:
            return self.graph.get_attr(self._stored[key])
        node = super().store(kind, value)
        self._stored[key] = str(node.target)
        stored = self.module.get_buffer(str(node.target))
        if stored.untyped_storage().nbytes() != stored.nbytes:
            # Rows of a weight: alone they can be saved, moved and freed by themselves.
            self.module.register_buffer(str(node.target), stored.clone())
        return node
