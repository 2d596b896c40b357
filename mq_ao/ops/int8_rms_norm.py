"""`mq_ao::int8_rms_norm`: the residual sum, RMSNorm and quantization to int8 in one pass, for GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.grids import Grid
from mq_ao.ops.int8_rows import check_rows, empty_rows, quantize_rows
from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, like, operator


def _results(a: Operands) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, weight, out = a.x, a.residual, a.weight, Grid.of(a, "out")
    require(
        x.dtype == torch.float32 and x.dim() >= 1,
        f"int8_rms_norm takes float32 (..., n), not {x.dtype} {tuple(x.shape)}.",
    )
    n = x.shape[-1]
    require(n > 0, "int8_rms_norm needs at least one value in a row, but the last axis is empty.")
    if residual is not None:
        message = (
            f"residual must be float32 of the shape of x, {tuple(x.shape)}, not {residual.dtype} "
            f"{tuple(residual.shape)}."
        )
        require(residual.dtype == torch.float32 and residual.dim() == x.dim(), message)
        for size, wanted in zip(residual.shape, x.shape, strict=True):
            require(size == wanted, message)
    if weight is not None:
        require(
            weight.dtype == torch.float32 and weight.dim() == 1 and weight.shape[0] == n,
            f"weight must be a float32 vector of {n} values, not {weight.dtype} {tuple(weight.shape)}.",
        )
    check_rows("int8_rms_norm", out)
    return *empty_rows(x, out), like(x, (0,) if residual is None else x.shape)


@operator(results=_results)
def int8_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds, normalises by `torch.nn.functional.rms_norm` and quantizes.

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
    total = x if residual is None else (x + residual).contiguous()
    normalised = torch.nn.functional.rms_norm(total, (x.shape[-1],), weight, eps)
    q, scale = quantize_rows(normalised, Grid(out_scale, out_zero_point))
    return q.contiguous(), scale, x.new_empty(0) if residual is None else total
