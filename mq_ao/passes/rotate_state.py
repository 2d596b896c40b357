"""R4: rotates the states of h C, h at run time and C offline."""

from __future__ import annotations

from dataclasses import dataclass

from mq_ao.errors import MqAoError
from mq_ao.graph import walk
from mq_ao.passes.base import Pass, Rewrite


@dataclass(frozen=True)
class RotateState(Pass):
    """h <- h H after the recurrence, W_C <- H^T W_C (docs/method.md, R4). Needs `expose_state` before it."""

    name = "rotate_state"
    step = "R4"

    def apply(self, rewrite: Rewrite) -> None:
        """Rotates every exposed product h C."""
        for direction in rewrite.directions:
            scan, product = direction.scan, direction.product
            if scan.target in walk.SSD:
                self.leave_out(rewrite, direction.name, "h C is inside the scan of Mamba-2")
                continue
            if product is None:
                raise MqAoError("rotate_state needs the product h C as a node: put expose_state before it.")
            h = next(item for item in walk.inputs(product) if walk.upstream(item) is scan)
            with self.where_suitable(rewrite, direction.name):
                rows = direction.c_rows
                matrix = rewrite.rotate_input(product, h)
                rewrite.rotate_rows(rows, matrix)
                self.note(rewrite, direction.name, f"{len(matrix)} states")
