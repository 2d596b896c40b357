"""Keys and values of attention: rows that a graph takes as an input and gives new ones of."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from mq_ao.graph import Rejection, walk
from mq_ao.graph.views import Attention


def cached_rows(model: GraphModule) -> dict[Node, tuple[Node, Node] | Rejection]:
    """New keys and values by attention node; or why its cache cannot be held in integers."""
    return {node: _rows(node) for node in walk.calls(model, walk.ATTENTION)}


def _rows(node: Node) -> tuple[Node, Node] | Rejection:
    attention = Attention.of(node)
    pairs = ((attention.past_key, attention.key), (attention.past_value, attention.value))
    for past, new in pairs:
        if past is None or past.op != "placeholder":
            return Rejection(node.name, "its keys and values are no inputs of the graph")
        readers = [user for user in past.users if user is not node and user.target != walk.aten.sym_size.int]
        if readers:
            return Rejection(node.name, f"{readers[0].name} reads the graph input {past.name} in float")
        if not any(user.op == "output" for user in new.users):
            return Rejection(node.name, "its new keys and values are no outputs of the graph")
    return attention.key, attention.value
