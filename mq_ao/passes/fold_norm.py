"""Folds the weight of norms into the linears that read them, and LayerNorm into RMSNorm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from mq_ao.graph import edit, walk
from mq_ao.graph.residual import MOVING, SELECTING, Stream
from mq_ao.graph.views import Norm
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.norm_readers import norms, readers_of
from mq_ao.passes.rotate_residual import change_basis

aten = walk.aten


@dataclass(frozen=True)
class FoldNorm(Pass):
    """W_in <- W_in gamma, b_in += W_in beta; LayerNorm becomes RMSNorm where its mean can go.

    The mean subtraction goes into every writer of the residual stream, if the stream is read through LayerNorms alone
    (docs/method.md, section 1).
    """

    name = "fold_norm"

    def apply(self, rewrite: Rewrite) -> None:
        """Folds every norm that only linears read."""
        for norm in norms(rewrite.module):
            readers = readers_of(norm)
            if isinstance(readers, str):
                self.leave_out(rewrite, norm.name, readers)
            else:
                self._fold(rewrite, norm, readers)
        for stream in rewrite.streams:
            if any(norm.target == aten.layer_norm.default for norm in stream.norms):
                self._centre(rewrite, stream)

    def _fold(self, rewrite: Rewrite, norm: Node, readers: list[Node]) -> None:
        given = Norm.of(norm)
        old = (given.weight, given.bias)
        gamma, beta = (edit.operand(rewrite.module, node) for node in old)
        if gamma is None and beta is None:
            return
        for reader in readers:
            if beta is not None:
                bias, moved = rewrite.bias(reader), rewrite.weight(reader) @ beta
                rewrite.set_bias(reader, moved if bias is None else bias + moved)
            if gamma is not None:
                rewrite.scale_columns(reader, gamma)
        given.weight = None
        if beta is not None:
            given.bias = None
        for node in filter(None, old):
            edit.drop_unused(rewrite.module, node)
        self.note(rewrite, walk.module_path(norm) or norm.name, f"into {', '.join(reader.name for reader in readers)}")

    def _centre(self, rewrite: Rewrite, stream: Stream) -> None:
        reason = stream.problem or _uncentred(stream)
        if reason is not None:
            self.leave_out(rewrite, stream.name, f"LayerNorm stays: {reason}")
            return
        centring = torch.eye(stream.width, dtype=torch.float64) - 1 / stream.width
        change_basis(rewrite, stream, centring)
        for norm in stream.norms:
            given = Norm.of(norm)
            with rewrite.module.graph.inserting_before(norm):
                args = (given.x, given.shape, None, given.eps)
                new = edit.call(rewrite.module, aten.rms_norm.default, args, like=norm)
            norm.replace_all_uses_with(new)
            rewrite.module.graph.erase_node(norm)
        self.note(rewrite, stream.name, "LayerNorm became RMSNorm, the writers write zero means")


def _uncentred(stream: Stream) -> str | None:
    for norm in stream.norms:
        if norm.target != aten.layer_norm.default:
            return f"{norm.name} reads the same stream and is not a LayerNorm"
        if (Norm.of(norm).weight, Norm.of(norm).bias) != (None, None):
            return f"the weight of {norm.name} could not be folded"
    for node in stream.inputs:
        through = SELECTING | MOVING | {aten.mean.dim, aten.flip.default}
        if walk.upstream(node, through=through, tokenwise=True) not in stream.norms:
            return f"{node.name} is read without a norm"
    return None
