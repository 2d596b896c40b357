"""The residual sum, RMSNorm and quantization of rows: what `int8_rms_norm` and `qrms_norm` have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.grids import Grid
from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, like
from mq_ao.ops.quantized_rows import check_rows, empty_rows, quantize_rows

Rows = tuple[Tensor, Tensor, Tensor]
"""Integers, scales, and the sum."""


def results(name: str, dtype: torch.dtype, a: Operands, bits: int = 8, group_size: int = 0) -> Rows:
    """What operator `name` gives, without values.

    Raises:
        MqAoError: its operands are not what it takes.
    """
    x, residual, weight, out = a.x, a.residual, a.weight, Grid.of(a, "out")
    require(
        x.dtype == torch.float32 and x.dim() >= 1, f"{name} takes float32 (..., n), not {x.dtype} {tuple(x.shape)}."
    )
    n = x.shape[-1]
    require(n > 0, f"{name} needs at least one value in a row, but the last axis is empty.")
    if residual is not None:
        message = (
            f"residual must be float32 of the shape of x, {tuple(x.shape)}, not {residual.dtype} "
            f"{tuple(residual.shape)}."
        )
        require(residual.dtype == torch.float32 and residual.dim() == x.dim(), message)
        for size, wanted in zip(residual.shape, x.shape, strict=True):
            require(size == wanted, message)
    check_weight(weight, n)
    check_rows(name, dtype, out)
    return *empty_rows(x, dtype, out, bits, group_size), like(x, (0,) if residual is None else x.shape)


def check_weight(weight: Tensor | None, n: int) -> None:
    """Raises MqAoError unless a norm of n values can have this weight."""
    if weight is not None:
        require(
            weight.dtype == torch.float32 and weight.dim() == 1 and weight.shape[0] == n,
            f"weight must be a float32 vector of {n} values, not {weight.dtype} {tuple(weight.shape)}.",
        )


def normalize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    out: Grid,
    bits: int = 8,
    group_size: int = 0,
) -> Rows:
    """Adds, normalizes by `torch.nn.functional.rms_norm` and quantizes to `dtype` (see `quantize_rows`)."""
    total = x if residual is None else (x + residual).contiguous()
    normalized = torch.nn.functional.rms_norm(total, (x.shape[-1],), weight, eps)
    q, scale = quantize_rows(normalized, dtype, out, bits, group_size)
    return q.contiguous(), scale, x.new_empty(0) if residual is None else total
