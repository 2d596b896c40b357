"""Rows that leave an operator in 8 bits, on one given grid or each on its own: what linears read."""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.grids import Grid, check_grid, requantize
from mq_ao.ops.linear_packed import int8_per_token, token_scales, uint8_per_token
from mq_ao.ops.operator import like


def check_rows(operator: str, dtype: torch.dtype, out: Grid) -> None:
    """Raises MqAoError where an operator cannot round its rows to `dtype`, int8 or uint8, as asked."""
    if out.scale is not None:
        check_grid(f"{operator}: out", dtype, out)


def quantize_rows(
    x: Tensor, dtype: torch.dtype, out: Grid, bits: int = 8, group_size: int = 0
) -> tuple[Tensor, Tensor]:
    """Rounds float32 rows to 8 bits.

    Args:
        x: (..., n), float32.
        dtype: int8 or uint8.
        out: of all rows, which are rounded as by `quantized_decomposed.quantize_per_tensor`, its zero point one of
            `dtype`; without a scale every row is rounded by itself, by `linear_packed.int8_per_token`, as uint8 with
            zero point 128.
        bits: of rows rounded by themselves, 8 or 4.
        group_size: of rows rounded by themselves, see `linear_packed.int8_per_token`.

    Returns:
        q, (..., n), and the scales of rows rounded by themselves, float32 (..., 1) or (..., n / group_size); else an
        empty tensor.
    """
    if out.scale is not None:
        return requantize(x, dtype, out), x.new_empty(0)
    return (int8_per_token if dtype == torch.int8 else uint8_per_token)(x, bits, group_size)


def empty_rows(x: Tensor, dtype: torch.dtype, out: Grid, bits: int = 8, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """What `quantize_rows` gives for x, without values; contiguous.

    Raises:
        MqAoError: rows cannot be rounded by themselves so.
    """
    scales = token_scales(x, bits, group_size)
    return like(x, dtype=dtype), scales if out.scale is None else like(x, (0,), torch.float32)
