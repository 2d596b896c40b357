"""Rounding in Triton kernels, as PyTorch and the q/dq operators do it."""

from __future__ import annotations

import triton
import triton.language as tl

from mq_ao.ops.grids import Grid

# Between 2^23 and 2^24 float32 holds whole numbers alone: adding this rounds half to even, as the addition does.
_WHOLE: tl.constexpr = tl.constexpr(12582912.0)
_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
_TINIEST: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def round_half_even(x):
    """The whole numbers next to x, whose magnitude is at most 2^22."""
    return (x + _WHOLE) - _WHOLE


@triton.jit
def to_bytes(steps, zero_point, low, high):
    """Whole numbers within low..high, 8 bits, for values in steps of their grid; NaN becomes low."""
    steps = tl.where((steps >= 0) | (steps < 0), steps, -1e6)
    # Clamped first: what comes after is exact.
    steps = tl.clamp(steps, -1000.0, 1000.0)
    return tl.clamp(round_half_even(steps) + zero_point, low, high)


@triton.jit
def write(at, x, mask, inverse, zero_point):
    """Stores float32 x, rounded as the operators do if the pointer is of 8 bits."""
    if at.dtype.scalar.element_ty == tl.int8:
        tl.store(at, to_bytes(x * inverse, zero_point, -128.0, 127.0).to(tl.int8), mask=mask)
    elif at.dtype.scalar.element_ty == tl.uint8:
        tl.store(at, to_bytes(x * inverse, zero_point, 0.0, 255.0).to(tl.uint8), mask=mask)
    else:
        tl.store(at, x.to(at.dtype.scalar.element_ty), mask=mask)


def rounded(out: Grid) -> tuple[float, float]:
    """inverse and zero_point of `write` for an output on this grid; of no scale, or 0, for one that stays in float."""
    return 1.0 / (out.scale or 1.0), float(out.zero_point)


@triton.jit
def rows_to_int8(x):
    """Rows of x (rows, n) each on a grid of its own, as by `mq_ao.ops.linear_packed.int8_per_token`: (q, scale)."""
    size = tl.abs(x)
    # A NaN counts as an infinity: the maximum would pass over it.
    largest = tl.max(tl.where(size <= _LARGEST, size, float("inf")), axis=1)
    finite = largest <= _LARGEST
    scale = tl.maximum(tl.div_rn(tl.where(finite, largest, 0.0), 127.0), _TINIEST)
    steps = tl.where(finite, tl.div_rn(1.0, scale), 0.0)[:, None] * tl.where(finite[:, None], x, 0.0)
    q = tl.clamp(round_half_even(steps), -127.0, 127.0).to(tl.int8)
    return q, tl.where(finite, scale, float("nan"))
