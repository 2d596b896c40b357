"""The low-rank pair of linears that yields dt: rows of x_proj, then dt_proj."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from mq_ao.errors import Unsuitable
from mq_ao.graph import Direction
from mq_ao.graph.rows import Rows, rows_of
from mq_ao.passes.base import Rewrite
from mq_ao.statistics import Request


@dataclass(frozen=True)
class LowRank:
    """A low-rank pair.

    Attributes:
        dt: what dt_proj reads, (batch, length, dt_rank).
        rows: channels of x_proj that are dt.
        dt_proj: the second linear.
    """

    dt: Node
    rows: Rows
    dt_proj: Node


def low_rank(direction: Direction, *, shift: bool = False) -> LowRank:
    """The pair of a scan.

    Args:
        direction: the scan with its layers.
        shift: a constant is to be added to dt: see `rows_of`.

    Raises:
        Unsuitable: there is none or several, or something is between both linears.
    """
    if not direction.dt_projs:
        raise Unsuitable("dt has no low-rank pair of linears: Mamba-2 takes it from in_proj.")
    if direction.dt is None:
        raise Unsuitable("groups of channels have a pair of linears each.")
    (dt_proj,) = direction.dt_projs
    return LowRank(direction.dt, rows_of(direction.dt, {dt_proj}, shift=shift), dt_proj)


def requests_for_dt(rewrite: Rewrite, *, covariance: bool = False) -> list[Request]:
    """Statistics of what every dt_proj reads."""
    values = (direction.dt for direction in rewrite.directions)
    return [Request(dt.name, covariance=covariance) for dt in values if dt is not None]
