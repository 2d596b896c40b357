"""S2: smooths out_proj's input through the gate, whose SiLU becomes S-SiLU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from mq_ao.errors import MqAoError, Unsuitable
from mq_ao.graph import Block, edit, walk
from mq_ao.graph.gate import Gate
from mq_ao.graph.residual import normalised
from mq_ao.graph.rows import Rows, origin, rows_of
from mq_ao.graph.views import Norm
from mq_ao.passes.balance import Size, balance, describe
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.options import Share
from mq_ao.statistics import Request

aten = walk.aten


@dataclass(frozen=True)
class SmoothGate(Pass):
    """W_g <- diag(1/s) W_g, W_o <- W_o diag(s), gate = S-SiLU(z, s) = z sigmoid(s z) (docs/method.md, S2).

    In Mamba-2, where a norm follows the gate, the norm's weight takes 1/s instead.

    Attributes:
        alpha: share of the activation in the balance.
        size: what is balanced.
    """

    name = "smooth_gate"
    step = "S2"

    alpha: Share = 0.5
    size: Size = Size.LARGEST

    def requests(self, rewrite: Rewrite) -> Iterable[Request]:
        """Magnitudes of out_proj's inputs."""
        return [Request(block.out_input.name) for block in rewrite.blocks]

    def apply(self, rewrite: Rewrite) -> None:
        """Balances every block's out_proj input against out_proj."""
        for block in rewrite.blocks:
            with self.where_suitable(rewrite, block.name):
                x = block.out_input
                scales = balance(*self._sizes(rewrite, block), self.alpha)
                scale_out_input(rewrite, block, 1 / scales)
                rewrite.scale_columns(block.out_proj, scales)
                rewrite.update(x, rewrite.of(x).scaled(1 / scales))
                self.note(rewrite, block.name, describe(scales))

    def _sizes(self, rewrite: Rewrite, block: Block) -> tuple[Tensor, Tensor]:
        """Of the channels of out_proj's input and of its weight."""
        found = rewrite.of(block.out_input)
        if self.size is Size.POWER:
            return found.power, rewrite.power_by_column(block.out_proj)
        return found.maximum, rewrite.largest_by_column(block.out_proj)


def scale_out_input(rewrite: Rewrite, block: Block, factor: Tensor) -> None:
    """Multiplies out_proj's input by a positive `factor` (d_inner,).

    That goes into z's rows and S-SiLU; or, where the last thing before out_proj is a norm, into the norm's weight.

    Raises:
        Unsuitable: the block has no gate, one whose channels are not out_proj's, or more than gates before out_proj.
        MqAoError: out_proj's input is rotated already, so that its channels are no longer the gate's.
    """
    end = origin(block.out_input)
    if end.target in walk.HADAMARD:
        raise MqAoError("out_proj's input cannot be scaled through the gate once it is rotated: scale it first.")
    weighting = _weighting(end)
    if weighting is not None:
        _scale_weight(rewrite, end, weighting, factor)
        return
    if not block.gates:
        raise Unsuitable("the block has no gate to scale.")
    _check_path(block)
    rows = _rows(block)
    if rows.stop - rows.start != len(factor):
        raise Unsuitable(f"the gate has {rows.stop - rows.start} channels and out_proj {len(factor)}.")
    rewrite.scale_rows(rows, factor)
    # Two gates may share one activation.
    for gate in {gate.end: gate for gate in block.gates}.values():
        _scale_sigmoid(rewrite, gate, 1 / factor)


def _weighting(node: Node) -> str | None:
    """Which argument of a node is a weight a channel: of a norm, or of the multiplication that ends a grouped norm."""
    if node.target in walk.NORM:
        return "weight" if normalised(node) == [edit.channels(node)] else None
    if node.target not in walk.MUL:
        return None
    sizes = [edit.channels(node)]
    given = walk.arguments(node).items()
    return next((name for name, value in given if edit.is_constant(value) and _shape(value) == sizes), None)


def _shape(node: Any) -> list[int]:
    return list(node.meta["val"].shape)


def _scale_weight(rewrite: Rewrite, node: Node, name: str, factor: Tensor) -> None:
    weight = edit.operand(rewrite.module, walk.arguments(node)[name])
    edit.set_operand(rewrite.module, node, name, factor if weight is None else weight * factor)
    bias = edit.operand(rewrite.module, Norm.of(node).bias) if node.target in walk.NORM else None
    if bias is not None:
        edit.set_operand(rewrite.module, node, "bias", bias * factor)


def _check_path(block: Block) -> None:
    """Checks that out_proj's input is the gates' outputs, added up and multiplied by constants.

    Raises:
        Unsuitable: it is not, or what scales the gates would reach something else.
    """
    gates = {gate.node for gate in block.gates}
    pending = [block.out_input]
    while pending:
        end = origin(pending.pop())
        if end in gates:
            continue
        if end.target in walk.ADD:
            pending += walk.inputs(end)
        elif walk.is_scaling(end) or walk.is_tokenwise(end) or (end.target in walk.MUL and _weighting(end) == "other"):
            pending.append(walk.argument(end, 0))
        else:
            raise Unsuitable(f"{end.name} lies between the gate and out_proj.")
    for gate in block.gates:
        for reader in walk.downstream(gate.end):
            if reader not in gates:
                raise Unsuitable(f"{reader.name} reads the activated gate too.")
        if origin(gate.activated) is not gate.end:
            raise Unsuitable(f"{gate.activated.name} is not the whole of the activated gate.")


def _rows(block: Block) -> Rows:
    """Channels of a linear that are z, of every gate of a block."""
    readers = {node for gate in block.gates for node in gate.readers}
    found = {rows_of(gate.z, readers) for gate in block.gates}
    if len(found) > 1:
        raise Unsuitable("its gates are different channels.")
    return found.pop()


def _scale_sigmoid(rewrite: Rewrite, gate: Gate, factor: Tensor) -> None:
    module, end = rewrite.module, gate.end
    if gate.scale is not None:
        inner = walk.argument(walk.argument(end, 1), 0)
        edit.set_operand(module, inner, "other", edit.constant(module, gate.scale).double() * factor)
        return
    with module.graph.inserting_before(end):
        dtype = gate.z.meta["val"].dtype
        scale = edit.get_attr(module, f"{end.name}_scale", factor.to(dtype), like=end)
        scaled = edit.call(module, aten.mul.Tensor, (gate.z, scale), like=end)
        sigmoid = edit.call(module, aten.sigmoid.default, (scaled,), like=end)
        activated = edit.call(module, aten.mul.Tensor, (gate.z, sigmoid), like=end)
    end.replace_all_uses_with(activated)
    module.graph.erase_node(end)
