"""SmoothQuant's own step: smooths in_proj's input through the norm's weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mq_ao.graph import edit
from mq_ao.graph.views import Norm
from mq_ao.passes.balance import balance, describe
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.norm_readers import norms, readers_of
from mq_ao.passes.options import Share
from mq_ao.statistics import Request


@dataclass(frozen=True)
class SmoothNorm(Pass):
    """gamma <- gamma / s, W_in <- W_in diag(s) (SmoothQuant, section 4).

    It is for recipes without R1, which needs norms without weight.

    Attributes:
        alpha: share of the activation in the balance.
    """

    name = "smooth_norm"

    alpha: Share = 0.5

    def requests(self, rewrite: Rewrite) -> Iterable[Request]:
        """Magnitudes of the norms' outputs."""
        return [Request(norm.name) for norm in norms(rewrite.module)]

    def apply(self, rewrite: Rewrite) -> None:
        """Balances every norm's output against the linears that read it."""
        for norm in norms(rewrite.module):
            readers = readers_of(norm)
            weight = edit.operand(rewrite.module, Norm.of(norm).weight)
            if isinstance(readers, str) or weight is None:
                self.leave_out(rewrite, norm.name, readers if isinstance(readers, str) else "the norm has no weight")
                continue
            largest = torch.stack([rewrite.largest_by_column(reader) for reader in readers]).amax(0)
            scales = balance(rewrite.of(norm).maximum, largest, self.alpha)
            edit.set_operand(rewrite.module, norm, "weight", weight / scales)
            bias = edit.operand(rewrite.module, Norm.of(norm).bias)
            if bias is not None:
                edit.set_operand(rewrite.module, norm, "bias", bias / scales)
            for reader in readers:
                rewrite.scale_columns(reader, scales)
            rewrite.update(norm, rewrite.of(norm).scaled(1 / scales))
            self.note(rewrite, norm.name, describe(scales))
