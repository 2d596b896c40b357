"""`mq_ao::int8_rms_norm`: the residual sum, RMSNorm and quantization to int8 in one pass, for GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.grids import Grid
from mq_ao.ops.norm_rows import normalize, results
from mq_ao.ops.operator import Operands, operator


def _results(a: Operands) -> tuple[Tensor, Tensor, Tensor]:
    return results("int8_rms_norm", torch.int8, a)


@operator(results=_results)
def int8_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds, normalizes by `torch.nn.functional.rms_norm` and quantizes.

    The Triton kernel sums squares in another order, so that values next to a rounding boundary may come out one step
    apart.

    Args:
        x: (..., n), float32; rows may be strided.
        residual: as `x`, of the same shape, added to it first; or None.
        weight: float32 (n,), or None for ones.
        eps: added to the mean of squares.
        out_scale: positive: all is rounded as by `quantized_decomposed.quantize_per_tensor`; None: every row is
            rounded by itself, by `linear_packed.int8_per_token`.
        out_zero_point: within -128..127; not looked at without `out_scale`.

    Returns:
        q, int8 (..., n), contiguous; without `out_scale` the scales of the rows, float32 (..., 1), else an empty
        tensor (0,); and with `residual` the sum, float32 (..., n), contiguous, else an empty tensor (0,).

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above.
    """
    return normalize(x, residual, weight, eps, torch.int8, Grid(out_scale, out_zero_point))
