"""Rows that leave an operator in int8, on one given grid or each on its own: what `linear_rows` reads."""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.grids import Grid, check_grid, requantize
from mq_ao.ops.linear_packed import int8_per_token
from mq_ao.ops.operator import like


def check_rows(operator: str, out: Grid) -> None:
    """Raises MqAoError where an operator cannot round its rows to int8 as asked."""
    if out.scale is not None:
        check_grid(f"{operator}: out", torch.int8, out)


def quantize_rows(x: Tensor, out: Grid) -> tuple[Tensor, Tensor]:
    """Rounds float32 rows to int8.

    Args:
        x: (..., n), float32.
        out: of all rows, which are rounded as by `quantized_decomposed.quantize_per_tensor`, its zero point within
            -128..127; without a scale every row is rounded by itself, by `linear_packed.int8_per_token`.

    Returns:
        q, int8 (..., n), and the scales of rows rounded by themselves, float32 (..., 1); else an empty tensor.
    """
    if out.scale is None:
        return int8_per_token(x)
    return requantize(x, torch.int8, out), x.new_empty(0)


def empty_rows(x: Tensor, out: Grid) -> tuple[Tensor, Tensor]:
    """What `quantize_rows` gives for x, without values; contiguous."""
    shape = (*x.shape[:-1], 1) if out.scale is None else (0,)
    return like(x, dtype=torch.int8), like(x, shape, torch.float32)
