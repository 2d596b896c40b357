"""Products with parameters as linears, and sums of linears of one input as one linear."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from mq_ao.graph import walk
from mq_ao.graph.canonical.spelling import Spelling, both_ways
from mq_ao.graph.views import Linear

aten = walk.aten

_PRODUCTS = frozenset({aten.matmul.default, aten.mm.default})
_TRANSPOSES = frozenset({aten.t.default, aten.numpy_T.default, aten.mT.default})


def linear(spelling: Spelling, node: Node) -> None:
    """x @ W^T, and b + x @ W^T in one operator."""
    operands: list[Any] = list(node.args)
    bias = operands.pop(0) if node.target == aten.addmm.default and not node.kwargs else None
    if node.target not in _PRODUCTS and bias is None:
        return
    x, matrix = operands
    if x.meta["val"].dim() < 2 or spelling.is_constant(x):
        return
    if matrix.meta["val"].dim() != 2 or not spelling.is_constant(matrix):
        return
    if bias is not None and not spelling.is_vector(bias, matrix.meta["val"].shape[1]):
        return
    args = (x, _transposed(spelling, matrix, node))
    spelling.become(node, aten.linear.default, args if bias is None else (*args, spelling.vector(bias, node)))


def biased(spelling: Spelling, node: Node) -> None:
    """A linear without a bias, plus one number a channel."""
    if node.target not in walk.ADD or node.kwargs:
        return
    for product, bias in both_ways(node):
        if not isinstance(product, Node) or product.target not in walk.LINEAR or walk.only_user(product) is not node:
            continue
        given = Linear.of(product)
        if given.bias is None and spelling.is_vector(bias, product.meta["val"].shape[-1]):
            spelling.become(node, aten.linear.default, (given.x, given.weight, spelling.vector(bias, node)))
            return


def merged(spelling: Spelling, node: Node) -> None:
    """A linear plus others of the same input, such as a low-rank adapter (LoRA): W x + s B A x = (W + s B A) x."""
    if node.target not in walk.ADD or node.kwargs:
        return
    for product, other in both_ways(node):
        if not isinstance(product, Node) or not isinstance(other, Node) or walk.only_user(product) is not node:
            continue
        if product.target not in walk.LINEAR or not walk.same_shape(product, other):
            continue
        x, weight, bias = walk.arguments(product).values()
        # A weight that layers share, each with an adapter of its own, stays one.
        if not spelling.is_constant(weight) or walk.only_user(weight) is not product:
            continue
        added = _map(spelling, other, walk.upstream(x, through=walk.COPYING), node)
        if added is not None and added.meta["val"].dtype == weight.meta["val"].dtype:
            total = spelling.call(aten.add.Tensor, (weight, added), node)
            spelling.become(node, aten.linear.default, (x, total) if bias is None else (x, total, bias))
            return


def _map(spelling: Spelling, value: Node, x: Node, before: Node) -> Node | None:
    """The matrix (out, in) by which `value` is a linear map of x, if linears without a bias compute it from x alone."""
    if walk.is_scaling(value) or value.target in walk.MUL | walk.COPYING:
        source, *factor = value.args[:2]
        scales = value.target not in walk.COPYING
        if scales and not walk.is_scaling(value) and not _is_number(spelling, factor[0]):
            return None
        if not isinstance(source, Node) or source.meta["val"].dtype != value.meta["val"].dtype:
            return None
        matrix = _map(spelling, source, x, before)
        return matrix if matrix is None or not scales else spelling.call(value.target, (matrix, *factor), before)
    if value.target not in walk.LINEAR:
        return None
    product = Linear.of(value)
    if product.bias is not None or not spelling.is_constant(product.weight):
        return None
    if walk.upstream(product.x, through=walk.COPYING) is x:
        return product.weight
    matrix = _map(spelling, product.x, x, before)
    return None if matrix is None else spelling.call(aten.mm.default, (product.weight, matrix), before)


def _is_number(spelling: Spelling, factor: object) -> bool:
    return spelling.is_constant(factor) and isinstance(factor, Node) and factor.meta["val"].numel() == 1


def _transposed(spelling: Spelling, matrix: Node, before: Node) -> Node:
    args: tuple[Any, ...] = matrix.args
    permuted = matrix.target == aten.permute.default and [axis % 2 for axis in args[1]] == [1, 0]
    swapped = matrix.target == aten.transpose.int and (args[1] - args[2]) % 2
    if permuted or swapped or matrix.target in _TRANSPOSES:
        return walk.argument(matrix, 0)
    return spelling.call(aten.transpose.int, (matrix, 0, 1), before)
