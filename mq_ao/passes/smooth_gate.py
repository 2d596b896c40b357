"""S2: smooths out_proj's input through the gate, whose SiLU becomes S-SiLU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from mq_ao.errors import MqAoError, Unsuitable
from mq_ao.graph import Block, edit, walk
from mq_ao.graph.gate import Gate
from mq_ao.graph.residual import normalised
from mq_ao.graph.rows import Rows, rows_of
from mq_ao.passes.balance import balance, describe
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.statistics import Request

aten = walk.aten


@dataclass(frozen=True)
class SmoothGate(Pass):
    """W_g <- diag(1/s) W_g, W_o <- W_o diag(s), gate = S-SiLU(z, s) = z sigmoid(s z) (METHOD.md section 2, S2).

    In Mamba-2, where a norm follows the gate, the norm's weight takes 1/s instead.

    Attributes:
        alpha: share of the activation in the balance.
    """

    name = "smooth_gate"
    step = "S2"

    alpha: float = 0.5

    def requests(self, rewrite: Rewrite) -> Iterable[Request]:
        """Magnitudes of out_proj's inputs."""
        return [Request(block.out_input.name) for block in rewrite.blocks]

    def apply(self, rewrite: Rewrite) -> None:
        """Balances every block's out_proj input against out_proj."""
        for block in rewrite.blocks:
            with self.where_suitable(rewrite, block.name):
                x = block.out_input
                scales = balance(rewrite.of(x).maximum, rewrite.largest_by_column(block.out_proj), self.alpha)
                scale_out_input(rewrite, block, 1 / scales)
                rewrite.scale_columns(block.out_proj, scales)
                rewrite.update(x, rewrite.of(x).scaled(1 / scales))
                self.note(rewrite, block.name, describe(scales))


def scale_out_input(rewrite: Rewrite, block: Block, factor: Tensor) -> None:
    """Multiplies out_proj's input by a positive `factor` (d_inner,).

    That goes into z's rows and S-SiLU; or, where the last thing before out_proj is a norm, into the norm's weight.

    Raises:
        Unsuitable: the block has no gate, or one whose channels are not out_proj's.
        MqAoError: out_proj's input is rotated already, so that its channels are no longer the gate's.
    """
    end = walk.upstream(block.out_input)
    if end.target in walk.HADAMARD:
        raise MqAoError("out_proj's input cannot be scaled through the gate once it is rotated: scale it first.")
    if end in block.norms or _is_weighting(end):
        _scale_weight(rewrite, end, factor)
        return
    rewrite.scale_rows(_rows(block), factor)
    for gate in block.gates:
        _scale_sigmoid(rewrite, gate, 1 / factor)


def _is_weighting(node: Node) -> bool:
    """Whether a node multiplies every channel by a number of its own, as the end of a grouped norm does."""
    if node.target not in walk.MUL or not edit.is_constant(node.args[1]):
        return False
    return list(walk.argument(node, 1).meta["val"].shape) == [edit.channels(node)]


def _scale_weight(rewrite: Rewrite, node: Node, factor: Tensor) -> None:
    index = 2 if node.target in walk.NORM else 1
    if index == 2 and normalised(node) != [len(factor)]:
        raise Unsuitable(f"{node.name} normalises groups of channels and has no weight after it.")
    weight = edit.operand(rewrite.module, node, index)
    edit.set_operand(rewrite.module, node, index, factor if weight is None else weight * factor)


def _rows(block: Block) -> Rows:
    """Channels of a linear that are z, of every gate of a block."""
    if not block.gates:
        raise Unsuitable("the block has no gate to scale.")
    readers = {node for gate in block.gates for node in gate.readers}
    found = {rows_of(gate.z, readers) for gate in block.gates}
    if len(found) > 1:
        raise Unsuitable("its gates are different channels.")
    return found.pop()


def _scale_sigmoid(rewrite: Rewrite, gate: Gate, factor: Tensor) -> None:
    module, end = rewrite.module, walk.upstream(gate.activated)
    if gate.scale is not None:
        inner = walk.argument(walk.argument(end, 1), 0)
        edit.set_operand(module, inner, 1, edit.constant(module, gate.scale).double() * factor)
        return
    with module.graph.inserting_before(end):
        dtype = gate.z.meta["val"].dtype
        scale = edit.get_attr(module, f"{end.name}_scale", factor.to(dtype), like=end)
        scaled = edit.call(module, aten.mul.Tensor, (gate.z, scale), like=end)
        sigmoid = edit.call(module, aten.sigmoid.default, (scaled,), like=end)
        activated = edit.call(module, aten.mul.Tensor, (gate.z, sigmoid), like=end)
    end.replace_all_uses_with(activated)
    module.graph.erase_node(end)
