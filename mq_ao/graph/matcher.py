"""Finds Mamba-1 blocks by dataflow, anchored on the scan (DESIGN.md, decision 1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from mq_ao.errors import MqAoError
from mq_ao.graph import walk
from mq_ao.graph.block import Block
from mq_ao.graph.edit import is_constant
from mq_ao.graph.gate import Gate, gate_of
from mq_ao.graph.roles import Role


@dataclass(frozen=True)
class Rejection:
    """A node that was looked at and left out.

    Attributes:
        node: name of the node.
        reason: one sentence: where the walk ended and why.
    """

    node: str
    reason: str


@dataclass(frozen=True)
class Match:
    """What was recognised in a graph.

    Attributes:
        blocks: Mamba blocks in graph order.
        heads: linears outside blocks that feed an output of the graph.
        embeddings: embedding look-ups.
        rejected: scans whose neighbourhood was not understood, and linears without a role.
    """

    blocks: tuple[Block, ...]
    heads: tuple[Node, ...] = ()
    embeddings: tuple[Node, ...] = ()
    rejected: tuple[Rejection, ...] = field(default=())

    def by_role(self) -> list[tuple[Role, Node]]:
        """Every (role, node) pair of the graph."""
        pairs = [(Role.EMBEDDING, node) for node in self.embeddings]
        for block in self.blocks:
            pairs.extend(block.by_role())
        return pairs + [(Role.HEAD, node) for node in self.heads]

    def describe(self) -> str:
        """Text that lists each block's nodes by role, then what was left out and why."""
        lines = [f"{len(self.blocks)} Mamba block(s)"]
        for block in self.blocks:
            lines.append(f"  {block.name}")
            gate = block.gate_proj if block.gate_proj is not block.in_proj else None
            rows: list[tuple[str, Node | None]] = [("scan", block.scan)]
            rows += [(str(role), node) for role, node in block.by_role() if node is not gate]
            rows += [("gate_proj", gate), ("gate", None if block.gate is None else block.gate.node)]
            lines += [f"    {role:<9} {_label(node)}" for role, node in rows if node is not None]
        lines += [f"embedding   {_label(node)}" for node in self.embeddings]
        lines += [f"head        {_label(node)}" for node in self.heads]
        lines += [f"left out    {item.node}: {item.reason}" for item in self.rejected]
        return "\n".join(lines)


class _WalkEnded(Exception):
    """The neighbourhood of a scan is not that of a Mamba-1 block."""


def match(module: GraphModule) -> Match:
    """Finds the Mamba-1 blocks, head and embeddings of an exported graph.

    Args:
        module: float graph of aten and mq_ao operators (`ExportedProgram.module()`).

    Raises:
        MqAoError: the graph has no scan at all.
    """
    scans = walk.calls(module, walk.SCAN | walk.SCAN_STATES)
    if not scans:
        raise MqAoError(
            "no mq_ao::selective_scan in the graph, so there is nothing to recognise as Mamba: capture the model with "
            "mq_ao.export, from a model whose scan is torch.ops.mq_ao.selective_scan."
        )
    blocks, rejected = [], []
    for scan in scans:
        try:
            blocks.append(_block(scan))
        except _WalkEnded as end:
            rejected.append(Rejection(scan.name, str(end)))
    taken = {node for block in blocks for _, node in block.by_role()}
    heads = []
    for node in walk.calls(module, walk.LINEAR):
        if node in taken:
            continue
        if any(user.op == "output" for user in walk.downstream(node)):
            heads.append(node)
        else:
            rejected.append(Rejection(node.name, "a linear outside every Mamba block that is not an output head"))
    embeddings = walk.calls(module, {walk.aten.embedding.default})
    return Match(tuple(blocks), tuple(heads), tuple(embeddings), tuple(rejected))


def _block(scan: Node) -> Block:
    u, delta, b = (_node(scan, index) for index in (0, 1, 3))
    product, y = _product(scan)
    c = _node(scan, 4) if product is None else _other(product, scan)
    dt_proj = _expect(delta, walk.LINEAR, "delta", "dt_proj (a linear)")
    x_proj = _expect(_node(dt_proj, 0), walk.LINEAR, "dt_proj's input", "x_proj (a linear)")
    for name, node in (("B", b), ("C", c)):
        if _expect(node, walk.LINEAR, name, "x_proj (a linear)") is not x_proj:
            raise _WalkEnded(f"{name} does not come from {x_proj.name}, from which delta comes")
    conv1d = _expect(u, walk.CONV, "u", "conv1d", also_through=walk.ACTIVATION)
    if _expect(_node(x_proj, 0), walk.CONV, "x_proj's input", "conv1d", also_through=walk.ACTIVATION) is not conv1d:
        raise _WalkEnded(f"x_proj's input does not come from {conv1d.name}, from which u comes")
    in_proj = _expect(_node(conv1d, 0), walk.LINEAR, "conv1d's input", "in_proj (a linear)")
    gate, out_proj = _output_side(y)
    gate_proj = None if gate is None else _expect(gate.z, walk.LINEAR, "the gate", "a linear")
    name = walk.module_path(scan) or scan.name
    return Block(name, scan, in_proj, conv1d, x_proj, dt_proj, gate_proj, gate, out_proj, c, y, product)


def _node(node: Node, index: int) -> Node:
    argument = node.args[index]
    if not isinstance(argument, Node):
        raise _WalkEnded(f"argument {index} of {node.name} is {argument!r}, not a tensor of the graph")
    return argument


def _expect(
    node: Node,
    targets: frozenset[object],
    what: str,
    wanted: str,
    *,
    also_through: frozenset[object] = frozenset(),
) -> Node:
    end = walk.upstream(node, through=walk.TRANSPARENT | also_through)
    if end.op == "call_function" and end.target in targets:
        return end
    raise _WalkEnded(f"the walk from {what} ended at {_label(end)}, where {wanted} was expected")


def _product(scan: Node) -> tuple[Node | None, Node]:
    """(multiplication h C, y) of a scan; the multiplication is None where it is inside the operator."""
    outputs = [user for user in scan.users if user.args[1:] == (0,)]
    if len(outputs) != 1:
        raise _WalkEnded(f"the scan's output is read by {len(outputs)} nodes, where one was expected")
    if scan.target in walk.SCAN:
        return None, outputs[0]
    product = _following(outputs[0], walk.MUL, through=walk.TRANSPARENT | walk.HADAMARD)
    return product, _following(_following(product, walk.SUM), walk.ADD)


def _following(node: Node, targets: frozenset[object], through: frozenset[object] = walk.TRANSPARENT) -> Node:
    users = list(walk.downstream(node, through=through))
    if len(users) != 1 or users[0].target not in targets:
        names = ", ".join(user.name for user in users) or "nothing"
        raise _WalkEnded(f"{node.name}, after the scan, feeds {names}, which is not y = (h C).sum(-1) + D u")
    return users[0]


def _other(product: Node, scan: Node) -> Node:
    through = walk.TRANSPARENT | walk.HADAMARD
    c = next(item for item in walk.inputs(product) if walk.upstream(item, through=through) is not scan)
    return _node(c, 0) if c.target == walk.aten.unsqueeze.default else c


def _output_side(y: Node) -> tuple[Gate | None, Node]:
    """Follows the scan's output y to out_proj; returns the gate, if any, and out_proj."""
    gate, node, previous = None, y, y
    while True:
        users = list(dict.fromkeys(walk.downstream(node, through=walk.TRANSPARENT | walk.HADAMARD)))
        if len(users) != 1:
            names = ", ".join(user.name for user in users) or "nothing"
            raise _WalkEnded(f"{node.name}, after the scan, feeds {names}, where one node was expected")
        previous, node = node, users[0]
        if node.op == "call_function" and node.target in walk.LINEAR:
            return gate, node
        if node.op != "call_function" or node.target not in walk.MUL | walk.ADD:
            raise _WalkEnded(f"the walk from the scan's output ended at {_label(node)}, where out_proj was expected")
        if node.target in walk.MUL and not any(map(is_constant, walk.inputs(node))):
            gate = gate_of(node, previous)
            if gate is None:
                raise _WalkEnded(f"no operand of {node.name} is an activated gate")


def _label(node: Node) -> str:
    value: Any = node.meta.get("val")
    if isinstance(value, list | tuple):
        value = value[0]
    shape = f" {tuple(value.shape)}" if hasattr(value, "shape") else ""
    path = walk.module_path(node)
    return f"{node.name}{shape}" + (f" in {path}" if path else "")
