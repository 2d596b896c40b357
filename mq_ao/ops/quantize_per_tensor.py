"""`mq_ao::quantize_per_tensor`: floats to uint8 on one given grid, with a kernel that needs no compiler of graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.grids import Grid, check_grid, requantize
from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, like, operator


def _results(a: Operands) -> Tensor:
    require(a.x.dtype == torch.float32, f"quantize_per_tensor takes float32, not {a.x.dtype}.")
    check_grid("quantize_per_tensor: out", torch.uint8, Grid.of(a, "out"))
    return like(a.x, dtype=torch.uint8)


@operator(results=_results)
def quantize_per_tensor(x: Tensor, out_scale: float, out_zero_point: int) -> Tensor:
    """Rounds as `quantized_decomposed.quantize_per_tensor` to 0..255; NaN becomes 0.

    Args:
        x: (...), float32; rows may be strided.
        out_scale: positive.
        out_zero_point: within 0..255.

    Returns:
        uint8 of the shape of `x`, contiguous.

    Raises:
        MqAoError: a dtype or a parameter is not as above.
    """
    return requantize(x, torch.uint8, Grid(out_scale, out_zero_point)).contiguous()
