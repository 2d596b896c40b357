"""R4: rotates the states of h C, h at run time and C offline."""

from __future__ import annotations

from dataclasses import dataclass

from mq_ao.errors import MqAoError
from mq_ao.graph import walk
from mq_ao.passes.base import Pass, Rewrite


@dataclass(frozen=True)
class RotateState(Pass):
    """h <- h H after the recurrence, W_C <- H^T W_C (METHOD.md section 4, R4). Needs `expose_state` before it."""

    name = "rotate_state"
    step = "R4"

    def apply(self, rewrite: Rewrite) -> None:
        """Rotates every exposed product h C."""
        for block in rewrite.blocks:
            if block.product is None:
                raise MqAoError("rotate_state needs the product h C as a node: put expose_state before it.")
            h = next(item for item in walk.inputs(block.product) if walk.upstream(item) is block.scan)
            try:
                matrix = rewrite.rotate_input(block.product, h)
            except MqAoError as error:
                self.leave_out(rewrite, block.name, str(error))
                continue
            rewrite.rotate_rows(block.c_rows, matrix)
            self.note(rewrite, block.name, f"{len(matrix)} states")
