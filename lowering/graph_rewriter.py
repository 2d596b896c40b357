"""What every lowering does to a converted graph: q/dq around convolution, scan and embedding becomes integers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.graph import edit, walk
from mq_ao.graph.gate import Gate, gate_of
from mq_ao.graph.rows import pieces
from mq_ao.graph.views import Conv, Layer, Linear, Norm, Scan
from mq_ao.lowering.patterns import (
    DQ_STATE,
    Q_STATIC,
    Operand,
    Quantized,
    Tokens,
    Weight,
    carried,
    grid_of,
    is_dequantized,
    merge_dequantize,
    requantize,
)
from mq_ao.quantizer.kernels import UINT8, Kernels

aten = torch.ops.aten
mq = torch.ops.mq_ao


Step = Callable[[GraphModule], None]
"""Edits a graph in place."""


def each(operators: Collection[object], edit: Callable[[Node], None]) -> Step:
    """The step that edits every call of some operators, in the order of the graph as it is by then."""

    def step(module: GraphModule) -> None:
        for node in walk.calls(module, operators):
            edit(node)

    return step


def drop_unread(module: GraphModule) -> None:
    """The step that erases what nobody reads, which else counts as a reader of what it reads."""
    module.graph.eliminate_dead_code()


class GraphRewriter(ABC):
    """Edits one converted GraphModule in place; each method handles one pattern.

    Args:
        module: result of `convert_pt2e`.
        kernels: of the backend.
    """

    def __init__(self, module: GraphModule, kernels: Kernels) -> None:
        self.module = module
        self.graph = module.graph
        self.limits = kernels.static.limits
        self._token_bits = kernels.per_token.keys()
        self._names: Counter[str] = Counter()
        self._tokens: dict[Tokens, tuple[Node, Node]] = {}

    @property
    @abstractmethod
    def steps(self) -> Sequence[Step]:
        """What is done to the graph, in order."""

    def run(self) -> None:
        """Rewrites everything.

        Raises:
            MqAoError: the backend cannot hold a weight as it was quantized.
        """
        for step in self.steps:
            step(self.module)
        drop_unread(self.module)
        self.module.recompile()
        self.module.delete_all_unused_submodules()

    def operand(self, node: Any) -> Operand:
        """What a kernel of the backend reads at `node`."""
        return Operand.of(node, self.limits)

    def tokens(self, node: Any, group_size: int) -> Tokens | None:
        """What a kernel of the backend reads at `node` token by token, with weights of such groups, or None."""
        found = Tokens.of(node)
        fits = found is not None and found.bits in self._token_bits and found.group_size in (0, group_size)
        return found if fits else None

    def following(self, value: Node | None) -> Node | None:
        """The one static quantize that is all that reads `value`, or None."""
        return None if value is None else requantize(value, self.limits)

    def gate(self, quantize: Node) -> tuple[Any, ...] | None:
        """What an operator for gate, rotation and this quantize step takes: y, z, smoothing, whether it rotates."""
        x = walk.argument(quantize, 0)
        rotated = x.target in walk.HADAMARD
        product = walk.argument(x, 0) if rotated else x
        alone = walk.only_user(x) is quantize and (not rotated or walk.only_user(product) is x)
        if product.target not in walk.MUL or not alone:
            return None
        gate = _plain_gate(product)
        if gate is None or not self.readable(quantize):
            return None
        y, z = self.operand(gate.y), self.operand(gate.z)
        return *y.arguments, *z.arguments, gate.scale, rotated

    def gated_norm(self, operator: Any, quantize: Node) -> None:
        """Gate, RMSNorm, rotation if there is one, and the one quantize step that reads them as one `operator`.

        It takes `(y, z, weight, eps, hadamard, out_scale, out_zero_point, bits, group_size)`, and gives integers and
        scales.
        """
        x = walk.argument(quantize, 0)
        rotated = x.target in walk.HADAMARD
        norm = walk.argument(x, 0) if rotated else x
        if norm.target != aten.rms_norm.default or (rotated and (len(x.args) > 1 or x.kwargs)):
            return
        given = Norm.of(norm)
        chain = [given.x, norm, x, quantize] if rotated else [given.x, norm, quantize]
        if not all(walk.only_user(node) is reader for node, reader in pairwise(chain)) or not self.readable(quantize):
            return
        gate = _plain_gate(given.x) if given.x.target in walk.MUL else None
        if gate is None or gate.scale is not None or len(given.shape) != 1 or given.eps is None:
            return
        self.fused(quantize, operator, (gate.y, gate.z, given.weight, given.eps, rotated))

    def norm(self, operator: Any, quantize: Node) -> None:
        """The sum before an RMSNorm, the norm, and the one quantize step that reads it as one `operator`.

        It takes `(x, residual, weight, eps, out_scale, out_zero_point, bits, group_size)`, and gives integers, scales
        and the sum.
        """
        norm = walk.argument(quantize, 0)
        if norm.target != aten.rms_norm.default or walk.only_user(norm) is not quantize or not self.readable(quantize):
            return
        given = Norm.of(norm)
        if len(given.shape) != 1 or given.eps is None:
            return
        x: Any = given.x
        fuses = x.target in walk.ADD and not x.kwargs and _alike(*x.args)
        new = self.fused(quantize, operator, (*(x.args if fuses else (x, None)), given.weight, given.eps))
        if fuses:
            with self.graph.inserting_after(new):
                total = self.graph.call_function(walk.getitem, (new, 2))
            total.meta = dict(x.meta)
            x.replace_all_uses_with(total, delete_user_cb=lambda user: user is not norm)

    def fused(self, quantize: Node, operator: Any, args: tuple[Any, ...]) -> Node:
        """`operator`, which ends with the quantize step, in its place; it gives integers and scales."""
        with self.graph.inserting_before(quantize):
            if quantize.target != Q_STATIC:
                options = quantize.args[1:]
                new = self.graph.call_function(operator, (*args, None, 0, *options) if options else args)
                self.replace(quantize, new)
            else:
                new = self.graph.call_function(operator, (*args, *grid_of(quantize)))
                integers, _ = self.outputs(new)
                self.replace(quantize, integers)
        return new

    def readable(self, quantize: Node) -> bool:
        """Whether a quantize node gives integers that the backend's kernels give."""
        return quantize.target != Q_STATIC or Quantized.of(quantize).limits == self.limits

    def conv(self, node: Node) -> None:
        """A convolution of static integers, which quantizes its own output where only that is read."""
        conv = Conv.of(node)
        weight, operand = Weight.of(self.module, conv.weight), self.operand(conv.x)
        if weight is None or not operand.static:
            return
        y = walk.result(node, 0)
        following = self.following(y)
        with self.graph.inserting_before(node):
            values, scale = self.store("taps", weight.values), self.store("scale", weight.scale)
            args = (*operand.arguments, values, scale, conv.bias, conv.initial_state, conv.activation)
            self.replace(node, self.graph.call_function(mq.qcausal_conv1d.default, (*args, *grid_of(following))))
        if following is not None and y is not None:
            self.take_over(following, y)

    def scan(self, node: Node) -> None:
        """A scan with integers among its operands, output and carried states."""
        scan = Scan.of(node)
        state, state_scale = carried(scan.initial_state)
        operands = [self.operand(value) for value in (scan.u, scan.delta, scan.b, scan.c)]
        y, last = walk.result(node, 0), walk.result(node, 1)
        # The scan's own integers are uint8 unless u is int8.
        following = self.following(y) if operands[0].static or self.limits == UINT8.limits else None
        if following is None and state_scale is None and not any(operand.static for operand in operands):
            return
        out = grid_of(following)
        first, second, third, fourth = (operand.arguments for operand in operands)
        with self.graph.inserting_before(node):
            args = (*first, *second, scan.a, *third, *fourth, scan.skip, scan.bias, scan.softplus)
            if node.target in walk.SCAN:
                new = self.graph.call_function(mq.qselective_scan.default, (*args, state, state_scale, *out))
            else:
                rest = (scan.dt_min, scan.dt_max, state, scan.seq_idx)
                new = self.graph.call_function(mq.qssd_scan.default, (*args, *rest, *out))
            self.replace(node, new)
        if state_scale is not None and last is not None:
            self._carry(last, state)
        if following is not None and y is not None:
            self.take_over(following, y)

    def _carry(self, last: Node, state: Node) -> None:
        """The graph takes and gives the integers that a scan reads (`state`) and writes (`last`)."""
        for dequantize in walk.calls(self.module, {DQ_STATE}):
            if carried(dequantize)[0] is last:
                self.take_over(dequantize, last)
        source = walk.upstream(state)
        source.meta["val"] = source.meta["val"].to(torch.int8)

    def embedding(self, node: Node) -> None:
        """A gather of integer rows, times the scales of these rows."""
        given = Layer.of(node)
        weight = Weight.of(self.module, given.weight)
        if weight is None:
            return
        with self.graph.inserting_before(node):
            values, scale = self.store("rows", weight.values), self.store("scale", weight.scale[:, None])
            rows = self.graph.call_function(aten.embedding.default, (values, given.x))
            scales = self.graph.call_function(aten.embedding.default, (scale, given.x))
            self.replace(node, self.graph.call_function(aten.mul.Tensor, (rows, scales)))

    def per_token(self, tokens: Tokens, before: Node, quantize: Callable[..., Any]) -> tuple[Node, Node]:
        """(integers, scales) of a value that is quantized token by token, once for all who read it."""
        if tokens not in self._tokens:
            with self.graph.inserting_before(before):
                self._tokens[tokens] = self.outputs(self.graph.call_function(quantize, tokens.arguments))
        return self._tokens[tokens]

    def replace(self, old: Node, new: Node) -> None:
        """Puts `new` in the place of `old`."""
        edit.replace(old, new)

    def take_over(self, quantize: Node, producer: Node) -> None:
        """`producer` now gives the integers that `quantize` gave."""
        quantize.replace_all_uses_with(producer)
        self.graph.erase_node(quantize)

    def outputs(self, node: Node) -> tuple[Node, Node]:
        """Both results of a node."""
        first, second = (self.graph.call_function(walk.getitem, (node, index)) for index in (0, 1))
        return first, second

    def store(self, kind: str, value: Tensor) -> Node:
        """A get_attr node for a new buffer."""
        name = f"int8_{kind}_{self._names[kind]}"
        self._names[kind] += 1
        self.module.register_buffer(name, value.contiguous())
        return self.graph.get_attr(name)


class LinearRewriter(GraphRewriter):
    """One whose backend has products of its own, which can give the pieces of a linear."""

    @property
    def steps(self) -> Sequence[Step]:
        """Layers and scans. What is known by what reads it comes after: that is an integer operator by then."""
        return (
            merge_dequantize,
            each({mq.causal_conv1d.default}, self.conv),
            each(walk.SCAN | walk.SSD, self.scan),
            each(walk.LINEAR, self.linear),
            each(walk.EMBEDDING, self.embedding),
            drop_unread,
        )

    @abstractmethod
    def product(self, at: Node, x: Node, weight: Weight, bias: Any) -> Node:
        """The backend's product before `at`, which it stands for."""

    @abstractmethod
    def in_pieces(self, x: Node, weight: Weight, bias: Any, bounds: list[tuple[Node, int, int]]) -> bool:
        """Replaces the pieces (value, start, stop) of a linear by what quantizes its own output; False: stays whole."""

    def linear(self, node: Node) -> None:
        """A linear with an integer weight; where only pieces of it are read, these pieces."""
        linear = Linear.of(node)
        x, weight, bias = linear.x, Weight.of(self.module, linear.weight), linear.bias
        if weight is None:
            return
        known = not is_dequantized(x) or self.operand(x).static or self.tokens(x, weight.group_size) is not None
        if not known:
            return
        bounds = pieces(node)
        if bounds is None or not self.in_pieces(x, weight, bias, bounds):
            self.replace(node, self.product(node, x, weight, bias))


def _plain_gate(product: Node) -> Gate | None:
    """The gate whose product this is, if nothing but y, z and a smoothing is in it."""
    gate = next((found for y in walk.inputs(product) if (found := gate_of(product, y)) is not None), None)
    return gate if gate is not None and gate.is_plain else None


def _alike(a: object, b: object) -> bool:
    """Whether two operands of a sum are values of one shape, on floats."""
    if not isinstance(a, Node) or not isinstance(b, Node):
        return False
    first, second = walk.value(a), walk.value(b)
    return first.shape == second.shape and first.dtype == second.dtype == torch.float32
