"""An outlier stress: rewrites that leave the function as it is and make plain quantization fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mq_ao.graph import edit
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.low_rank import low_rank
from mq_ao.passes.options import Share, Within
from mq_ao.passes.smooth_conv import shared_inputs
from mq_ao.passes.smooth_gate import scale_out_input


@dataclass(frozen=True)
class PlantOutliers(Pass):
    """Multiplies a few channels by `factor` and divides the weights that read them by it, as large checkpoints look.

    The channels are those of the gate and out_proj's input (through S-SiLU), of dt's low rank, of C against B, and of
    the convolution's input. For tests and ablations.

    Attributes:
        factor: how far the outliers stick out, 1 to 1e6.
        share: share of the channels that become outliers, at least one.
        seed: of the choice of channels.
    """

    name = "plant_outliers"

    factor: Annotated[float, Within(1, 1e6)] = 100.0
    share: Share = 0.01
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0

    def apply(self, rewrite: Rewrite) -> None:
        """Plants outliers in every block."""
        generator = torch.Generator().manual_seed(self.seed)

        def factors(count: int) -> Tensor:
            result = torch.ones(count, dtype=torch.float64)
            chosen = torch.randperm(count, generator=generator)[: max(1, round(self.share * count))]
            result[chosen] = self.factor
            return result

        for block in rewrite.blocks:
            with self.where_suitable(rewrite, block.name):
                gate = factors(edit.channels(block.out_input))
                scale_out_input(rewrite, block, gate)
                rewrite.scale_columns(block.out_proj, 1 / gate)
                self.note(rewrite, block.name, f"out_proj's input, x{self.factor:g}")
            for direction in block.directions:
                with self.where_suitable(rewrite, direction.name):
                    pair = low_rank(direction)
                    dt = factors(edit.channels(pair.dt))
                    rewrite.scale_rows(pair.rows, dt)
                    rewrite.scale_columns(pair.dt_proj, 1 / dt)
                    self.note(rewrite, direction.name, f"dt_proj's input, x{self.factor:g}")
                with self.where_suitable(rewrite, direction.name):
                    b_rows, c_rows = direction.b_rows, direction.c_rows
                    state = factors(edit.channels(direction.c))
                    rewrite.scale_rows(b_rows, 1 / state)
                    rewrite.scale_rows(c_rows, state)
                    self.note(rewrite, direction.name, f"C, x{self.factor:g}")
            with self.where_suitable(rewrite, block.name):
                for rows, convs in shared_inputs(block).items():
                    conv = factors(rows.stop - rows.start)
                    rewrite.scale_rows(rows, conv)
                    for node in convs:
                        rewrite.scale_taps(node, 1 / conv)
                    self.note(rewrite, block.name, f"conv1d's input, x{self.factor:g}")
