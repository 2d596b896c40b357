"""`mq_ao::qrms_norm`: the residual sum, RMSNorm and quantization to uint8 in one pass.

GPUs have `int8_rms_norm`, on signed activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.grids import Grid
from mq_ao.ops.norm_rows import normalize, results
from mq_ao.ops.operator import Operands, operator


def _results(a: Operands) -> tuple[Tensor, Tensor, Tensor]:
    return results("qrms_norm", torch.uint8, a, a.bits, a.group_size)


@operator(results=_results)
def qrms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    bits: int = 8,
    group_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds, normalizes by `torch.nn.functional.rms_norm` and quantizes.

    The native kernel sums squares in another order, so that values next to a rounding boundary may come out one step
    apart.

    Args:
        x: (..., n), float32; rows may be strided.
        residual: as `x`, of the same shape, added to it first; or None.
        weight: float32 (n,), or None for ones.
        eps: added to the mean of squares.
        out_scale: positive: all is rounded as by `quantized_decomposed.quantize_per_tensor`; None: every row is
            rounded by itself, as by `quantize_per_token`.
        out_zero_point: within 0..255; not looked at without `out_scale`.
        bits: of rows rounded by themselves, 8 or 4.
        group_size: of rows rounded by themselves, see `quantize_per_token`.

    Returns:
        q, uint8 (..., n), contiguous; without `out_scale` the scales of the rows, float32 (..., 1) or
        (..., n / group_size), else an empty
        tensor (0,); and with `residual` the sum, float32 (..., n), contiguous, else an empty tensor (0,).

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above.
    """
    return normalize(x, residual, weight, eps, torch.uint8, Grid(out_scale, out_zero_point), bits, group_size)
