"""S5: smooths dt_proj's input through the low-rank pair."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mq_ao.passes.balance import balance, describe
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.low_rank import low_rank, requests_for_dt
from mq_ao.passes.options import Share
from mq_ao.statistics import Request


@dataclass(frozen=True)
class SmoothDt(Pass):
    """W_dt <- diag(1/s) W_dt, W_up <- W_up diag(s) (docs/method.md, S5).

    Attributes:
        alpha: share of the activation in the balance.
    """

    name = "smooth_dt"
    step = "S5"

    alpha: Share = 0.5

    def requests(self, rewrite: Rewrite) -> Iterable[Request]:
        """Magnitudes of dt_proj's inputs."""
        return requests_for_dt(rewrite)

    def apply(self, rewrite: Rewrite) -> None:
        """Balances every dt_proj input against dt_proj."""
        for direction in rewrite.directions:
            with self.where_suitable(rewrite, direction.name):
                pair = low_rank(direction)
                scales = balance(rewrite.of(pair.dt).maximum, rewrite.largest_by_column(pair.dt_proj), self.alpha)
                rewrite.scale_rows(pair.rows, 1 / scales)
                rewrite.scale_columns(pair.dt_proj, scales)
                rewrite.update(pair.dt, rewrite.of(pair.dt).scaled(1 / scales))
                self.note(rewrite, direction.name, describe(scales))
