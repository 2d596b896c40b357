"""SiLU, RMSNorm and masks, however they are spelled."""

from __future__ import annotations

from torch.fx import Node

from mq_ao.graph import walk
from mq_ao.graph.canonical.spelling import Spelling, both_ways
from mq_ao.graph.views import Norm

aten = walk.aten

_CHANNELS = -1


def masked(spelling: Spelling, node: Node) -> None:
    """mask * x with the value first, as walks want it; `where(mask, x, 0)` as `masked_fill`."""
    if node.target in walk.MUL:
        first, second = node.args[:2]
        if isinstance(first, Node) and isinstance(second, Node) and not walk.is_tokenwise(node):
            node.args = (second, first)
            if not walk.is_tokenwise(node):
                node.args = (first, second)
    elif node.target == aten.where.ScalarOther:
        condition, x, other = walk.arguments(node).values()
        if other == 0 and walk.same_shape(x, node):
            inverted = spelling.call(aten.logical_not.default, (condition,), node)
            spelling.become(node, aten.masked_fill.Scalar, (x, inverted, 0))


def silu(spelling: Spelling, node: Node) -> None:
    """x sigmoid(x)."""
    if node.target not in walk.MUL:
        return
    for x, factor in both_ways(node):
        if isinstance(factor, Node) and factor.target == aten.sigmoid.default and factor.args[0] is x:
            spelling.become(node, aten.silu.default, (x,))
            return


def rms_norm(spelling: Spelling, node: Node) -> None:
    """x rsqrt(mean(x^2) + eps), or x / sqrt(mean(x^2) + eps)."""
    found = _normalised(node)
    if found is None:
        return
    x, inner = found
    if inner.target not in walk.ADD or inner.kwargs:
        return
    for mean, eps in both_ways(inner):
        if isinstance(mean, Node) and isinstance(eps, int | float) and _is_mean_square(mean, x):
            width = x.meta["val"].shape[_CHANNELS]
            if isinstance(width, int):
                spelling.become(node, aten.rms_norm.default, (x, [width], None, float(eps)))
            return


def weighted(spelling: Spelling, node: Node) -> None:
    """An RMSNorm without a weight, times one number a channel."""
    if node.target not in walk.MUL:
        return
    for norm, weight in both_ways(node):
        if not isinstance(norm, Node) or norm.target != aten.rms_norm.default or walk.only_user(norm) is not node:
            continue
        given = Norm.of(norm)
        same = spelling.is_vector(weight, norm.meta["val"].shape[_CHANNELS])
        plain = given.weight is None and len(given.shape) == 1
        if plain and same and weight.meta["val"].dtype == norm.meta["val"].dtype:
            vector = spelling.vector(weight, node)
            spelling.become(node, aten.rms_norm.default, (given.x, given.shape, vector, given.eps))
            return


def _normalised(node: Node) -> tuple[Node, Node] | None:
    """(x, v) of x / sqrt(v)."""
    if node.target in walk.MUL:
        for x, factor in both_ways(node):
            if isinstance(x, Node) and isinstance(factor, Node):
                inner = _inverse_root(factor)
                if inner is not None:
                    return x, inner
    elif node.target in walk.DIV and not node.kwargs:
        x, root = node.args[:2]
        if isinstance(x, Node) and isinstance(root, Node):
            inner = _root(root)
            return None if inner is None else (x, inner)
    return None


def _inverse_root(node: Node) -> Node | None:
    if node.target == aten.rsqrt.default or (node.target == aten.pow.Tensor_Scalar and node.args[1] == -0.5):
        return walk.argument(node, 0)
    if node.target == aten.reciprocal.default:
        return _root(walk.argument(node, 0))
    if node.target in walk.DIV and node.args[0] == 1 and isinstance(node.args[1], Node):
        return _root(node.args[1])
    return None


def _root(node: Node) -> Node | None:
    is_root = node.target == aten.sqrt.default or (node.target == aten.pow.Tensor_Scalar and node.args[1] == 0.5)
    return walk.argument(node, 0) if is_root else None


def _is_mean_square(mean: Node, x: Node) -> bool:
    if mean.target != aten.mean.dim:
        return False
    given = walk.arguments(mean)
    last = x.meta["val"].dim() - 1
    if not given["keepdim"] or list(given["dim"] or ()) not in ([-1], [last]):
        return False
    square, dtype = given["self"], given["dtype"]
    if dtype not in (None, x.meta["val"].dtype):
        return False
    powers = square.target == aten.pow.Tensor_Scalar and square.args[1] == 2
    products = square.target in walk.MUL and square.args[1] is square.args[0]
    return square.args[0] is x and (powers or products or square.target == aten.square.default)
