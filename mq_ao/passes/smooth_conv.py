"""S7: smooths the convolution's input through in_proj and the taps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor
from torch.fx import Node

from mq_ao.errors import Unsuitable
from mq_ao.graph import Block
from mq_ao.graph.rows import Rows, rows_of
from mq_ao.graph.views import Conv
from mq_ao.passes.balance import balance, describe
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.options import Share
from mq_ao.statistics import Request

_CHANNEL_LAST = frozenset({torch.ops.mq_ao.causal_conv1d.default})


@dataclass(frozen=True)
class SmoothConv(Pass):
    """W_s <- diag(1/s) W_s, taps <- taps * s (docs/method.md, S7).

    A carried convolution state is kept in scaled form.

    Attributes:
        alpha: share of the activation in the balance. in_proj's rows and the taps have a scale a channel, so 1, which
            makes the activation flat, costs them nothing.
    """

    name = "smooth_conv"
    step = "S7"

    alpha: Share = 1.0

    def requests(self, rewrite: Rewrite) -> Iterable[Request]:
        """Magnitudes of the convolutions' inputs."""
        directions = (item for item in rewrite.directions if item.conv1d.target in _CHANNEL_LAST)
        return [Request(direction.conv_input.name) for direction in directions]

    def apply(self, rewrite: Rewrite) -> None:
        """Balances every block's convolution input against the taps, of all directions that read it."""
        for block in rewrite.blocks:
            with self.where_suitable(rewrite, block.name):
                for rows, convs in shared_inputs(block).items():
                    scales = self._balance(rewrite, convs)
                    rewrite.scale_rows(rows, 1 / scales)
                    for conv in convs:
                        rewrite.scale_taps(conv, scales)
                    for u in dict.fromkeys(Conv.of(conv).x for conv in convs):
                        rewrite.update(u, rewrite.of(u).scaled(1 / scales))
                    self.note(rewrite, block.name, describe(scales))

    def _balance(self, rewrite: Rewrite, convs: list[Node]) -> Tensor:
        inputs = [rewrite.of(Conv.of(conv).x).maximum for conv in convs]
        taps = [rewrite.weight(conv).flatten(1).abs().amax(1) for conv in convs]
        return balance(reduce(torch.maximum, inputs), reduce(torch.maximum, taps), self.alpha)


def shared_inputs(block: Block) -> dict[Rows, list[Node]]:
    """The convolutions of a block, by the channels of in_proj that they read.

    Raises:
        Unsuitable: something else reads such channels too, or a convolution is not ours.
    """
    convs = list(dict.fromkeys(direction.conv1d for direction in block.directions))
    result: dict[Rows, list[Node]] = {}
    for conv in convs:
        if conv.target not in _CHANNEL_LAST:
            raise Unsuitable(f"{conv.name} reads channels before positions, as no integer kernel does.")
        result.setdefault(rows_of(Conv.of(conv).x, convs), []).append(conv)
    if any(one.overlaps(other) for one, other in combinations(result, 2)):
        raise Unsuitable("its convolutions read some channels in common, and others not.")
    return result
