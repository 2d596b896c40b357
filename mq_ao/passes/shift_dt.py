"""The mid-range shift of dt_proj's input (reduce_mean)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.graph import edit, walk
from mq_ao.graph.rows import rows_of
from mq_ao.graph.views import Scan
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.low_rank import low_rank, requests_for_dt
from mq_ao.statistics import ChannelStatistics, Request


@dataclass(frozen=True)
class ShiftDt(Pass):
    """The mid-range m of dt_proj's input moves into biases: -m in x_proj, + m W_up^T at dt (docs/method.md, shift)."""

    name = "shift_dt"

    def requests(self, rewrite: Rewrite) -> Iterable[Request]:
        """Ranges of dt_proj's inputs."""
        return requests_for_dt(rewrite)

    def apply(self, rewrite: Rewrite) -> None:
        """Centres every dt_proj input."""
        for direction in rewrite.directions:
            if direction.scan.target in walk.SCAN_STATES:
                raise MqAoError("shift_dt changes the scan's bias: put it before expose_state.")
            with self.where_suitable(rewrite, direction.name):
                pair = low_rank(direction, shift=True)
                # What is added to dt_proj's output goes into this scan's bias, so nothing else may read it, or change
                # it on the way.
                rows_of(Scan.of(direction.scan).delta, {direction.scan}, shift=True)
                statistics = rewrite.of(pair.dt)
                low, high = statistics.extremes
                middle = (low + high) / 2
                x_proj, scan = pair.rows.linear, direction.scan
                bias = rewrite.bias(x_proj)
                if bias is None:
                    bias = torch.zeros(rewrite.weight(x_proj).shape[0], dtype=torch.float64)
                bias[pair.rows.slice] -= middle
                rewrite.set_bias(x_proj, bias)
                moved = rewrite.weight(pair.dt_proj) @ middle
                old = edit.operand(rewrite.module, Scan.of(scan).bias)
                edit.set_operand(rewrite.module, scan, "delta_bias", moved if old is None else old + moved)
                rewrite.update(pair.dt, shifted(statistics, -middle))
                self.note(rewrite, direction.name, f"shifts up to {middle.abs().max():.3g}")


def shifted(statistics: ChannelStatistics, by: Tensor) -> ChannelStatistics:
    """Statistics of x + by; the histogram of |x| is not known then."""
    low, high = statistics.extremes
    count, total = statistics.count, statistics.total
    moments = statistics.moments
    if moments is not None:
        cross = torch.outer(total, by)
        moments = moments + cross + cross.T + count * torch.outer(by, by)
    return replace(
        statistics,
        low=low + by,
        high=high + by,
        total=total + count * by,
        squares=statistics.squares + 2 * by * total + count * by.square(),
        moments=moments,
        histogram=None,
    )
