"""R5: rotates dt_proj's input, offline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.klt import Basis, rotation
from mq_ao.passes.low_rank import low_rank, requests_for_dt
from mq_ao.statistics import Request


@dataclass(frozen=True)
class RotateDt(Pass):
    """W_dt <- R^T W_dt, W_up <- W_up R with one r x r matrix a layer (docs/method.md, R5).

    Attributes:
        basis: KLT-enhanced, or Hadamard alone.
    """

    name = "rotate_dt"
    step = "R5"

    basis: Basis = Basis.KLT

    def requests(self, rewrite: Rewrite) -> Iterable[Request]:
        """Covariances of dt_proj's inputs."""
        return requests_for_dt(rewrite, covariance=True)

    def apply(self, rewrite: Rewrite) -> None:
        """Rotates every dt_proj input; a rank without a Hadamard matrix is left as it is."""
        for direction in rewrite.directions:
            with self.where_suitable(rewrite, direction.name):
                pair = low_rank(direction)
                statistics = rewrite.of(pair.dt)
                found = rotation(statistics, self.basis, f"{direction.name} dt_proj input")
                rewrite.profiles.append(found.profile)
                rewrite.rotate_rows(pair.rows, found.matrix)
                rewrite.rotate_columns(pair.dt_proj, found.matrix)
                rewrite.update(pair.dt, statistics.rotated(found.matrix))
                self.note(rewrite, direction.name, found.detail)
