"""Takes the product h C out of the scan, so that it can be rotated and quantized (recipe `mambaquant-paper`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from mq_ao.graph import Direction, edit, walk
from mq_ao.graph.views import Scan
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.statistics.probe import states_arguments

aten = walk.aten


@dataclass(frozen=True)
class ExposeState(Pass):
    """y = (h C).sum(-1) + D u as nodes, over `mq_ao::scan_states`. For reference arithmetic: every h is in memory."""

    name = "expose_state"

    def apply(self, rewrite: Rewrite) -> None:
        """Exposes every scan's h C."""
        for direction in rewrite.directions:
            if direction.scan.target in walk.SSD:
                self.leave_out(rewrite, direction.name, "Mamba-2's scan has no operator that gives all states")
                continue
            _expose(rewrite, direction)
            self.note(rewrite, direction.name)


def _expose(rewrite: Rewrite, direction: Direction) -> None:
    module, scan, given = rewrite.module, direction.scan, Scan.of(direction.scan)

    def call(target: object, *args: object) -> Node:
        return edit.call(module, target, args, like=scan)

    with module.graph.inserting_before(scan):
        states = call(torch.ops.mq_ao.scan_states.default, *states_arguments(scan))
        h, last = call(walk.getitem, states, 0), call(walk.getitem, states, 1)
        product = call(aten.mul.Tensor, h, call(aten.unsqueeze.default, direction.c, 2))
        through = call(aten.mul.Tensor, given.u, given.skip) if given.skip is not None else 0.0
        y = call(aten.add.Tensor, call(aten.sum.dim_IntList, product, [-1]), through)
    for output in list(scan.users):
        output.replace_all_uses_with(last if walk.is_result(output, 1) else y)
        module.graph.erase_node(output)
    module.graph.erase_node(scan)
