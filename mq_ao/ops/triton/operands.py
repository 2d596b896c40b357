"""What the scans' kernels do with operands: reading and writing them on their grids, and step sizes.

A pointer's type tells whether its numbers lie on a grid. Zero points are passed as floats: Triton compiles a kernel
anew for whole numbers that are 1 or multiples of 16, and a model has all kinds of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mq_ao.ops.grids import Grid
from mq_ao.ops.triton.rounding import round_half_even


@triton.jit
def centred(at, mask, zero_point):
    """Numbers less their zero point as float32, 0 where masked: value over scale."""
    x = tl.load(at, mask=mask, other=0).to(tl.float32)
    if at.dtype.scalar.element_ty.is_int():
        x = tl.where(mask, x - zero_point, 0.0)
    return x


@triton.jit
def read(at, mask, scale, zero_point):
    """Values as float32, 0 where masked; scale and zero point are not looked at for floats."""
    x = centred(at, mask, zero_point)
    if at.dtype.scalar.element_ty.is_int():
        x = x * scale
    return x


@triton.jit
def parameter(pointer, at, mask):
    """A float32 parameter that may be missing, and then is 0."""
    value = 0.0
    if pointer is not None:
        value = tl.load(pointer + at, mask=mask, other=0.0)
    return value


@triton.jit
def read_state(at, scale_at, mask):
    """A carried state; int8 with a pointer to scales, and else float32."""
    h = tl.load(at, mask=mask, other=0).to(tl.float32)
    if scale_at is not None:
        h = h * tl.load(scale_at, mask=mask, other=0.0)
    return h


@triton.jit
def write_state(at, scale_at, h, mask):
    """Stores a carried state, rounded as by `quantize_state` if there is a pointer to scales."""
    if scale_at is not None:
        steps = tl.div_rn(h, tl.load(scale_at, mask=mask, other=1.0))
        steps = tl.clamp(tl.where((steps >= 0) | (steps < 0), steps, 0.0), -127.0, 127.0)
        parts = 64.0 * steps
        dither = parts - round_half_even(parts)
        tl.store(at, round_half_even(steps + dither).to(tl.int8), mask=mask)
    else:
        tl.store(at, h, mask=mask)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with small relative error for all x.

    The logarithm of 1 + z, z <= 1, is 2 artanh(s) with s = z / (2 + z) <= 1/3, and seven terms of its series leave
    1e-8: the chip's own logarithm is only absolutely precise next to 1.
    """
    z = tl.exp(-tl.abs(x))
    s = z / (2.0 + z)
    w = s * s
    series = 1.0 / 13
    for i in tl.static_range(6):
        series = series * w + 1.0 / (11 - 2 * i)
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def step_size_of(delta, bias, SOFTPLUS: tl.constexpr):
    """Step sizes before any limits, of values of delta."""
    dt = delta + bias
    if SOFTPLUS:
        dt = softplus(dt)
    return dt


@triton.jit
def step_size(at, mask, scale, zero_point, bias, SOFTPLUS: tl.constexpr):
    """Step sizes before any limits; the bias of masked ones counts."""
    return step_size_of(read(at, mask, scale, zero_point), bias, SOFTPLUS)


def on_grid(x: Tensor, grid: Grid) -> tuple[float, float]:
    """An operand's scale and zero point as kernels take them, which multiply by scales whatever the type."""
    if x.is_floating_point() or grid.scale is None:
        return 1.0, 0.0
    return float(grid.scale), float(grid.zero_point)


def rows(x: Tensor) -> Tensor:
    """x (batch, length, ...) as (batch * length, width) whose last axis is dense: a view where that can be."""
    flat = x.flatten(0, 1).flatten(1)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def destination(last_state: Tensor, into: Tensor | None, length: int) -> Tensor:
    """Where a scan or convolution writes its last state: over the initial one if it is asked to and can.

    The kernels of one step can: a state is read and written by one thread.
    """
    if into is None or length > 1 or not into.is_contiguous() or into.dtype != last_state.dtype:
        return last_state
    return into


def float32(x: Tensor | None) -> Tensor | None:
    """A parameter or state as a dense float32 tensor."""
    return None if x is None else x.to(torch.float32).contiguous()
