"""Reading and replacing the constants of a graph, and adding nodes that carry the metadata torch.export gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.compat.graph_constants import attribute
from mq_ao.compat.trees import tree_map_only
from mq_ao.graph import walk

_BLOCK = 2**20
"""Elements that are in float64 at a time: an embedding or a head has many more."""


def is_constant(node: object) -> bool:
    """Whether a value depends on parameters and buffers alone."""
    if not isinstance(node, Node):
        return False
    if node.op == "get_attr":
        return True
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(is_constant, node.all_input_nodes))


def constant(module: GraphModule, node: Node) -> Tensor:
    """Value of a node that `is_constant`, detached: perhaps the parameter itself, not to be written to."""
    if node.op == "get_attr":
        value: Tensor = attribute(module, str(node.target))
        return value.detach()
    args, kwargs = tree_map_only(Node, lambda arg: constant(module, arg), (node.args, node.kwargs))
    assert callable(node.target)
    with torch.no_grad():
        return node.target(*args, **kwargs)


def operand(module: GraphModule, node: Node | None) -> Tensor | None:
    """A copy of a constant in float64, or None where there is no tensor."""
    return None if node is None else constant(module, node).to(torch.float64, copy=True)


def set_operand(module: GraphModule, user: Node, name: str, value: Tensor) -> None:
    """Gives `user` a parameter of its own for the argument of that name, in the dtype of what it replaces.

    The old parameter stays as it is, for whoever else reads it: tied weights come apart.
    """
    old = walk.arguments(user)[name]
    dtype = constant(module, old).dtype if isinstance(old, Node) else _dtype(user)
    with module.graph.inserting_before(user):
        node = get_attr(module, f"{user.name}_{name}", value.to(dtype).contiguous(), like=user)
    set_argument(user, name, node)
    if isinstance(old, Node):
        drop_unused(module, old)


def set_argument(node: Node, name: str, value: Any) -> None:
    """Changes an argument of an operator's node by its name in the schema; defaults before it are written out.

    Raises:
        TypeError: the operator has no such argument.
    """
    given = walk.arguments(node)
    if name not in given:
        raise TypeError(f"{node.target} has no argument {name}")
    names = [item.name for item in walk.parameters(node.target) if not item.kwarg_only]
    if name in node.kwargs or name not in names:
        node.update_kwarg(name, value)
        return
    positional = names[: max(len(node.args), names.index(name) + 1)]
    node.args = tuple(value if item == name else given[item] for item in positional)
    node.kwargs = {key: item for key, item in node.kwargs.items() if key not in positional}


def by_rows(matrix: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of every row, computed in float64 a few rows at a time, in the dtype of `matrix`.

    Args:
        matrix: (rows, columns).
        change: float64 (some rows, columns) -> the same shape.
    """
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    result = torch.empty_like(matrix)
    for old, new in zip(matrix.split(step), result.split(step), strict=True):
        new.copy_(change(old.double()))
    return result


def readers(node: Node) -> list[Node]:
    """Everything that reads the same parameter as the constant `node`, through whatever is computed from it alone."""
    if node.op != "get_attr":
        return [user for inner in node.all_input_nodes for user in readers(inner)]
    same = [other for other in node.graph.find_nodes(op="get_attr") if other.target == node.target]
    found: list[Node] = []
    while same:
        for user in same.pop().users:
            (same if is_constant(user) else found).append(user)
    return found


def replace(old: Node, new: Node) -> None:
    """Puts `new` in the place of `old`, with what is known of its value."""
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def get_attr(module: GraphModule, name: str, value: Tensor, like: Node) -> Node:
    """Registers `value` as a parameter of that name (with a number where it is taken); returns a get_attr node for it.

    The node is at the graph's insertion point.
    """
    name = _new_name(module, name)
    module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    node = module.graph.get_attr(name)
    # Not `from_tensor`: the mode would keep the tensor alive.
    with _fake_mode(like):
        node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return node


def call(module: GraphModule, target: Any, args: tuple[Any, ...], like: Node) -> Node:
    """A call_function node at the graph's insertion point, with `meta["val"]` and the module path of `like`."""
    node = module.graph.call_function(target, args)
    values = tree_map_only(Node, lambda arg: arg.meta["val"], args)
    with _fake_mode(like):
        node.meta["val"] = target(*values)
    for key in ("nn_module_stack", "source_fn_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def channels(node: Node) -> int:
    """Size of the last axis of a node's value."""
    return int(node.meta["val"].shape[-1])


def drop_unused(module: GraphModule, node: Node) -> None:
    """Removes a constant node that nobody reads any more, and what only it read, with their parameters."""
    if node.users:
        return
    inputs, target, is_attribute = node.all_input_nodes, node.target, node.op == "get_attr"
    module.graph.erase_node(node)
    if is_attribute and not any(other.target == target for other in module.graph.find_nodes(op="get_attr")):
        _delete(module, str(target))
    for item in inputs:
        drop_unused(module, item)


def drop_unused_tensors(module: GraphModule) -> None:
    """Deletes parameters and buffers that no node reads."""
    used = {node.target for node in module.graph.find_nodes(op="get_attr")}
    names = [
        *dict(module.named_parameters(remove_duplicate=False)),
        *dict(module.named_buffers(remove_duplicate=False)),
    ]
    for name in names:
        if name not in used:
            _delete(module, name)


def _delete(module: GraphModule, name: str) -> None:
    owner, _, leaf = name.rpartition(".")
    delattr(module.get_submodule(owner), leaf)


def _new_name(module: GraphModule, name: str) -> str:
    candidate, count = name, 0
    while hasattr(module, candidate):
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _dtype(user: Node) -> torch.dtype:
    value = user.meta["val"]
    return (value[0] if isinstance(value, list | tuple) else value).dtype


def _fake_mode(like: Node) -> Any:
    value = like.meta["val"]
    return (value[0] if isinstance(value, list | tuple) else value).fake_mode
