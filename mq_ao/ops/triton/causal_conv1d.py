"""`mq_ao::causal_conv1d` and `mq_ao::qcausal_conv1d` on CUDA: tiles of time steps and channels.

Taps of a tile read the same inputs at shifted steps, which come from the first-level cache but for the first time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mq_ao.ops.causal_conv1d import causal_conv1d
from mq_ao.ops.grids import FLOATS, Grid
from mq_ao.ops.operator import Operands, by_reference, implements
from mq_ao.ops.qcausal_conv1d import qcausal_conv1d
from mq_ao.ops.triton.launch import Config, Kernel
from mq_ao.ops.triton.operands import destination
from mq_ao.ops.triton.rounding import round_half_even, rounded, write

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOST_TAPS = 8
_MOST_SEQUENCES = 65535


@triton.jit
def in_steps(values, inverse, low, high):
    """Values of a state in whole steps of x's grid, within its limits."""
    # The limits are whole numbers: clamping first gives the same, and what comes after is exact.
    return round_half_even(tl.clamp(values * inverse, low, high, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def epilogue(weight_scale, bias, x_scale, channel, there):
    """Factor and bias of channels, 1 and 0 where there is none: Triton 3.6 returns no None."""
    factor, shift = tl.where(there, 1.0, 1.0), tl.where(there, 0.0, 0.0)
    if weight_scale is not None:
        factor = tl.load(weight_scale + channel, mask=there, other=0.0) * x_scale
    if bias is not None:
        shift = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    return factor, shift


@triton.jit
def finished(total, factor, shift, SILU: tl.constexpr):
    """y of sums over taps, with what `epilogue` gave."""
    total = total * factor[None, :] + shift[None, :]
    if SILU:
        total = total * tl.sigmoid(total)
    return total


@triton.jit
def _inputs(
    x,
    state,
    step,
    channel,
    inside,
    x_stride,
    channels,
    zero_point,
    inverse,
    low,
    high,
    TAPS: tl.constexpr,
    STATE: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """Inputs (steps, channels) of one sequence, or with grids their steps; before the first one those of the state.

    `inside` holds for steps from -(TAPS - 1) on, within the sequence.
    """
    at = step[:, None] * x_stride + channel[None, :]
    values = tl.load(x + at, mask=inside & (step >= 0)[:, None], other=0).to(tl.float32)
    if QUANTIZED:
        values = tl.where((step >= 0)[:, None], values - zero_point, 0.0)
    if STATE:
        before = (step + (TAPS - 1))[:, None] * channels + channel[None, :]
        earlier = tl.load(state + before, mask=inside & (step < 0)[:, None], other=0.0).to(tl.float32)
        if QUANTIZED:
            earlier = in_steps(earlier, inverse, low, high)
        values += earlier
    return values


@triton.jit
def _causal_conv1d(
    x,
    weight,
    weight_scale,
    bias,
    state,
    y,
    last,
    length,
    channels,
    batch_stride,
    x_stride,
    x_scale,
    x_inverse,
    x_zero_point,
    low,
    high,
    out_inverse,
    out_zero_point,
    TAPS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    STATE: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of y; the last tile of a sequence writes the state as well.

    low and high are the limits of x's integers, less the zero point; y has the same dtype if it is rounded.
    """
    step = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = channel < channels
    sequence = tl.program_id(2).to(tl.int64)
    x += sequence * batch_stride
    y += sequence * length * channels
    last += sequence * (TAPS - 1) * channels
    if STATE:
        state += sequence * (TAPS - 1) * channels
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    inside = (step < length)[:, None] & there[None, :]
    for tap in tl.static_range(TAPS):
        of_tap = tl.load(weight + channel * TAPS + tap, mask=there, other=0).to(tl.float32)
        values = _inputs(
            x,
            state,
            step + (tap - (TAPS - 1)),
            channel,
            inside,
            x_stride,
            channels,
            x_zero_point,
            x_inverse,
            low,
            high,
            TAPS,
            STATE,
            QUANTIZED,
        )
        total += values * of_tap[None, :]
    factor, shift = epilogue(weight_scale, bias, x_scale, channel, there)
    total = finished(total, factor, shift, SILU)
    at = y + step[:, None] * channels + channel[None, :]
    write(at, total, inside, out_inverse, out_zero_point)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.debug_barrier()  # of one step, the last state may lie over the first
        for entry in tl.static_range(TAPS - 1):
            ending = tl.full((1,), entry - (TAPS - 1), tl.int64) + length
            kept = _inputs(
                x,
                state,
                ending,
                channel,
                there[None, :],
                x_stride,
                channels,
                x_zero_point,
                x_inverse,
                low,
                high,
                TAPS,
                STATE,
                QUANTIZED,
            )
            if QUANTIZED:
                kept = kept * x_scale
            tl.store(last + entry * channels + channel[None, :], kept, mask=there[None, :])


one_step = Kernel(
    _causal_conv1d,
    (Config(2, 1, BLOCK_T=1, BLOCK_C=256), Config(4, 1, BLOCK_T=1, BLOCK_C=128)),
    changes=("last",),
)
many_steps = Kernel(
    _causal_conv1d,
    (
        Config(4, 1, BLOCK_T=32, BLOCK_C=128),
        Config(4, 1, BLOCK_T=16, BLOCK_C=128),
        Config(4, 1, BLOCK_T=64, BLOCK_C=64),
    ),
    key=("channels",),
)


@implements(causal_conv1d, into=None)
def run(a: Operands) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.causal_conv1d.causal_conv1d`; the last state goes `into` a tensor if it is given and suits."""
    y, last = causal_conv1d.results(a)
    last = destination(last, a.into, a.x.shape[1])
    given = (a.x, a.weight, a.bias, a.initial_state)
    if any(value.dtype not in _FLOATS for value in given if value is not None) or not _fits(a):
        return by_reference(causal_conv1d, a)
    _launch(a, y, last, None, (1.0, 1.0, 0.0, 0.0, 0.0), FLOATS)
    return y, last


@implements(qcausal_conv1d, into=None)
def run_quantized(a: Operands) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.qcausal_conv1d.qcausal_conv1d`; the last state goes `into` a tensor if it is given and suits."""
    y, last = qcausal_conv1d.results(a)
    last = destination(last, a.into, a.x.shape[1])
    if any(value.dtype != torch.float32 for value in (a.bias, a.initial_state) if value is not None) or not _fits(a):
        return by_reference(qcausal_conv1d, a)
    limits = torch.iinfo(a.x.dtype)
    low, high = float(limits.min - a.x_zero_point), float(limits.max - a.x_zero_point)
    grid = (float(a.x_scale), 1 / a.x_scale, float(a.x_zero_point), low, high)
    _launch(a, y, last, a.weight_scale, grid, Grid.of(a, "out"))
    return y, last


def _fits(a: Operands) -> bool:
    return a.weight.shape[1] <= MOST_TAPS and a.x.shape[0] <= _MOST_SEQUENCES


def _launch(
    a: Operands,
    y: Tensor,
    last: Tensor,
    weight_scale: Tensor | None,
    grid: tuple[float, float, float, float, float],
    out: Grid,
) -> None:
    batch, length, channels = a.x.shape
    if y.numel() == 0:
        return
    rows = a.x if a.x.stride(2) == 1 else a.x.contiguous()
    taps = a.weight.shape[1]
    given = (weight_scale, a.bias, a.initial_state if taps > 1 else None)
    scale, shift, state = (None if value is None else value.contiguous() for value in given)
    (one_step if length == 1 else many_steps).launch(
        lambda meta: (triton.cdiv(length, meta["BLOCK_T"]), triton.cdiv(channels, meta["BLOCK_C"]), batch),
        *(rows, a.weight.contiguous(), scale, shift, state, y, last),
        *(length, channels, rows.stride(0), rows.stride(1)),
        *grid,
        *rounded(out),
        TAPS=taps,
        QUANTIZED=weight_scale is not None,
        STATE=state is not None,
        SILU=a.activation == "silu",
    )


def examples() -> Iterator[tuple[Any, ...]]:
    """Decode and prefill of a projection's left half, in float32 and bfloat16."""
    for length, dtype in ((1, torch.float32), (1024, torch.bfloat16)):
        x, weight, state = _example(length, dtype)
        yield x, weight.to(dtype), torch.empty(5120, dtype=dtype, device="meta"), state, "silu"
    yield _example(1024, torch.float32)[0], torch.empty(5120, 4, device="meta")


def quantized_examples() -> Iterator[tuple[Any, ...]]:
    """Decode and prefill, with the output in int8 and in float32."""
    for length in (1, 1024):
        x, weight, state = _example(length, torch.int8)
        scale = torch.empty(5120, device="meta")
        yield x, 0.1, 3, weight, scale, scale, state, "silu", 0.1, 3
    yield x, 0.1, 3, weight, scale, scale, None, "silu"


def _example(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.empty(2, length, 2 * 5120, dtype=dtype, device="meta")[..., :5120]
    return x, torch.empty(5120, 4, dtype=torch.int8, device="meta"), torch.empty(2, 3, 5120, device="meta")
