"""Rows that leave an operator in int8, on one given grid or each on its own: what `int8_linear` reads."""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.grids import check_grid, requantize
from mq_ao.ops.qlinear import quantize_per_token


def check_rows(name: str, out_scale: float | None, out_zero_point: int) -> None:
    """Raises MqAoError where operator `name` cannot round its rows to int8 as asked."""
    if out_scale is not None:
        check_grid(f"{name}: out", torch.int8, out_scale, out_zero_point)


def quantize_rows(x: Tensor, out_scale: float | None, out_zero_point: int) -> tuple[Tensor, Tensor]:
    """Rounds float32 rows to int8.

    Args:
        x: (..., n), float32.
        out_scale: of all rows, which are rounded as by `quantized_decomposed.quantize_per_tensor`; None: every row is
            rounded by itself, by `qlinear.quantize_per_token`.
        out_zero_point: within -128..127; not looked at without `out_scale`.

    Returns:
        q, int8 (..., n), and the scales of rows rounded by themselves, float32 (..., 1); else an empty tensor.
    """
    if out_scale is None:
        return quantize_per_token(x)
    return requantize(x, torch.int8, out_scale, out_zero_point), x.new_empty(0)


def empty_rows(like: Tensor, out_scale: float | None) -> tuple[Tensor, Tensor]:
    """What `quantize_rows` gives for rows of the shape of `like`, without values; contiguous."""
    scale = like.new_empty((*like.shape[:-1], 1) if out_scale is None else 0, dtype=torch.float32)
    return like.new_empty(like.shape, dtype=torch.int8), scale
