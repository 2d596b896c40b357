"""S7: smooths the convolution's input through in_proj and the taps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mq_ao.passes.balance import balance, describe
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.statistics import Request


@dataclass(frozen=True)
class SmoothConv(Pass):
    """W_s <- diag(1/s) W_s, taps <- taps * s (METHOD.md section 2, S7).

    A carried convolution state is kept in scaled form.

    Attributes:
        alpha: share of the activation in the balance. in_proj's rows and the taps have a scale a channel, so 1, which
            makes the activation flat, costs them nothing.
    """

    name = "smooth_conv"
    step = "S7"

    alpha: float = 1.0

    def requests(self, rewrite: Rewrite) -> Iterable[Request]:
        """Magnitudes of the convolutions' inputs."""
        return [Request(block.conv_input.name) for block in rewrite.blocks]

    def apply(self, rewrite: Rewrite) -> None:
        """Balances every block's convolution input against the taps."""
        for block in rewrite.blocks:
            u = block.conv_input
            largest = rewrite.weight(block.conv1d).flatten(1).abs().amax(1)
            scales = balance(rewrite.of(u).maximum, largest, self.alpha)
            rewrite.scale_rows(block.u_rows, 1 / scales)
            rewrite.scale_taps(block.conv1d, scales)
            rewrite.update(u, rewrite.of(u).scaled(1 / scales))
            self.note(rewrite, block.name, describe(scales))
