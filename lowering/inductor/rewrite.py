"""Rewrites a converted graph: every dequantize -> operator pair becomes one integer operator of `mq_ao`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.errors import MqAoError
from mq_ao.graph import walk
from mq_ao.graph.gate import gate_of
from mq_ao.graph.rows import piece_bounds
from mq_ao.lowering.inductor.patterns import (
    DQ_STATE,
    Q_STATIC,
    UINT8,
    Operand,
    Weight,
    carried,
    is_dequantized,
    merge_dequantize,
    only_user,
    per_token_source,
    requantize,
)

aten = torch.ops.aten
mq = torch.ops.mq_ao

INTEGER_KERNELS = frozenset(
    {
        mq.qlinear.default,
        mq.qlinear_per_token.default,
        mq.wlinear.default,
        mq.qcausal_conv1d.default,
        mq.qselective_scan.default,
        mq.qgate.default,
        mq.qgate_per_token.default,
    }
)
# Narrower pieces than one panel of the kernel are cheaper as columns of a shared product.
_PANEL = 64


class Rewriter:
    """Edits one converted GraphModule in place; each method handles one pattern.

    Args:
        module: result of `convert_pt2e`.
    """

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        self._names: Counter[str] = Counter()
        self._tokens: dict[Node, tuple[Node, Node]] = {}

    def run(self) -> Counter[str]:
        """Rewrites everything; returns how many integer kernels of each kind the graph calls.

        Raises:
            MqAoError: the graph calls none.
        """
        merge_dequantize(self.module)
        for node in walk.calls(self.module, {mq.causal_conv1d.default}):
            self._conv(node)
        for node in walk.calls(self.module, walk.SCAN):
            self._scan(node)
        for node in walk.calls(self.module, walk.LINEAR):
            self._linear(node)
        for node in walk.calls(self.module, {aten.embedding.default}):
            self._embedding(node)
        self.graph.eliminate_dead_code()  # what else read the gates' outputs
        for node in walk.calls(self.module, {Q_STATIC, mq.quantize_per_token.default}):
            self._gate(node)
        self.graph.eliminate_dead_code()
        self.module.recompile()
        self.module.delete_all_unused_submodules()
        return count_integer_kernels(self.module)

    def _linear(self, node: Node) -> None:
        x, weight_node, bias = walk.padded(node, 3)
        weight = Weight.of(self.module, weight_node)
        known = not is_dequantized(x) or Operand.of(x).static or per_token_source(x) is not None
        if weight is None or not known:
            return
        bounds = _wide_pieces(node)
        if bounds is None or bias is not None:
            self._replace(node, self._product(node, x, weight, bias))
            return
        # Two products where the pieces are used apart: each then quantizes its own output, or not.
        for getitem, start, stop in bounds:
            self._replace(getitem, self._product(getitem, x, weight.rows(start, stop), None))

    def _product(self, at: Node, x: Node, weight: Weight, bias: Any) -> Node:
        """Integer product before `at`; quantizes its own output where `at` only feeds one static quantize."""
        graph, operand = self.graph, Operand.of(x)
        source = per_token_source(x)
        tokens = None if source is None else self._per_token(source, x)
        with graph.inserting_before(at):
            packed = self._store("packed", mq.qlinear_prepack(weight.values, weight.bits, weight.group_size))
            scale = self._scale(weight)
            layout = (weight.bits, weight.group_size)
            if not operand.static and tokens is None:
                return graph.call_function(mq.wlinear.default, (x, packed, scale, bias, *layout))
            following = requantize(at)
            out = (None, 0) if following is None else (following.args[1], following.args[2])
            if tokens is not None:
                kernel, inputs = mq.qlinear_per_token.default, tokens
            else:
                kernel, inputs = mq.qlinear.default, operand.arguments
            product = graph.call_function(kernel, (*inputs, packed, scale, bias, *out, *layout))
        if following is not None:
            self._take_over(following, product)
        return product

    def _per_token(self, source: Node, before: Node) -> tuple[Node, Node]:
        """(integers, scales) of a value that is quantized token by token, once for all who read it."""
        if source not in self._tokens:
            with self.graph.inserting_before(before):
                quantize = self.graph.call_function(mq.quantize_per_token.default, (source,))
                self._tokens[source] = self._outputs(quantize)
        return self._tokens[source]

    def _conv(self, node: Node) -> None:
        x, weight_node, bias, state, activation = walk.padded(node, 5)
        weight, operand = Weight.of(self.module, weight_node), Operand.of(x)
        if weight is None or not operand.static:
            return
        y = _output(node, 0)
        following = None if y is None else requantize(y)
        out = (None, 0) if following is None else (following.args[1], following.args[2])
        with self.graph.inserting_before(node):
            values, scale = self._store("taps", weight.values), self._store("scale", weight.scale)
            args = (*operand.arguments, values, scale, bias, state, activation, *out)
            self._replace(node, self.graph.call_function(mq.qcausal_conv1d.default, args))
        if following is not None and y is not None:
            self._take_over(following, y)

    def _scan(self, node: Node) -> None:
        u, delta, a, b, c, skip, bias, softplus, initial = walk.padded(node, 9)
        state, state_scale = carried(initial)
        operands = [Operand.of(value) for value in (u, delta, b, c)]
        y, last = _output(node, 0), _output(node, 1)
        following = None if y is None else requantize(y)
        if following is None and state_scale is None and not any(operand.static for operand in operands):
            return
        out = (None, 0) if following is None else (following.args[1], following.args[2])
        first, second, *rest = (operand.arguments for operand in operands)
        with self.graph.inserting_before(node):
            args = (*first, *second, a, *rest[0], *rest[1], skip, bias, bool(softplus), state, state_scale, *out)
            self._replace(node, self.graph.call_function(mq.qselective_scan.default, args))
        if state_scale is not None and last is not None:
            self._carry(last, state)
        if following is not None and y is not None:
            self._take_over(following, y)

    def _carry(self, last: Node, state: Node) -> None:
        """The graph takes and gives the integers that a scan reads (`state`) and writes (`last`)."""
        for dequantize in walk.calls(self.module, {DQ_STATE}):
            if carried(dequantize)[0] is last:
                self._take_over(dequantize, last)
        source = walk.upstream(state)
        source.meta["val"] = source.meta["val"].to(torch.int8)

    def _gate(self, quantize: Node) -> None:
        """Gate, rotation and quantize step of out_proj's input as one operator."""
        x: Any = quantize.args[0]
        rotated = x.target in walk.HADAMARD
        product = x.args[0] if rotated else x
        if product.target not in walk.MUL or only_user(x) is not quantize or (rotated and only_user(product) is not x):
            return
        gate = next((found for y in walk.inputs(product) if (found := gate_of(product, y)) is not None), None)
        if gate is None:
            return
        y, z = Operand.of(gate.y), Operand.of(gate.z)
        if walk.upstream(y.node).target not in walk.SCAN | {mq.qselective_scan.default}:
            return
        with self.graph.inserting_before(quantize):
            args = (*y.arguments, *z.arguments, gate.scale, rotated)
            if quantize.target == Q_STATIC:
                if quantize.args[3:] != UINT8:
                    return
                new = self.graph.call_function(mq.qgate.default, (*args, *quantize.args[1:3]))
            else:
                new = self.graph.call_function(mq.qgate_per_token.default, args)
        self._replace(quantize, new)

    def _embedding(self, node: Node) -> None:
        weight = Weight.of(self.module, node.args[0])
        if weight is None:
            return
        with self.graph.inserting_before(node):
            values, scale = self._store("rows", weight.values), self._store("scale", weight.scale[:, None])
            rows = self.graph.call_function(aten.embedding.default, (values, node.args[1]))
            scales = self.graph.call_function(aten.embedding.default, (scale, node.args[1]))
            self._replace(node, self.graph.call_function(aten.mul.Tensor, (rows, scales)))

    def _replace(self, old: Node, new: Node) -> None:
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def _take_over(self, quantize: Node, producer: Node) -> None:
        """`producer` now gives the integers that `quantize` gave."""
        quantize.replace_all_uses_with(producer)
        self.graph.erase_node(quantize)

    def _outputs(self, node: Node) -> tuple[Node, Node]:
        first, second = (self.graph.call_function(walk.getitem, (node, index)) for index in (0, 1))
        return first, second

    def _scale(self, weight: Weight) -> Node:
        """Scales as the linear kernels read them: those of one group next to each other."""
        if not weight.group_size:
            return self._store("scale", weight.scale)
        stored = self._store("scale", weight.scale.t())
        return self.graph.call_function(aten.t.default, (stored,))

    def _store(self, kind: str, value: Tensor) -> Node:
        """A get_attr node for a new buffer."""
        name = f"int8_{kind}_{self._names[kind]}"
        self._names[kind] += 1
        self.module.register_buffer(name, value.contiguous())
        return self.graph.get_attr(name)


def count_integer_kernels(module: GraphModule) -> Counter[str]:
    """Calls of integer kernels in a lowered graph, by operator name.

    Raises:
        MqAoError: there are none, so nothing would run in integers.
    """
    counts = Counter(str(node.target) for node in walk.calls(module, INTEGER_KERNELS))
    if not counts:
        raise MqAoError(
            "no integer kernel in the lowered graph: nothing in it was quantized. Check the quantizer's report, and "
            "that convert_pt2e was called on the prepared graph."
        )
    return counts


def _output(node: Node, index: int) -> Node | None:
    """The getitem of one result of a node."""
    return next((user for user in node.users if user.args[1:] == (index,)), None)


def _wide_pieces(node: Node) -> list[tuple[Node, int, int]] | None:
    """(getitem, start, stop) of a linear that is only read in wide pieces along its last axis, else None."""
    split = only_user(node)
    bounds = None if split is None else piece_bounds(split)
    if split is None or bounds is None or any((stop - start) % _PANEL for start, stop in bounds):
        return None
    return [(user, *bounds[user.args[1]]) for user in split.users]
