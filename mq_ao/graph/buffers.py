"""What a graph writes to: what it gives may then depend on the calls before."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from mq_ao.graph import walk


def written(module: GraphModule) -> str | None:
    """The name of a buffer or input that a graph writes to, or None."""
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for value, argument in zip(node.args, schema.arguments if schema else (), strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Node)
            if writes and (source := walk.upstream(value, through=walk.TRANSPARENT)).op in ("get_attr", "placeholder"):
                return str(source.target)
    return None
