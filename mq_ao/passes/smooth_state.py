"""S4: smooths the product h C through the rows of x_proj that are B and C."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from mq_ao.errors import MqAoError
from mq_ao.graph import Direction, walk
from mq_ao.passes.balance import balance, describe
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.statistics import Request
from mq_ao.statistics.probe import states_name


class Partner(StrEnum):
    """What C is balanced against."""

    STATE = "state"
    """h: for a quantized product h C (the paper)."""
    INPUT = "input"
    """B: for quantized scan operands."""


@dataclass(frozen=True)
class SmoothState(Pass):
    """W_C <- diag(s) W_C, W_B <- diag(1/s) W_B with s = sqrt(max|h| / max|C|) a state (docs/method.md, S4).

    The recurrence is linear in B and diagonal in the states, so h is divided by s at every step. A carried state is
    kept in that scaled form.

    Attributes:
        partner: what C is balanced against.
    """

    name = "smooth_state"
    step = "S4"

    partner: Partner = Partner.STATE

    def requests(self, rewrite: Rewrite) -> Iterable[Request]:
        """Magnitudes of C and of its partner."""
        for direction in rewrite.directions:
            if self.partner is Partner.STATE and direction.scan.target in walk.SCAN_STATES:
                raise MqAoError("smooth_state balances against the scan's states: put it before expose_state.")
            if direction.x_projs:
                yield Request(direction.c.name)
                yield Request(self._partner_name(direction))

    def apply(self, rewrite: Rewrite) -> None:
        """Balances every scan's C."""
        for direction in rewrite.directions:
            with self.where_suitable(rewrite, direction.name):
                b_rows, c_rows = direction.b_rows, direction.c_rows
                name = self._partner_name(direction)
                partner, c = rewrite.statistics[name], rewrite.of(direction.c)
                scales = balance(partner.maximum, c.maximum, 0.5)
                rewrite.scale_rows(b_rows, 1 / scales)
                rewrite.scale_rows(c_rows, scales)
                rewrite.update(direction.c, c.scaled(scales))
                rewrite.statistics[name] = partner.scaled(1 / scales)
                self.note(rewrite, direction.name, describe(scales))

    def _partner_name(self, direction: Direction) -> str:
        return states_name(direction.scan) if self.partner is Partner.STATE else direction.b.name
