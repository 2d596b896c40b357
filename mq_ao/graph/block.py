"""The nodes of one Mamba block, and the values between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from mq_ao.graph.gate import Gate
from mq_ao.graph.roles import Role
from mq_ao.graph.rows import Rows, rows_of
from mq_ao.graph.views import Conv, Linear, Scan


@dataclass(frozen=True)
class Direction:
    """One scan of a block, and the layers that are its own.

    Attributes:
        name: the block's name; of several directions, with the scan node's.
        scan: `mq_ao::selective_scan` or `mq_ao::ssd_scan`, or `mq_ao::scan_states` where h C was taken out of it.
        conv1d: depthwise convolution.
        x_projs: linear that yields dt's low rank, B and C; several where each has its own, or groups of channels have
            (VMamba's four directions in one scan), none in Mamba-2, whose in_proj yields them.
        dt_projs: linears that raise dt to d_inner, likewise; where dt has its full rank, they read what x_projs read.
        c: operand C of the scan.
        y: the scan's output, D u included.
        product: multiplication h C where it is a node of its own, else None.
    """

    name: str
    scan: Node
    conv1d: Node
    x_projs: tuple[Node, ...]
    dt_projs: tuple[Node, ...]
    c: Node
    y: Node
    product: Node | None = None

    @property
    def conv_input(self) -> Node:
        """What the convolution reads, (batch, length, channels)."""
        return Conv.of(self.conv1d).x

    @property
    def dt(self) -> Node | None:
        """What dt_proj reads, (batch, length, dt_rank), or None unless there is just one."""
        return Linear.of(self.dt_projs[0]).x if len(self.dt_projs) == 1 else None

    @property
    def b(self) -> Node:
        """Operand B of the scan, (batch, length, d_state)."""
        return Scan.of(self.scan).b

    @property
    def b_rows(self) -> Rows:
        """Channels of x_proj that are B; raises Unsuitable where something is in between."""
        return rows_of(self.b, {self.scan})

    @property
    def c_rows(self) -> Rows:
        """Channels of x_proj that are C; raises Unsuitable where something is in between."""
        return rows_of(self.c, {self.product or self.scan})

    def by_role(self) -> list[tuple[Role, Node]]:
        """(role, node) pairs of the layers with weights, in dataflow order."""
        pairs = [(Role.CONV1D, self.conv1d), *((Role.X_PROJ, node) for node in self.x_projs)]
        return [*pairs, *((Role.DT_PROJ, node) for node in self.dt_projs)]

    def operands(self) -> list[tuple[Role, Node, dict[str, Node]]]:
        """(role, node, its inputs that may be quantized, by their symbols in docs/method.md) of the scan and of h C.

        delta is among them only where the scan applies the softplus: after it, small steps would vanish
        (docs/method.md, section 5).
        """
        scan = Scan.of(self.scan)
        operands = {"u": scan.u, "delta": scan.delta, "B": self.b, "C": self.c}
        if not scan.softplus:
            del operands["delta"]
        result: list[tuple[Role, Node, dict[str, Node]]] = [(Role.SCAN, self.scan, operands)]
        if self.product is not None:
            del operands["C"]
            h, c = self.product.all_input_nodes
            result.append((Role.STATE, self.product, {"h": h, "C": c}))
        return result


@dataclass(frozen=True)
class Block:
    """A Mamba block: one scan, or several whose outputs are added up before out_proj.

    Attributes:
        name: qualified name of the submodule that holds the scan, or the scan node's name.
        in_proj: linear that feeds the convolutions.
        gate_proj: linear that feeds the gate; the same node as in_proj where they are one; None without a gate.
        gates: multiplications of the scans' outputs, or of their sum, by the activated gate, each once.
        norms: norms between the scans and out_proj, each once.
        out_proj: linear after the gate.
        directions: the scans.
    """

    name: str
    in_proj: Node
    gate_proj: Node | None
    gates: tuple[Gate, ...]
    norms: tuple[Node, ...]
    out_proj: Node
    directions: tuple[Direction, ...]

    @property
    def out_input(self) -> Node:
        """What out_proj reads, (batch, length, d_inner)."""
        return Linear.of(self.out_proj).x

    def by_role(self) -> list[tuple[Role, Node]]:
        """(role, node) pairs of the layers with weights, each once; a separate gate is a second in_proj."""
        pairs = [(Role.IN_PROJ, self.in_proj)]
        if self.gate_proj is not None and self.gate_proj is not self.in_proj:
            pairs.append((Role.IN_PROJ, self.gate_proj))
        for direction in self.directions:
            pairs += [pair for pair in direction.by_role() if pair not in pairs]
        return [*pairs, (Role.OUT_PROJ, self.out_proj)]

    def operands(self) -> list[tuple[Role, Node, dict[str, Node]]]:
        """(role, node, its inputs that may be quantized) of the parts without weights; see `Direction.operands`."""
        result = [item for direction in self.directions for item in direction.operands()]
        return [*result, *((Role.GATE, gate.node, {"y": gate.y, "z": gate.z}) for gate in self.gates)]
