"""The gate of a Mamba block: y * SiLU(z), or with S-SiLU y * z * sigmoid(s z) (docs/method.md, S2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from mq_ao.graph import walk
from mq_ao.graph.edit import is_constant

aten = walk.aten


@dataclass(frozen=True)
class Gate:
    """The nodes of a gate.

    Attributes:
        node: multiplication of y by the activated gate.
        activated: SiLU(z) or S-SiLU(z, s).
        z: value before the activation.
        scale: s of S-SiLU, a constant (channels,), or None for SiLU.
    """

    node: Node
    activated: Node
    z: Node
    scale: Node | None

    @property
    def y(self) -> Node:
        """The other operand of the multiplication."""
        return next(item for item in walk.inputs(self.node) if item is not self.activated)

    @property
    def end(self) -> Node:
        """The activation's last node, from which `activated` is a view."""
        return walk.upstream(self.activated)

    @property
    def is_plain(self) -> bool:
        """Whether the multiplication reads the activation itself, and y and z are of one shape: kernels want that."""
        return self.activated is self.end and walk.same_shape(self.y, self.z)

    @property
    def readers(self) -> set[Node]:
        """The nodes of the activation that read z."""
        parts = {self.end}
        if self.end.target in walk.MUL:
            sigmoid = walk.argument(self.end, 1)
            parts |= {sigmoid, walk.argument(sigmoid, 0)}
        return parts & set(self.z.users)


def gate_of(node: Node, y: Node) -> Gate | None:
    """The gate that `node` multiplies what comes from `y` by, or None if no operand is an activation."""
    for operand in walk.inputs(node):
        if operand is y:
            continue
        end = walk.upstream(operand)
        if end.target in walk.ACTIVATION:
            return Gate(node, operand, walk.argument(end, 0), None)
        found = _s_silu(end)
        if found is not None:
            return Gate(node, operand, *found)
    return None


def _s_silu(node: Node) -> tuple[Node, Node | None] | None:
    """(z, s) if `node` is z * sigmoid(s * z)."""
    if node.target not in walk.MUL:
        return None
    z, factor = node.args[:2]
    if not isinstance(z, Node) or not isinstance(factor, Node) or factor.target != aten.sigmoid.default:
        return None
    inner = factor.args[0]
    if inner is z:
        return z, None
    if isinstance(inner, Node) and inner.target in walk.MUL and inner.args[0] is z and is_constant(inner.args[1]):
        return z, walk.argument(inner, 1)
    return None
