"""R1: rotates the residual stream, offline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from mq_ao.graph import edit, walk
from mq_ao.graph.residual import Stream
from mq_ao.graph.rows import Rows
from mq_ao.graph.views import Layer, Norm
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.klt import Basis, rotation
from mq_ao.statistics import ChannelStatistics, Request


@dataclass(frozen=True)
class RotateResidual(Pass):
    """Writers of the stream are multiplied by R, readers by R^T, one D x D matrix a stream (docs/method.md, R1).

    It needs norms without weight: fold them first. A stream that the analysis cannot follow is left as it is.

    Attributes:
        basis: KLT-enhanced, or Hadamard alone.
    """

    name = "rotate_residual"
    step = "R1"

    basis: Basis = Basis.KLT

    def requests(self, rewrite: Rewrite) -> Iterable[Request]:
        """Covariances of everything that is read from the streams."""
        for stream in rewrite.streams:
            if stream.problem is None:
                yield from (Request(node.name, covariance=True) for node in stream.inputs)

    def apply(self, rewrite: Rewrite) -> None:
        """Rotates every stream."""
        for stream in rewrite.streams:
            reason = stream.problem or _weighted_norm(stream)
            if reason is not None:
                self.leave_out(rewrite, stream.name, reason)
                continue
            copies = (part for node in stream.inputs for part in rewrite.of(node).copies(stream.width))
            pooled = reduce(ChannelStatistics.merged, copies)
            with self.where_suitable(rewrite, stream.name):
                found = rotation(pooled, self.basis, stream.name)
                rewrite.profiles.append(found.profile)
                change_basis(rewrite, stream, found.matrix)
                for reader in stream.readers:
                    count = edit.channels(Layer.of(reader).x) // stream.width
                    rewrite.rotate_columns(reader, torch.block_diag(*[found.matrix] * count))
                for node in stream.inputs:
                    del rewrite.statistics[node.name]  # of another basis, and large
                self.note(rewrite, stream.name, found.detail)


def change_basis(rewrite: Rewrite, stream: Stream, matrix: Tensor) -> None:
    """Multiplies everything that writes into a stream by `matrix`."""
    for writer in stream.writers:
        if writer.target in walk.LINEAR | walk.EXPERTS:
            outputs = edit.constant(rewrite.module, Layer.of(writer).weight).shape[0]
            for first in range(0, outputs, stream.width):  # of each expert
                rewrite.rotate_rows(Rows(writer, first, first + stream.width), matrix)
            continue
        rewrite.change_rows(writer, lambda rows: rows @ matrix)
    for node, name in stream.constants:
        value = edit.constant(rewrite.module, walk.arguments(node)[name]).double()
        rewrite.set_parameter(node, name, value @ matrix)


def _weighted_norm(stream: Stream) -> str | None:
    for norm in stream.norms:
        if norm.target == walk.aten.layer_norm.default:
            return f"{norm.name} is a LayerNorm, whose mean is not a rotation's: fold it with fold_norm first"
        if Norm.of(norm).weight is not None:
            return f"{norm.name} has a weight: fold it with fold_norm first"
    return None
