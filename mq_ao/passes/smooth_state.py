"""S4: smooths the product h C through the rows of x_proj that are B and C."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from mq_ao.graph import Block
from mq_ao.passes.balance import balance, describe
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.probe import states_name
from mq_ao.passes.statistics import Request


class Partner(StrEnum):
    """What C is balanced against."""

    STATE = "state"
    """h: for a quantized product h C (the paper)."""
    INPUT = "input"
    """B: for quantized scan operands."""


@dataclass(frozen=True)
class SmoothState(Pass):
    """W_C <- diag(s) W_C, W_B <- diag(1/s) W_B with s = sqrt(max|h| / max|C|) a state (METHOD.md section 2, S4).

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
        for block in rewrite.blocks:
            yield Request(block.c.name)
            yield Request(self._partner_name(block))

    def apply(self, rewrite: Rewrite) -> None:
        """Balances every block's C."""
        for block in rewrite.blocks:
            partner, c = rewrite.statistics[self._partner_name(block)], rewrite.of(block.c)
            scales = balance(partner.maximum, c.maximum, 0.5)
            rewrite.scale_rows(block.c_rows, scales)
            rewrite.scale_rows(block.b_rows, 1 / scales)
            rewrite.update(block.c, c.scaled(scales))
            rewrite.statistics[self._partner_name(block)] = partner.scaled(1 / scales)
            self.note(rewrite, block.name, describe(scales))

    def _partner_name(self, block: Block) -> str:
        return states_name(block.scan) if self.partner is Partner.STATE else block.b.name
