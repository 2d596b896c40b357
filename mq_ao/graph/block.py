"""The nodes of one Mamba-1 block, and the values between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from mq_ao.graph.gate import Gate
from mq_ao.graph.roles import Role
from mq_ao.graph.rows import Rows, rows_of
from mq_ao.graph.walk import argument

_SOFTPLUS = 7
_SOFTPLUS_STATES = 5
"""Where `delta_softplus` stands among the arguments of `selective_scan` and `scan_states`."""


@dataclass(frozen=True)
class Block:
    """The nodes of one Mamba-1 block.

    Attributes:
        name: qualified name of the submodule that holds the scan, or the scan node's name.
        scan: `mq_ao::selective_scan` node, or `mq_ao::scan_states` where h C was taken out of it.
        in_proj: linear that feeds the convolution.
        conv1d: depthwise causal convolution.
        x_proj: linear that yields dt's low rank, B and C.
        dt_proj: linear that raises dt to d_inner.
        gate_proj: linear that feeds the gate; the same node as in_proj where they are one.
        gate: multiplication of the scan's output by the activated gate, or None if the block has no gate.
        out_proj: linear after the gate.
        c: operand C of the scan.
        y: the scan's output, D u included.
        product: multiplication h C where it is a node of its own, else None.
    """

    name: str
    scan: Node
    in_proj: Node
    conv1d: Node
    x_proj: Node
    dt_proj: Node
    gate_proj: Node | None
    gate: Gate | None
    out_proj: Node
    c: Node
    y: Node
    product: Node | None = None

    @property
    def conv_input(self) -> Node:
        """What the convolution reads, (batch, length, d_inner)."""
        return argument(self.conv1d, 0)

    @property
    def dt(self) -> Node:
        """What dt_proj reads, (batch, length, dt_rank)."""
        return argument(self.dt_proj, 0)

    @property
    def b(self) -> Node:
        """Operand B of the scan, (batch, length, d_state)."""
        return argument(self.scan, 3)

    @property
    def out_input(self) -> Node:
        """What out_proj reads, (batch, length, d_inner)."""
        return argument(self.out_proj, 0)

    @property
    def u_rows(self) -> Rows:
        """Channels of in_proj that the convolution reads."""
        return rows_of(self.conv_input)

    @property
    def dt_rows(self) -> Rows:
        """Channels of x_proj that dt_proj reads."""
        return rows_of(self.dt)

    @property
    def b_rows(self) -> Rows:
        """Channels of x_proj that are B."""
        return rows_of(self.b)

    @property
    def c_rows(self) -> Rows:
        """Channels of x_proj that are C."""
        return rows_of(self.c)

    def by_role(self) -> list[tuple[Role, Node]]:
        """(role, node) pairs of the layers with weights, in dataflow order; a separate gate is a second in_proj."""
        pairs = [(Role.IN_PROJ, self.in_proj)]
        if self.gate_proj is not None and self.gate_proj is not self.in_proj:
            pairs.append((Role.IN_PROJ, self.gate_proj))
        return [
            *pairs,
            (Role.CONV1D, self.conv1d),
            (Role.X_PROJ, self.x_proj),
            (Role.DT_PROJ, self.dt_proj),
            (Role.OUT_PROJ, self.out_proj),
        ]

    def operands(self) -> list[tuple[Role, Node, dict[str, Node]]]:
        """(role, node, its inputs that may be quantized, by METHOD.md's symbols) of the parts without weights.

        delta is among them only where the scan applies the softplus: after it, small steps would vanish (METHOD.md
        section 5).
        """
        index = _SOFTPLUS if self.product is None else _SOFTPLUS_STATES
        softplus = len(self.scan.args) > index and self.scan.args[index] is True
        scan = {"u": argument(self.scan, 0), "delta": argument(self.scan, 1), "B": self.b, "C": self.c}
        if not softplus:
            del scan["delta"]
        result: list[tuple[Role, Node, dict[str, Node]]] = [(Role.SCAN, self.scan, scan)]
        if self.product is not None:
            del scan["C"]
            h, c = self.product.all_input_nodes
            result.append((Role.STATE, self.product, {"h": h, "C": c}))
        if self.gate is not None:
            result.append((Role.GATE, self.gate.node, {"y": self.gate.y, "z": self.gate.z}))
        return result
