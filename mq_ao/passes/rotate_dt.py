"""R5: rotates dt_proj's input, offline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mq_ao.errors import MqAoError
from mq_ao.passes.base import Pass, Profile, Rewrite
from mq_ao.passes.klt import Basis, flatness, random_hadamard, rotation, variances
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
            d = block.dt
            statistics = rewrite.of(d)
            try:
                matrix, what = rotation(statistics, self.basis, block.name)
            except MqAoError as error:
                self.leave_out(rewrite, block.name, str(error))
                continue
            covariance = statistics.covariance()
            after = variances(covariance, matrix)
            alone = variances(covariance, random_hadamard(len(matrix)))
            rewrite.profiles.append(Profile(f"{block.name} dt_proj input", covariance.diagonal(), alone, after))
            rewrite.rotate_rows(block.dt_rows, matrix)
            rewrite.rotate_columns(block.dt_proj, matrix)
            rewrite.update(d, statistics.rotated(matrix))
            self.note(rewrite, block.name, f"{what}; {ratios(covariance.diagonal(), alone, after)}")


def ratios(before: object, alone: object, after: object) -> str:
    """max/min of channel variances before and after, in words."""
    values = [flatness(item) for item in (before, alone, after)]  # type: ignore[arg-type]
    return f"variance max/min {values[0]:.4g}, Hadamard alone {values[1]:.4g}, now {values[2]:.4g}"
