"""Triton kernels of the selective scan: many steps, and one.

Of many steps, a warp takes some channels and walks over time with their states in registers, so that nothing but
operands and outputs moves: 32 channels, one for each lane, or 8, each with its states spread over four lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mq_ao.ops.gpu_tuning import LANES
from mq_ao.ops.triton.launch import Config, Kernel
from mq_ao.ops.triton.operands import centred, parameter, read, read_state, step_size, step_size_of, write_state
from mq_ao.ops.triton.rounding import write

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
AHEAD: tl.constexpr = tl.constexpr(LANES)


@triton.constexpr_function
def channels_of(elements: int, n: int) -> int:
    """Channels of a program that has about so many states."""
    return max(elements // n, 1)


@triton.jit(do_not_specialize=["length", "chunk"])
def _scan(
    u,
    delta,
    B,
    C,
    A,
    D,
    delta_bias,
    start,
    end,
    state_scale,
    y,
    total,
    channels,
    length,
    chunk,
    group_channels,
    u_row,
    delta_row,
    B_row,
    C_row,
    u_scale,
    u_zero_point,
    delta_scale,
    delta_zero_point,
    B_scale,
    B_zero_point,
    C_scale,
    C_zero_point,
    out_inverse,
    out_zero_point,
    D_STATE: tl.constexpr,
    N: tl.constexpr,
    GROUPED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Some channels over one chunk of one sequence, from `start` or zero; writes those of y, end and total given."""
    BLOCK: tl.constexpr = channels_of(ELEMENTS, N)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N)
    inside = c < channels
    # Channels lie along the last axis, over which Triton spreads lanes first: sums over n stay within a lane or a warp.
    mask = (n < D_STATE)[:, None] & inside[None, :]
    states = c[None, :] * D_STATE + n[:, None]
    # exp(step A) = 2^(step A log2(e)), and powers of two are what the chip has.
    decay = tl.load(A + states, mask=mask, other=0.0) * LOG2_E
    of_chunk = (batch * tl.num_programs(1) + tl.program_id(1)) * channels
    scale_at = None if state_scale is None else state_scale + states
    h = tl.zeros((N, BLOCK), dtype=tl.float32)
    if start is not None:
        h = read_state(start + of_chunk * D_STATE + states, scale_at, mask)
    bias, skip = parameter(delta_bias, c, inside), parameter(D, c, inside)
    if GROUPED:
        matrix, matrix_mask = (c // group_channels)[None, :] * D_STATE + n[:, None], mask
    else:
        matrix, matrix_mask = n[:, None], (n < D_STATE)[:, None]
    start_of_sequence = batch * length
    # Offsets of 64 bits that are kept over the loop are registers that a float32 scan has not got.
    u, delta = u + start_of_sequence * u_row, delta + start_of_sequence * delta_row
    if y is not None:
        y += start_of_sequence * channels
    first = tl.program_id(1) * chunk
    stop = tl.minimum(first + chunk, length)
    ahead = tl.arange(0, AHEAD)[:, None]
    steps = tl.zeros((BLOCK,), dtype=tl.float32)
    # Some steps at a time, so that lanes that share a channel do not all compute the same softplus.
    for t in range(first, stop, AHEAD):
        some = (t + ahead < stop) & inside[None, :]
        at = (t + ahead).to(tl.int64)
        sizes = step_size(delta + at * delta_row + c[None, :], some, delta_scale, delta_zero_point, bias, SOFTPLUS)
        inputs = read(u + at * u_row + c[None, :], some, u_scale, u_zero_point)
        outs: tl.tuple = ()
        for i in tl.static_range(AHEAD):
            row = start_of_sequence + t + i
            # A vector, since the interpreter takes no mask that a single truth was spread for.
            matrix_there = matrix_mask & (t + i + tl.zeros_like(matrix) < stop)
            # A step of 0 after the last one leaves the state as it is.
            dt = tl.sum(tl.where((ahead == i) & some, sizes, 0.0), axis=0)
            x = tl.sum(tl.where(ahead == i, inputs, 0.0), axis=0)
            # B and C less their zero points; their scales are those of whole channels.
            b = centred(B + row * B_row + matrix, matrix_there, B_zero_point)
            h = tl.exp2(dt[None, :] * decay) * h + (dt * x * B_scale)[None, :] * b
            if y is not None:
                out = tl.sum(h * centred(C + row * C_row + matrix, matrix_there, C_zero_point), axis=0)
                outs += (out * C_scale + skip * x,)
            steps += dt
        # Together, since no load is moved before a store, and each step would wait for its own B and C.
        if y is not None:
            for i in tl.static_range(AHEAD):
                # A vector, as above.
                there = inside & (t + i + tl.zeros_like(c) < stop)
                to = y + tl.cast(t + i, tl.int64) * channels + c
                write(to, outs[i], there, out_inverse, out_zero_point)
    if end is not None:
        write_state(end + of_chunk * D_STATE + states, scale_at, h, mask)
    if total is not None:
        tl.store(total + of_chunk + c, steps, mask=inside)


@triton.jit
def step_operands(
    u,
    B,
    C,
    A,
    D,
    delta_bias,
    start,
    state_scale,
    batch,
    c,
    channels,
    group_channels,
    u_row,
    B_row,
    C_row,
    u_scale,
    u_zero_point,
    B_scale,
    B_zero_point,
    C_scale,
    C_zero_point,
    D_STATE: tl.constexpr,
    N: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """What a step of channels c of a sequence reads but for delta; states lie along the last axis, as in memory."""
    n = tl.arange(0, N)
    inside = c < channels
    mask = inside[:, None] & (n < D_STATE)[None, :]
    states = c[:, None] * D_STATE + n[None, :]
    if GROUPED:
        matrix = (c // group_channels)[:, None] * D_STATE + n[None, :]
        matrix_mask = mask
    else:
        matrix = n[None, :]
        matrix_mask = (n < D_STATE)[None, :]
    x = read(u + batch * u_row + c, inside, u_scale, u_zero_point)
    b = read(B + batch * B_row + matrix, matrix_mask, B_scale, B_zero_point)
    matrix_c = read(C + batch * C_row + matrix, matrix_mask, C_scale, C_zero_point)
    decay, h = tl.zeros(mask.shape, dtype=tl.float32), tl.zeros(mask.shape, dtype=tl.float32)
    if start is not None:
        decay = tl.load(A + states, mask=mask, other=0.0)
        scale_at = None if state_scale is None else state_scale + states
        h = read_state(start + batch * channels * D_STATE + states, scale_at, mask)
    return x, b, matrix_c, decay, h, parameter(delta_bias, c, inside), parameter(D, c, inside)


@triton.jit
def finish_step(
    delta,
    operands,
    y,
    end,
    state_scale,
    batch,
    c,
    channels,
    out_inverse,
    out_zero_point,
    D_STATE: tl.constexpr,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Writes y and the last state, of values of delta and what `step_operands` gave."""
    x, b, matrix_c, decay, h, bias, skip = operands
    n = tl.arange(0, N)
    inside = c < channels
    mask = inside[:, None] & (n < D_STATE)[None, :]
    states = c[:, None] * D_STATE + n[None, :]
    dt = step_size_of(delta, bias, SOFTPLUS)
    after = (dt * x)[:, None] * b + tl.exp(dt[:, None] * decay) * h
    out = tl.sum(after * matrix_c, axis=1) + skip * x
    write(y + batch * channels + c, out, inside, out_inverse, out_zero_point)
    tl.debug_barrier()  # the end may lie over the start
    scale_at = None if state_scale is None else state_scale + states
    write_state(end + batch * channels * D_STATE + states, scale_at, after, mask)


@triton.jit
def _step(
    u,
    delta,
    B,
    C,
    A,
    D,
    delta_bias,
    start,
    end,
    state_scale,
    y,
    channels,
    group_channels,
    u_row,
    delta_row,
    B_row,
    C_row,
    u_scale,
    u_zero_point,
    delta_scale,
    delta_zero_point,
    B_scale,
    B_zero_point,
    C_scale,
    C_zero_point,
    out_inverse,
    out_zero_point,
    D_STATE: tl.constexpr,
    N: tl.constexpr,
    GROUPED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Some channels of one sequence, one step."""
    BLOCK: tl.constexpr = channels_of(ELEMENTS, N)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    operands = step_operands(
        u,
        B,
        C,
        A,
        D,
        delta_bias,
        start,
        state_scale,
        batch,
        c,
        channels,
        group_channels,
        u_row,
        B_row,
        C_row,
        u_scale,
        u_zero_point,
        B_scale,
        B_zero_point,
        C_scale,
        C_zero_point,
        D_STATE,
        N,
        GROUPED,
    )
    value = read(delta + batch * delta_row + c, c < channels, delta_scale, delta_zero_point)
    finish_step(
        value,
        operands,
        y,
        end,
        state_scale,
        batch,
        c,
        channels,
        out_inverse,
        out_zero_point,
        D_STATE,
        N,
        SOFTPLUS,
    )


# With 16 states, four lanes a channel, and one.
_SCANS = (Config(1, 2, ELEMENTS=128), Config(1, 2, ELEMENTS=512))
_STEPS = (Config(2, 2, ELEMENTS=256), Config(4, 2, ELEMENTS=1024))
scan = Kernel(_scan, _SCANS, key=("channels", "D_STATE"))
step = Kernel(_step, _STEPS, key=("channels", "D_STATE"), changes=("end",))
