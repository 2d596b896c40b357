"""Finds Mamba blocks by dataflow, anchored on the scan (docs/design.md, decision 1)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mq_ao.errors import MqAoError
from mq_ao.graph import outside, walk
from mq_ao.graph.block import Block, Direction
from mq_ao.graph.edit import is_constant
from mq_ao.graph.gate import Gate, gate_of
from mq_ao.graph.roles import Role
from mq_ao.graph.views import Conv, Layer, Linear, Scan


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
        linears: other linears, such as those of attention and MLPs.
        convolutions: convolutions that no scan reads, such as that of a branch beside it.
    """

    blocks: tuple[Block, ...]
    heads: tuple[Node, ...] = ()
    embeddings: tuple[Node, ...] = ()
    rejected: tuple[Rejection, ...] = field(default=())
    linears: tuple[Node, ...] = ()
    convolutions: tuple[Node, ...] = ()

    def by_role(self) -> list[tuple[Role, Node]]:
        """Every (role, node) pair of the graph."""
        pairs = [(Role.EMBEDDING, node) for node in self.embeddings]
        for block in self.blocks:
            pairs.extend(block.by_role())
        pairs += [(Role.CONV1D, node) for node in self.convolutions]
        pairs += [(Role.LINEAR, node) for node in self.linears]
        pairs += [(Role.HEAD, node) for node in self.heads]
        return list(dict.fromkeys(pairs))  # blocks may share an in_proj

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The scans of all blocks."""
        return tuple(direction for block in self.blocks for direction in block.directions)

    def describe(self) -> str:
        """Text that lists each block's nodes by role, then what was left out and why."""
        lines = [f"{len(self.blocks)} Mamba block(s)"]
        for block in self.blocks:
            lines.append(f"  {block.name}")
            gate = block.gate_proj if block.gate_proj is not block.in_proj else None
            rows: list[tuple[str, Node | None]] = [("scan", direction.scan) for direction in block.directions]
            rows += [(str(role), node) for role, node in block.by_role() if node is not gate]
            rows += [("gate_proj", gate), *(("gate", item.node) for item in block.gates)]
            rows += [("norm", norm) for norm in block.norms]
            lines += [f"    {role:<9} {_label(node)}" for role, node in rows if node is not None]
        lines += [f"embedding   {_label(node)}" for node in self.embeddings]
        lines += [f"conv1d      {_label(node)}" for node in self.convolutions]
        lines += [f"linear      {_label(node)}" for node in self.linears]
        lines += [f"head        {_label(node)}" for node in self.heads]
        lines += [f"left out    {item.node}: {item.reason}" for item in self.rejected]
        return "\n".join(lines)


class _WalkEnded(Exception):
    """The neighbourhood of a scan is not that of a Mamba block."""


def match(module: GraphModule) -> Match:
    """Finds the Mamba blocks, heads, other linears and embeddings of an exported graph.

    Args:
        module: float graph of aten and mq_ao operators (`ExportedProgram.module()`).

    Raises:
        MqAoError: the graph has no scan at all.
    """
    scans = walk.calls(module, walk.ANY_SCAN)
    if not scans:
        raise MqAoError(
            "no mq_ao::selective_scan or ssd_scan in the graph, so there is nothing to recognise as Mamba: capture the "
            "model with mq_ao.export, from a model whose scan is mamba_ssm's, transformers' or torch.ops.mq_ao's; of a "
            'scan of your own, name the function: mq_ao.export(..., scans={"Class.method": '
            "mq_ao.capture.SelectiveScan()})."
        )
    found: dict[Node, list[_Found]] = {}
    rejected = []
    for scan in scans:
        try:
            item = _Found.of(scan)
            found.setdefault(item.output.out_proj, []).append(item)
        except _WalkEnded as end:
            rejected.append(Rejection(scan.name, str(end)))
    blocks = []
    for items in found.values():
        try:
            blocks.append(_block(items))
        except _WalkEnded as end:
            rejected += [Rejection(item.direction.scan.name, str(end)) for item in items]
    taken = {node for block in blocks for _, node in block.by_role()}
    heads, linears = [], []
    for node in walk.calls(module, walk.LINEAR):
        if node in taken:
            continue
        reason = outside.unsuited(node)
        if reason is not None:
            rejected.append(Rejection(node.name, reason))
        elif outside.is_output(node) and not _is_cached(node):
            heads.append(node)
        else:
            linears.append(node)
    linears += [node for node in walk.calls(module, walk.EXPERTS) if is_constant(Layer.of(node).weight)]
    for node in module.graph.nodes:
        if outside.is_product(node):
            reason = "a product with constant weights that is no linear: it stays in float"
            rejected.append(Rejection(node.name, reason))
    embeddings = walk.calls(module, walk.EMBEDDING)
    convolutions = [node for node in walk.calls(module, {torch.ops.mq_ao.causal_conv1d.default}) if node not in taken]
    return Match(tuple(blocks), tuple(heads), tuple(embeddings), tuple(rejected), tuple(linears), tuple(convolutions))


def _is_cached(node: Node) -> bool:
    """Whether attention reads what the graph gives: keys or values, to be carried."""
    return any(user.target in walk.ATTENTION for user in walk.downstream(node))


@dataclass(frozen=True)
class _Output:
    """What lies between a scan and out_proj."""

    gates: tuple[Gate, ...]
    norms: tuple[Node, ...]
    out_proj: Node


@dataclass(frozen=True)
class _Found:
    """A scan with its surroundings, before scans of one block are put together."""

    direction: Direction
    in_proj: Node
    gate_proj: Node | None
    output: _Output

    @classmethod
    def of(cls, scan: Node) -> _Found:
        product, y = _product(scan)
        c = Scan.of(scan).c if product is None else _other(product, scan)
        own = _state_space_duality if scan.target in walk.SSD else _low_rank
        conv1d, x_projs, dt_projs = own(Scan.of(scan), c)
        in_proj = _expect(Conv.of(conv1d).x, walk.LINEAR, "conv1d's input", "in_proj (a linear)")
        output = _output_side(y)
        gate_projs = {_expect(gate.z, walk.LINEAR, "the gate", "a linear") for gate in output.gates}
        if len(gate_projs) > 1:
            raise _WalkEnded(f"it is gated by several linears: {', '.join(sorted(map(str, gate_projs)))}")
        name = walk.module_path(scan) or scan.name
        direction = Direction(name, scan, conv1d, x_projs, dt_projs, c, y, product)
        return cls(direction, in_proj, next(iter(gate_projs), None), output)


def _low_rank(scan: Scan, c: Node) -> tuple[Node, tuple[Node, ...], tuple[Node, ...]]:
    """(conv1d, x_projs, dt_projs) of a Mamba-1 scan."""
    dt_projs = _sources([scan.delta], walk.LINEAR, "delta", "dt_proj (a linear)", also_through=walk.NORM)
    found: set[Node] = set()
    for name, node in (("B", scan.b), ("C", c)):
        found.update(_sources([node], walk.LINEAR, name, "x_proj (a linear)", also_through=walk.NORM))
    conv1d = _expect(scan.u, walk.CONV, "u", "conv1d", also_through=walk.ACTIVATION)
    for dt_proj in dt_projs:
        # Where dt has its full rank, this linear reads the convolution itself.
        if not _comes_from(dt_proj, conv1d):
            low = [Linear.of(dt_proj).x]
            found.update(_sources(low, walk.LINEAR, "dt_proj's input", "x_proj (a linear)", also_through=walk.NORM))
    x_projs = tuple(sorted(found))
    for x_proj in x_projs:
        if not _comes_from(x_proj, conv1d):
            raise _WalkEnded(f"the input of {x_proj.name} does not come from {conv1d.name}, from which u comes")
    return conv1d, x_projs, dt_projs


def _comes_from(linear: Node, conv1d: Node) -> bool:
    """Whether a linear reads a convolution's output."""
    try:
        inputs = [Linear.of(linear).x]
        return _sources(inputs, walk.CONV, "its input", "conv1d", also_through=walk.ACTIVATION) == (conv1d,)
    except _WalkEnded:
        return False


def _state_space_duality(scan: Scan, c: Node) -> tuple[Node, tuple[Node, ...], tuple[Node, ...]]:
    """(conv1d, nothing, nothing) of a Mamba-2 scan."""
    conv1d = _expect(scan.u, walk.CONV, "x", "conv1d", also_through=walk.ACTIVATION)
    for name, node in (("B", scan.b), ("C", c)):
        if _expect(node, walk.CONV, name, "conv1d", also_through=walk.ACTIVATION) is not conv1d:
            raise _WalkEnded(f"{name} does not come from {conv1d.name}, from which x comes")
    _expect(scan.delta, walk.LINEAR, "dt", "in_proj (a linear)")
    return conv1d, (), ()


def _block(items: list[_Found]) -> Block:
    """One block of the scans that lead to one out_proj."""
    first = items[0]
    for item in items[1:]:
        if item.in_proj is not first.in_proj:
            raise _WalkEnded(
                f"its input comes from {item.in_proj.name}, and that of {first.direction.name} from "
                f"{first.in_proj.name}, though both lead to {first.output.out_proj.name}"
            )
    gate_projs = {item.gate_proj for item in items}
    if len(gate_projs) > 1:
        raise _WalkEnded(f"the scans that lead to {first.output.out_proj.name} have different gates")
    gates = {gate.node: gate for item in items for gate in item.output.gates}
    norms = dict.fromkeys(norm for item in items for norm in item.output.norms)
    directions = [item.direction for item in items]
    if len(items) > 1:
        directions = [replace(item, name=f"{item.name} ({item.scan.name})") for item in directions]
    return Block(
        first.direction.name,
        first.in_proj,
        first.gate_proj,
        tuple(gates.values()),
        tuple(norms),
        first.output.out_proj,
        tuple(directions),
    )


def _expect(
    node: Node,
    targets: frozenset[object],
    what: str,
    wanted: str,
    *,
    also_through: frozenset[object] = frozenset(),
) -> Node:
    """The one node of these targets that a value comes from."""
    found = _sources([node], targets, what, wanted, also_through=also_through)
    if len(found) > 1:
        raise _WalkEnded(f"{what} comes from {_listed(found)}, where one was expected: {wanted}")
    return found[0]


def _sources(
    nodes: Iterable[Node],
    targets: frozenset[object],
    what: str,
    wanted: str,
    *,
    also_through: frozenset[object],
) -> tuple[Node, ...]:
    """The nodes of these targets that values come from, in graph order; of what was joined, from every part."""
    found: dict[Node, None] = {}
    pending = list(nodes)
    while pending:
        end = _unscaled(pending.pop(), walk.TRANSPARENT | also_through)
        if end.target in walk.JOINING:
            pending += walk.inputs(end)
        elif end.op == "call_function" and end.target in targets:
            found[end] = None
        else:
            remedy = (
                "; of a layer and an adapter such as LoRA: merge the adapter first" if end.target in walk.ADD else ""
            )
            raise _WalkEnded(f"the walk from {what} ended at {_label(end)}, where {wanted} was expected{remedy}")
    return tuple(sorted(found))


def _listed(nodes: Iterable[Node]) -> str:
    return ", ".join(node.name for node in nodes)


def _unscaled(node: Node, through: frozenset[object]) -> Node:
    """Where a walk up ends that also passes masks, and multiplications by constants, as of mup-parametrised models."""
    end = walk.upstream(node, through=through, tokenwise=True)
    while end.target in walk.MUL and (walk.is_scaling(end) or is_constant(end.args[1])):
        end = walk.upstream(walk.argument(end, 0), through=through, tokenwise=True)
    return end


def _product(scan: Node) -> tuple[Node | None, Node]:
    """(multiplication h C, y) of a scan; the multiplication is None where it is inside the operator."""
    outputs = [user for user in scan.users if walk.is_result(user, 0)]
    if len(outputs) != 1:
        raise _WalkEnded(f"the scan's output is read by {len(outputs)} nodes, where one was expected")
    if scan.target not in walk.SCAN_STATES:
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
    return walk.argument(c, 0) if c.target == walk.aten.unsqueeze.default else c


def _output_side(y: Node) -> _Output:
    """Follows the scan's output y to out_proj."""
    gates: list[Gate] = []
    norms: list[Node] = []
    node = y
    while True:
        previous, node = node, _next(node)
        if node.op == "call_function" and node.target in walk.LINEAR:
            return _Output(tuple(gates), tuple(norms), node)
        if node.op == "call_function" and node.target in walk.NORM:
            norms.append(node)
        elif node.target in walk.JOINING:
            if not _joins_channels(node):
                raise _WalkEnded(f"{_label(node)}, after the scan, joins values along another axis than the channels")
        elif node.op != "call_function" or node.target not in walk.MUL | walk.DIV | walk.ADD:
            raise _WalkEnded(f"the walk from the scan's output ended at {_label(node)}, where out_proj was expected")
        elif node.target in walk.MUL and not walk.is_scaling(node) and not any(map(is_constant, walk.inputs(node))):
            gate = gate_of(node, previous)
            if gate is not None:
                gates.append(gate)
            elif not walk.is_tokenwise(node):
                raise _WalkEnded(f"no operand of {node.name} is an activated gate")


def _joins_channels(node: Node) -> bool:
    """Whether a concatenation is along the last axis."""
    return node.target != walk.aten.stack.default and walk.arguments(node)["dim"] in (-1, node.meta["val"].dim() - 1)


def _next(node: Node) -> Node:
    """What reads a value; where parts of it are added up, the sum of all of them."""
    through = walk.TRANSPARENT | walk.HADAMARD
    users = set(walk.downstream(node, through=through))
    while len(users) > 1 and all(user.target in walk.ADD for user in users):
        first = min(users)
        following = set(walk.downstream(first, through=through))
        if len(following) != 1:
            break
        users = users - {first} | following
    if len(users) != 1:
        names = _listed(sorted(users)) or "nothing"
        raise _WalkEnded(f"{node.name}, after the scan, feeds {names}, where one node was expected")
    return users.pop()


def _label(node: Node) -> str:
    value: Any = node.meta.get("val")
    if isinstance(value, list | tuple):
        value = value[0]
    shape = f" {tuple(value.shape)}" if hasattr(value, "shape") else ""
    path = walk.module_path(node)
    return f"{node.name}{shape}" + (f" in {path}" if path else "")
