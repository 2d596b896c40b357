"""Grids of 8-bit activations: the value of q is `(q - zero_point) * scale`, and the dtype of q says which q there are.

XNNPACK knows int8 alone and x86 kernels uint8 alone, so operators take both. int8 numbers and their zero points are
uint8 ones less 128, and give the same results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.library import require

BYTES = (torch.uint8, torch.int8)


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    """Smallest and largest integer of an 8-bit dtype."""
    return (0, 255) if dtype == torch.uint8 else (-128, 127)


def check_grid(label: str, dtype: torch.dtype, scale: float, zero_point: int) -> None:
    """Raises MqAoError unless `scale` and `zero_point` make a grid of 8-bit `dtype`; `label` names the operand."""
    low, high = _limits(dtype)
    require(scale > 0, f"{label}_scale must be positive, it is {scale}.")
    require(
        low <= zero_point <= high,
        f"{label}_zero_point must lie in {low}..{high} for {dtype}, it is {zero_point}.",
    )


def check_operand(label: str, q: Tensor, scale: float, zero_point: int) -> None:
    """Raises MqAoError on what `dequantize` does not take."""
    require(q.dtype in (*BYTES, torch.float32), f"{label} must be uint8, int8 or float32, it is {q.dtype}.")
    if q.dtype != torch.float32:
        check_grid(label, q.dtype, scale, zero_point)


def dequantize(label: str, q: Tensor, scale: float, zero_point: int) -> Tensor:
    """Values of an operand in float32.

    Args:
        label: names the operand in errors.
        q: uint8, int8 or float32, of any shape.
        scale: step of q, positive; not looked at for float32.
        zero_point: within q's dtype; not looked at for float32.

    Raises:
        MqAoError: dtype or grid is not as above.
    """
    check_operand(label, q, scale, zero_point)
    if q.dtype == torch.float32:
        return q
    return (q.to(torch.float32) - zero_point) * scale


def output_dtype(like: Tensor, out_scale: float | None) -> torch.dtype:
    """Dtype of an output: float32 without `out_scale`; with it int8 if operand `like` is int8, else uint8."""
    if out_scale is None:
        return torch.float32
    return torch.int8 if like.dtype == torch.int8 else torch.uint8


def check_output(name: str, like: Tensor, out_scale: float | None, out_zero_point: int) -> None:
    """Raises MqAoError where operator `name` cannot round its output, of `output_dtype`, as asked."""
    if out_scale is not None:
        check_grid(f"{name}: out", output_dtype(like, out_scale), out_scale, out_zero_point)


def requantize(y: Tensor, dtype: torch.dtype, out_scale: float | None, out_zero_point: int) -> Tensor:
    """Rounds as `quantized_decomposed.quantize_per_tensor`, NaN to the smallest integer; `y` itself without a scale."""
    if out_scale is None:
        return y
    low, high = _limits(dtype)
    # Times the reciprocal, which is rounded to float32.
    q = torch.round(y * (1.0 / out_scale)) + out_zero_point
    return q.clamp(low, high).nan_to_num(float(low)).to(dtype)
