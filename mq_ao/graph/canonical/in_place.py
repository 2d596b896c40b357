"""Operators that write to their input become those that do not, where nobody could tell."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from mq_ao.graph import walk

aten = walk.aten

_FUNCTIONS: dict[object, Any] = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.relu_.default: aten.relu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.silu_.default: aten.silu.default,
    aten.sub_.Tensor: aten.sub.Tensor,
}
_ALIASES = frozenset({walk.getitem, aten.dropout.default})
"""Operators whose result may be memory of their input although their schema does not say so."""


def undo(graph: Graph) -> None:
    """Replaces operators that write to memory which nothing reads afterwards but through their result."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _FUNCTIONS and _is_private(node, order):
            node.target = _FUNCTIONS[node.target]


def _is_private(node: Node, order: dict[Node, int]) -> bool:
    written = walk.argument(node, 0)
    if not walk.same_shape(written, node) or written.meta["val"].dtype != node.meta["val"].dtype:
        return False
    base = written
    while _is_alias(base):
        base = walk.argument(base, 0)
    if base.op != "call_function":
        return False
    pending = [base]
    while pending:
        for user in pending.pop().users:
            if user is node:
                continue
            if order[user] > order[node]:
                return False
            if _is_alias(user):
                pending.append(user)
    return True


def _is_alias(node: Node) -> bool:
    """Whether a node's value may be memory of its first input."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    schema = getattr(node.target, "_schema", None)
    return node.target in _ALIASES or (schema is not None and any(value.alias_info for value in schema.returns))
