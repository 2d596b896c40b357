"""What linears and other products outside Mamba blocks are: heads, routers of experts, experts themselves."""

from __future__ import annotations

import re

from torch.fx import Node

from mq_ao.graph import walk
from mq_ao.graph.edit import is_constant
from mq_ao.graph.views import Linear

aten = walk.aten

_PRODUCT = re.compile(r"(^|_)(add|badd)?b?(mm|matmul)(_|$)")
"""In the name of an operator that multiplies matrices; libraries define their own for experts."""
_ORDERED = frozenset({aten.max.dim, aten.sort.default, aten.topk.default})
"""Operators that give values, and then where they were."""
_CHOICES = frozenset({aten.argmax.default, aten.multinomial.default})
"""Operators that give which were largest or drawn."""
_SCORES = (
    _ORDERED
    | _CHOICES
    | {
        aten.exp.default,
        aten.log.default,
        aten.log_sigmoid.default,
        aten.log_softmax.int,
        aten._log_softmax.default,
        aten._softmax.default,
        aten.sigmoid.default,
        aten.softmax.int,
        aten.tanh.default,
    }
)
"""Operators that make probabilities, an order or a choice of scores, of a head's as of a router's."""


def unsuited(linear: Node) -> str | None:
    """Why a linear outside the blocks has no role."""
    weight = Linear.of(linear).weight
    if not is_constant(weight):
        return "its weight is computed at run time"
    if weight.meta["val"].shape[1] == 1:
        return "it has one input, so there is no product to speed up"
    if _is_router(linear):
        return "a router: its few scores choose experts, and a rounded one chooses others"
    return None


def is_output(value: Node) -> bool:
    """Whether the graph gives a value, perhaps multiplied by a number, as probabilities or as the largest of them."""
    users = list(walk.downstream(value))
    onward = (user for user in users if walk.is_scaling(user) or user.target in _SCORES)
    return any(user.op == "output" for user in users) or any(map(is_output, onward))


def is_product(node: Node) -> bool:
    """Whether a node multiplies by a constant matrix, but is no linear."""
    name = getattr(node.target, "_opname", "")
    weights = (item for item in walk.inputs(node) if is_constant(item) and item.meta["val"].dim() > 1)
    return bool(_PRODUCT.search(name)) and any(weights) and not is_constant(node)


def _corrects(node: Node) -> bool:
    """Whether a node adds a constant to scores, as to balance experts, or leaves some out."""
    if node.target in walk.ADD:
        return any(map(is_constant, walk.inputs(node)))
    return node.target in walk.MASKED


def _is_router(scores: Node, *, choice: bool = False) -> bool:
    """Whether what some scores choose is more than a result of the graph: it says what is computed next.

    Args:
        scores: values of a linear, or what was made of them.
        choice: whether they are what was chosen.
    """
    for user in walk.downstream(scores):
        if user.target in _ORDERED:
            if any(_is_router(part, choice=choice or walk.is_result(part, 1)) for part in user.users):
                return True
        elif user.target in _SCORES or walk.is_scaling(user) or _corrects(user):
            if _is_router(user, choice=choice or user.target in _CHOICES):
                return True
        elif choice and user.op != "output":
            return True
    return False
