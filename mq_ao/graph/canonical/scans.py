"""Softplus, bias and skip connection into the scan, which computes them where they are best quantized."""

from __future__ import annotations

from torch.fx import Node

from mq_ao.graph import walk
from mq_ao.graph.canonical.spelling import Spelling, both_ways
from mq_ao.graph.views import Scan

aten = walk.aten


def softplus(spelling: Spelling, node: Node) -> None:
    """A scan of softplus(delta) or of softplus(delta + bias)."""
    if node.target not in walk.SCAN | walk.SSD:
        return
    scan = Scan.of(node)
    if scan.softplus or scan.bias is not None:
        return
    moves: list[Node] = []
    end = scan.delta
    while end.target in walk.TRANSPARENT and isinstance(end.args[0], Node):
        moves.append(end)
        end = end.args[0]
    if end.target != aten.softplus.default or any(_dtype(move) not in (None, _dtype(end)) for move in moves):
        return
    given = walk.arguments(end)
    # As the scan computes it: from 20 on, softplus is the identity.
    if given["beta"] != 1 or given["threshold"] != 20:
        return
    delta, bias = _apart(spelling, given["self"], node) if not moves else (given["self"], None)
    for move in reversed(moves):
        old, source = move.args[0], delta
        with spelling.graph.inserting_before(node):
            delta = spelling.graph.node_copy(move, lambda item, old=old, new=source: new if item is old else item)
    scan.delta, scan.bias, scan.softplus = delta, bias, True


def skip(spelling: Spelling, node: Node) -> None:
    """y + D u, of a scan of u without a D."""
    if node.target not in walk.ADD or node.kwargs:
        return
    for y, product in both_ways(node):
        if not isinstance(y, Node) or not isinstance(product, Node) or product.target not in walk.MUL:
            continue
        source = walk.argument(y, 0) if walk.is_result(y, 0) else None
        if source is None or source.target not in walk.SCAN or walk.only_user(y) is not node:
            continue
        scan = Scan.of(source)
        for value, factor in both_ways(product):
            if scan.skip is None and value is scan.u and spelling.is_vector(factor, scan.u.meta["val"].shape[-1]):
                scan.skip = spelling.vector(factor, source)
                spelling.substitute(node, y)
                return


def _apart(spelling: Spelling, total: Node, scan: Node) -> tuple[Node, Node | None]:
    """delta and bias of their sum."""
    if total.target in walk.ADD and not total.kwargs:
        for delta, bias in both_ways(total):
            vector = isinstance(delta, Node) and spelling.is_vector(bias, total.meta["val"].shape[-1])
            if vector and walk.same_shape(delta, total):
                return delta, spelling.vector(bias, scan)
    return total, None


def _dtype(node: Node) -> object:
    """Of a node's value, or None where it has several."""
    return getattr(node.meta["val"], "dtype", None)
