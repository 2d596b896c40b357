"""R5: rotates dt_proj's input, offline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mq_ao.errors import MqAoError
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.klt import Basis, rotation
from mq_ao.passes.statistics import Request


@dataclass(frozen=True)
class RotateDt(Pass):
    """W_dt <- R^T W_dt, W_up <- W_up R with one r x r matrix a layer (METHOD.md section 3, R5).

    Attributes:
        basis: KLT-enhanced, or Hadamard alone.
    """

    name = "rotate_dt"
    step = "R5"

    basis: Basis = Basis.KLT

    def requests(self, rewrite: Rewrite) -> Iterable[Request]:
        """Covariances of dt_proj's inputs."""
        return [Request(block.dt.name, covariance=True) for block in rewrite.blocks]

    def apply(self, rewrite: Rewrite) -> None:
        """Rotates every block's dt_proj input; a rank without a Hadamard matrix is left as it is."""
        for block in rewrite.blocks:
            statistics = rewrite.of(block.dt)
            try:
                found = rotation(statistics, self.basis, f"{block.name} dt_proj input")
            except MqAoError as error:
                self.leave_out(rewrite, block.name, str(error))
                continue
            rewrite.profiles.append(found.profile)
            rewrite.rotate_rows(block.dt_rows, found.matrix)
            rewrite.rotate_columns(block.dt_proj, found.matrix)
            rewrite.update(block.dt, statistics.rotated(found.matrix))
            self.note(rewrite, block.name, found.detail)
