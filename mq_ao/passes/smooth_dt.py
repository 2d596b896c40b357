"""S5: smooths dt_proj's input through the low-rank pair."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mq_ao.passes.balance import balance, describe
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.statistics import Request


@dataclass(frozen=True)
class SmoothDt(Pass):
    """W_dt <- diag(1/s) W_dt, W_up <- W_up diag(s) (METHOD.md section 2, S5).

    Attributes:
        alpha: share of the activation in the balance.
    """

    name = "smooth_dt"
    step = "S5"

    alpha: float = 0.5

    def requests(self, rewrite: Rewrite) -> Iterable[Request]:
        """Magnitudes of dt_proj's inputs."""
        return [Request(block.dt.name) for block in rewrite.blocks]

    def apply(self, rewrite: Rewrite) -> None:
        """Balances every block's dt_proj input against dt_proj."""
        for block in rewrite.blocks:
            d = block.dt
            scales = balance(rewrite.of(d).maximum, rewrite.largest_by_column(block.dt_proj), self.alpha)
            rewrite.scale_rows(block.dt_rows, 1 / scales)
            rewrite.scale_columns(block.dt_proj, scales)
            rewrite.update(d, rewrite.of(d).scaled(1 / scales))
            self.note(rewrite, block.name, describe(scales))
