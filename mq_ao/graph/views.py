"""Calls of operators with their arguments by name: where these stand, and what they default to, only schemas know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch.fx import Node

from mq_ao.graph import edit, walk

T = TypeVar("T")
_NEEDED: Any = object()


class Argument(Generic[T]):
    """An argument of the operators of a view; to assign to it edits the node.

    Args:
        names: what schemas call it, where that is not what the view does.
        absent: its value for operators that have no such argument; without it they raise TypeError.
    """

    def __init__(self, *names: str, absent: Any = _NEEDED) -> None:
        self.names, self.absent = names, absent

    def __set_name__(self, owner: type[View], name: str) -> None:
        self.names = self.names or (name,)

    def __get__(self, view: View, owner: type[View]) -> T:
        value: T = walk.arguments(view.node).get(self._name(view), self.absent)
        if value is _NEEDED:
            raise TypeError(f"{view.node.target} has no argument {' or '.join(self.names)}")
        return value

    def __set__(self, view: View, value: T) -> None:
        edit.set_argument(view.node, self._name(view), value)

    def _name(self, view: View) -> str:
        known = {item.name for item in walk.parameters(view.node.target)}
        return next((name for name in self.names if name in known), self.names[0])


@dataclass(frozen=True)
class View:
    """A call of one of some operators that mean the same, under one set of names; it holds no values of its own.

    Attributes:
        node: the call.
    """

    operators: ClassVar[frozenset[object]]

    node: Node

    @classmethod
    def of(cls, node: Node) -> Self:
        """The view of a node.

        Raises:
            TypeError: the node calls another operator, which is our mistake and nobody's bad input.
        """
        if node.target not in cls.operators:
            raise TypeError(f"{node.name} calls {node.target}, which {cls.__name__} does not know")
        return cls(node)


class Layer(View):
    """Whatever has a weight and one input: indices of rows, for an embedding."""

    operators = walk.LINEAR | walk.EXPERTS | walk.CONV | walk.EMBEDDING

    x = Argument[Node]("input", "x", "indices")
    weight = Argument[Node]()
    bias = Argument[Node | None](absent=None)


class Linear(Layer):
    """x W^T + b."""

    operators = walk.LINEAR


class Experts(View):
    """Linears of which each row has one, without biases; the weight is (experts * outputs, inputs)."""

    operators = walk.EXPERTS

    x = Argument[Node]()
    weight = Argument[Node]()
    ends = Argument[Node]()


class Conv(Layer):
    """A convolution; ours has the channels last, and knows what came before x."""

    operators = walk.CONV

    initial_state = Argument[Node | None](absent=None)
    activation = Argument[str | None](absent=None)


class Norm(View):
    """RMSNorm, which has no bias, or LayerNorm."""

    operators = walk.NORM

    x = Argument[Node]("input")
    shape = Argument[list[int]]("normalized_shape")
    weight = Argument[Node | None]()
    bias = Argument[Node | None](absent=None)
    eps = Argument[float | None]()


class Scan(View):
    """A scan, by the symbols of docs/method.md; Mamba-2 says x for u and dt for delta."""

    operators = walk.ANY_SCAN

    u = Argument[Node]("u", "x")
    delta = Argument[Node]("delta", "dt")
    a = Argument[Node]("A")
    b = Argument[Node]("B")
    c = Argument[Node]("C")
    skip = Argument[Node | None]("D")
    bias = Argument[Node | None]("delta_bias", "dt_bias")
    softplus = Argument[bool]("delta_softplus", "dt_softplus")
    dt_min = Argument[float]()
    dt_max = Argument[float | None]()
    initial_state = Argument[Node | None]()
    seq_idx = Argument[Node | None]()


class Attention(View):
    """Attention to a cache, in float or in int8."""

    operators = walk.ATTENTION

    query = Argument[Node]()
    key = Argument[Node]()
    value = Argument[Node]()
    scaling = Argument[float]()
    past_key = Argument[Node | None]()
    past_value = Argument[Node | None]()
    key_scale = Argument[Node | None]()
    value_scale = Argument[Node | None]()
    past_key_scale = Argument[Node | None]()
    past_value_scale = Argument[Node | None]()
    starts = Argument[Node | None]()
