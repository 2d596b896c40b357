"""An outlier stress: rewrites that leave the function as it is and make plain quantization fail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mq_ao.graph import edit
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.smooth_gate import scale_gate


@dataclass(frozen=True)
class PlantOutliers(Pass):
    """Multiplies a few channels by `factor` and divides the weights that read them by it, as large checkpoints look.

    The channels are those of the gate and out_proj's input (through S-SiLU), of dt's low rank, of C against B, and of
    the convolution's input. For tests and ablations.

    Attributes:
        factor: how far the outliers stick out.
        share: share of the channels that become outliers, at least one.
        seed: of the choice of channels.
    """

    name = "plant_outliers"

    factor: float = 100.0
    share: float = 0.01
    seed: int = 0

    def apply(self, rewrite: Rewrite) -> None:
        """Plants outliers in every block."""
        generator = torch.Generator().manual_seed(self.seed)

        def factors(count: int) -> Tensor:
            result = torch.ones(count, dtype=torch.float64)
            chosen = torch.randperm(count, generator=generator)[: max(1, round(self.share * count))]
            result[chosen] = self.factor
            return result

        for block in rewrite.blocks:
            if block.gate is not None:
                gate = factors(edit.channels(block.out_input))
                scale_gate(rewrite, block, block.gate, gate)
                rewrite.scale_columns(block.out_proj, 1 / gate)
            dt = factors(edit.channels(block.dt))
            rewrite.scale_rows(block.dt_rows, dt)
            rewrite.scale_columns(block.dt_proj, 1 / dt)
            state = factors(edit.channels(block.c))
            rewrite.scale_rows(block.c_rows, state)
            rewrite.scale_rows(block.b_rows, 1 / state)
            conv = factors(edit.channels(block.conv_input))
            rewrite.scale_rows(block.u_rows, conv)
            rewrite.scale_taps(block.conv1d, 1 / conv)
            self.note(rewrite, block.name, f"x{self.factor:g}")
