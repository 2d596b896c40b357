"""Walking along the dataflow of an exported graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

import mq_ao.ops  # noqa: F401  (registers torch.ops.mq_ao)
from mq_ao.compat.tracing import statically_known_true
from mq_ao.errors import MqAoError

aten = torch.ops.aten
getitem = operator.getitem

LINEAR = frozenset({aten.linear.default})
EXPERTS = frozenset({torch.ops.mq_ao.expert_linear.default})
CONV = frozenset({torch.ops.mq_ao.causal_conv1d.default, aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default})
EMBEDDING = frozenset({aten.embedding.default})
SCAN = frozenset({torch.ops.mq_ao.selective_scan.default})
SSD = frozenset({torch.ops.mq_ao.ssd_scan.default})
ATTENTION = frozenset({torch.ops.mq_ao.cached_attention.default})
SCAN_STATES = frozenset({torch.ops.mq_ao.scan_states.default})
ANY_SCAN = SCAN | SCAN_STATES | SSD
WITHOUT_GRADIENT = SCAN_STATES
ACTIVATION = frozenset({aten.silu.default, aten.silu_.default})
HADAMARD = frozenset({torch.ops.mq_ao.hadamard.default})
MUL = frozenset({aten.mul.Tensor})
DIV = frozenset({aten.div.Tensor})
ADD = frozenset({aten.add.Tensor})
JOINING = frozenset({aten.cat.default, aten.concatenate.default, aten.stack.default})
NORM = frozenset({aten.rms_norm.default, aten.layer_norm.default})
SUM = frozenset({aten.sum.dim_IntList})
PADDED = frozenset({aten.constant_pad_nd.default, aten.pad.default})
MASKED = frozenset({aten.masked_fill.Scalar})

COPYING = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.dropout.default,
        aten.to.device,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten._to_copy.default,
    }
)
"""Operators whose output has the shape and, but for a cast, the values of their input."""

TRANSPARENT = COPYING | {
    operator.getitem,
    aten.chunk.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.flip.default,
    aten.index_select.default,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.unbind.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
}
"""Operators that move or cast values without mixing or changing them: a walk passes through their first input."""


def argument(node: Node, index: int) -> Node:
    """Positional argument of a node that is a value of the graph."""
    value = node.args[index]
    assert isinstance(value, Node), f"argument {index} of {node.name} is {value!r}"
    return value


def value(node: Node) -> Any:
    """Example value of a node; of a dequantize node, which torchao gives none, that of what was quantized."""
    while "val" not in node.meta:
        node = argument(node, 0)
    return node.meta["val"]


def same_size(first: Any, second: Any) -> bool:
    """Whether two sizes are known to be equal. To compare them as numbers would fix those that vary."""
    return statically_known_true(first == second)


def same_shape(first: Node, second: Node) -> bool:
    """Whether the values of two nodes are known to have one shape."""
    shapes = value(first).shape, value(second).shape
    return len(shapes[0]) == len(shapes[1]) and all(map(same_size, *shapes))


@cache
def parameters(target: Any) -> tuple[Any, ...]:
    """The arguments in an operator's schema, in order, each with `name`, `default_value` and `kwarg_only`.

    Raises:
        TypeError: `target` is no operator.
    """
    # Graphs call torchao's operators without an overload.
    schema = getattr(getattr(target, "default", target), "_schema", None)
    if schema is None:
        raise TypeError(f"{target} has no schema, so its arguments have no names")
    return tuple(schema.arguments)


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of an operator's node by their names in its schema, in order, defaults included."""
    known = parameters(node.target)
    given = {**dict(zip((item.name for item in known), node.args, strict=False)), **node.kwargs}
    return {item.name: given.get(item.name, item.default_value) for item in known}


def upstream(node: Node, *, through: frozenset[object] = TRANSPARENT, tokenwise: bool = False) -> Node:
    """Follows first inputs from `node` (included) while the operator is in `through`; returns where it ends.

    Args:
        node: where to begin.
        through: operators to pass.
        tokenwise: pass what `is_tokenwise` too.
    """
    while node.op == "call_function" and (node.target in through or (tokenwise and is_tokenwise(node))):
        if not isinstance(node.args[0], Node):
            break
        node = node.args[0]
    return node


def downstream(node: Node, *, through: frozenset[object] = TRANSPARENT, tokenwise: bool = False) -> Iterator[Node]:
    """Yields the users of `node` that are not in `through`, looking behind those that are.

    Args:
        node: where to begin.
        through: operators to pass.
        tokenwise: pass what `is_tokenwise` too.
    """
    for user in node.users:
        passes = user.target in through or (tokenwise and is_tokenwise(user) and user.args[0] is node)
        if user.op == "call_function" and passes:
            yield from downstream(user, through=through, tokenwise=tokenwise)
        else:
            yield user


def check_experts(module: GraphModule, backend: str) -> None:
    """Raises MqAoError if there are experts in a graph for a backend that has no operator for them."""
    for node in calls(module, EXPERTS):
        raise MqAoError(
            f"this model is a mixture of experts ({node.name}), for which backend {backend!r} has no operator: choose "
            "'native' or 'inductor'."
        )


def is_scaling(node: Node) -> bool:
    """Whether a node multiplies or divides a value by one number."""
    return node.target in MUL | DIV and isinstance(node.args[1], int | float)


def is_tokenwise(node: Node) -> bool:
    """Whether a node multiplies every token by a number of its own, such as a mask, or puts zeros between tokens.

    Linear maps of the channels commute with that, a shift does not. The value is the node's first argument.
    """
    if node.target in MUL:
        x, factor = node.args[:2]
        return isinstance(x, Node) and isinstance(factor, Node) and _is_of_tokens(factor, x)
    if node.target in MASKED:
        given = arguments(node)
        return not given["value"] and _is_of_tokens(given["mask"], given["self"])
    if node.target in PADDED:
        given = arguments(node)
        return list(given["pad"][:2]) == [0, 0] and given.get("mode") in (None, "constant") and not given["value"]
    return False


def _is_of_tokens(factor: Node, x: Node) -> bool:
    """Whether `factor` has one number for all channels of x, its last axis."""
    if factor.target == aten.expand.default:
        factor = argument(factor, 0)
    one, many = value(factor), value(x)
    if not isinstance(one, torch.Tensor) or not 0 < one.dim() <= many.dim() or same_size(many.shape[-1], 1):
        return False
    return same_size(one.shape[-1], 1)


def only_user(node: Node) -> Node | None:
    """The only reader of `node`, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_result(node: Node, index: int) -> bool:
    """Whether a node takes one result of an operator that has several."""
    return node.target is getitem and node.args[1:] == (index,)


def result(node: Node, index: int) -> Node | None:
    """The node that takes one result of an operator that has several, or None; of several such nodes, the first."""
    return next((user for user in node.users if is_result(user, index)), None)


def inputs(node: Node) -> Iterator[Node]:
    """Tensor-like inputs of a node, in order, lists flattened."""
    for arg in (*node.args, *node.kwargs.values()):
        if isinstance(arg, Node):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (item for item in arg if isinstance(item, Node))


def calls(module: GraphModule, targets: Iterable[object]) -> list[Node]:
    """The call_function nodes with one of these targets, in graph order."""
    wanted = frozenset(targets)
    return [node for node in module.graph.nodes if node.op == "call_function" and node.target in wanted]


def module_path(node: Node) -> str:
    """Qualified name of the innermost submodule that the node was traced in ("" at the top or if unknown)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return path.removeprefix("L['self'].").removeprefix("L__self___")
