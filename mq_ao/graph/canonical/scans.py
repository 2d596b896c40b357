"""Softplus, bias and skip connection into the scan, which computes them where they are best quantized."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from mq_ao.graph import walk
from mq_ao.graph.canonical.spelling import Spelling, both_ways

aten = walk.aten

_DELTA, _SKIP, _BIAS, _SOFTPLUS = 1, 5, 6, 7
"""Where these stand among the arguments of a scan, of Mamba-1 and of Mamba-2."""


def softplus(spelling: Spelling, node: Node) -> None:
    """A scan of softplus(delta) or of softplus(delta + bias)."""
    if node.target not in walk.SCAN | walk.SSD:
        return
    args = [*node.args, *[None] * (_SOFTPLUS + 1 - len(node.args))]
    if args[_SOFTPLUS] or args[_BIAS] is not None:
        return
    moves: list[Node] = []
    end = walk.argument(node, _DELTA)
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
    args[_DELTA], args[_BIAS], args[_SOFTPLUS] = delta, bias, True
    node.args = tuple(args)


def skip(spelling: Spelling, node: Node) -> None:
    """y + D u, of a scan of u without a D."""
    if node.target not in walk.ADD or node.kwargs:
        return
    for y, product in both_ways(node):
        if not isinstance(y, Node) or not isinstance(product, Node) or product.target not in walk.MUL:
            continue
        scan = y.args[0] if y.target is walk.getitem and y.args[1] == 0 else None
        if not isinstance(scan, Node) or scan.target not in walk.SCAN or walk.only_user(y) is not node:
            continue
        args: list[Any] = [*scan.args, *[None] * (_SKIP + 1 - len(scan.args))]
        u = args[0]
        for value, factor in both_ways(product):
            if args[_SKIP] is None and value is u and spelling.is_vector(factor, u.meta["val"].shape[-1]):
                args[_SKIP] = spelling.vector(factor, scan)
                scan.args = tuple(args)
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
