"""Rounding in Triton kernels, as PyTorch and the q/dq operators do it."""

from __future__ import annotations

import triton
import triton.language as tl

# Between 2^23 and 2^24 float32 holds whole numbers alone: adding this rounds half to even, as the addition does.
_WHOLE: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def round_half_even(x):
    """The whole numbers next to x, whose magnitude is at most 2^22."""
    return (x + _WHOLE) - _WHOLE


@triton.jit
def to_int8(x, scale, zero_point):
    """x on an int8 grid as by `quantized_decomposed.quantize_per_tensor`; NaN becomes -128."""
    # Times the reciprocal, which is rounded to float32. Clamped first: what comes after is exact.
    steps = x * (1.0 / scale)
    steps = tl.where((steps >= 0) | (steps < 0), steps, -1e6)
    steps = tl.clamp(steps, -1000.0, 1000.0)
    return tl.clamp(round_half_even(steps) + zero_point, -128.0, 127.0).to(tl.int8)
