"""Nested inputs and results as lists of leaves. torch.export speaks in these trees and has no public name for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule
from torch.utils._pytree import (
    SERIALIZED_TYPE_TO_PYTHON_TYPE,
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from mq_ao.errors import MqAoError

__all__ = [
    "SERIALIZED_TYPE_TO_PYTHON_TYPE",
    "TreeSpec",
    "call_structure",
    "leaves_as",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "treespec_dumps",
    "treespec_loads",
]


def call_structure(module: GraphModule) -> Any:
    """How an exported graph is called: `in_spec` and `out_spec`, and the arguments' names as `orig_args`.

    Raises:
        MqAoError: the graph does not come from torch.export.
    """
    structure = getattr(module.graph._codegen, "pytree_info", None)
    if structure is None:
        raise MqAoError("this GraphModule does not come from torch.export: capture the model with mq_ao.export.")
    return structure


def leaves_as(value: Any, spec: TreeSpec) -> list[Any] | None:
    """The leaves of a value in a structure's order, whatever the order of its dictionaries; None: it is another one."""
    if spec.type is dict and isinstance(value, Mapping) and value.keys() == set(spec.context):
        items = [value[key] for key in spec.context]
    elif spec.type in (list, tuple) and type(value) is spec.type and len(value) == spec.num_children:
        items = list(value)
    else:
        leaves, own = tree_flatten(value)
        return leaves if own == spec else None
    found = [leaves_as(item, child) for item, child in zip(items, spec.children(), strict=True)]
    return None if any(leaves is None for leaves in found) else [leaf for leaves in found for leaf in leaves or ()]
