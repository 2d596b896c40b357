"""What a graph keeps from one call to the next."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from mq_ao.graph import walk


def written(module: GraphModule) -> str | None:
    """The name of a buffer that a graph writes to, or None: what it gives then depends on the calls before."""
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for value, argument in zip(node.args, schema.arguments if schema else (), strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Node)
            if writes and (source := walk.upstream(value, through=walk.TRANSPARENT)).op == "get_attr":
                return str(source.target)
    return None
