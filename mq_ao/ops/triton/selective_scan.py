"""`mq_ao::selective_scan` and `mq_ao::qselective_scan` on CUDA.

One step is one kernel (`_step`). For more, a warp takes some channels and walks over time with their states in
registers, so that nothing but operands and outputs moves: 32 channels, one for each lane, or 8, each with its states
spread over four lanes. Where that leaves most of a GPU idle, time is cut into chunks that are scanned side by side,
twice: the first time from zero and without outputs, to learn what each adds to the state (its decay is that of the sum
of its step sizes), and after `carry` from the states that they really start from. That costs twice the arithmetic and
reads u, delta and B twice, and needs no communication between programs; `tl.associative_scan` over time would hold
decays and inputs of all states and steps in registers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mq_ao.ops.qselective_scan import _fake as _qfake
from mq_ao.ops.selective_scan import _fake
from mq_ao.ops.triton.carry import carry
from mq_ao.ops.triton.launch import Config, Kernel, blank
from mq_ao.ops.triton.operands import (
    centred,
    destination,
    float32,
    parameter,
    read,
    read_state,
    rows,
    step_size,
    step_size_of,
    write_state,
)
from mq_ao.ops.triton.rounding import write

_Grid = tuple[Tensor, float, int]  # an operand with its scale and zero point
_SHORTEST = 32  # steps of a chunk
_THREADS = 2**17  # that keep a GPU busy: about a thousand for each of its multiprocessors
_LANES = 4  # over which the states of a channel can be spread
_ENOUGH = 256  # threads of a multiprocessor with which once over all of time is not slower than twice over chunks
_MULTIPROCESSORS = 64  # of the chip that is thought of where there is none


LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
AHEAD: tl.constexpr = tl.constexpr(_LANES)


@triton.constexpr_function
def _channels_of(elements: int, n: int) -> int:
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
    BLOCK: tl.constexpr = _channels_of(ELEMENTS, N)
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
    bias = parameter(delta_bias, c, inside)
    skip = parameter(D, c, inside)
    if GROUPED:
        matrix = (c // group_channels)[None, :] * D_STATE + n[:, None]
        matrix_mask = mask
    else:
        matrix = n[:, None]
        matrix_mask = (n < D_STATE)[:, None]
    start_of_sequence = batch * length
    first = tl.program_id(1) * chunk
    stop = tl.minimum(first + chunk, length)
    ahead = tl.arange(0, AHEAD)[:, None]
    steps = tl.zeros((BLOCK,), dtype=tl.float32)
    # Some steps at a time, so that lanes that share a channel do not all compute the same softplus.
    for t in range(first, stop, AHEAD):
        some = (t + ahead < stop) & inside[None, :]
        at = start_of_sequence + t + ahead
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
                outs = outs + (out * C_scale + skip * x,)  # noqa: RUF005
            steps += dt
        # Together, since no load is moved before a store, and each step would wait for its own B and C.
        if y is not None:
            for i in tl.static_range(AHEAD):
                # A vector, as above.
                there = inside & (t + i + tl.zeros_like(c) < stop)
                to = y + (start_of_sequence + t + i) * channels + c
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
    decay, h = None, None
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
    after = (dt * x)[:, None] * b
    if h is not None:
        after += tl.exp(dt[:, None] * decay) * h
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
    BLOCK: tl.constexpr = _channels_of(ELEMENTS, N)
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


def _launch(
    y: Tensor,
    last_state: Tensor,
    u: _Grid,
    delta: _Grid,
    A: Tensor,
    B: _Grid,
    C: _Grid,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    state_scale: Tensor | None,
    out_scale: float | None,
    out_zero_point: int,
) -> None:
    """Writes y and the last state."""
    batch, length, channels = u[0].shape
    d_state = A.shape[1]
    N = triton.next_power_of_2(d_state)
    groups = B[0].shape[2] if B[0].dim() == 4 else 1
    operands = [rows(grid[0]) for grid in (u, delta, B, C)]
    # The kernels multiply by scales whatever the type.
    unit = (1.0, 0)
    grids = [float(value) for grid in (u, delta, B, C) for value in (unit if grid[0].is_floating_point() else grid[1:])]
    out = (1.0 if out_scale is None else 1.0 / out_scale, float(out_zero_point))
    A = A.to(torch.float32).contiguous()
    D, delta_bias, scale = (float32(x) for x in (D, delta_bias, state_scale))
    start = float32(initial_state) if scale is None or initial_state is None else initial_state.contiguous()
    strides = (channels // groups, *(operand.stride(0) for operand in operands), *grids, *out)
    constants = {"D_STATE": d_state, "N": N, "GROUPED": groups > 1, "SOFTPLUS": delta_softplus}

    def blocks(meta: Mapping[str, Any]) -> int:
        return int(triton.cdiv(channels, _channels_of(meta["ELEMENTS"], N)))

    if length == 1:
        parameters = (A, D, delta_bias, start, last_state, scale, y)
        step.launch(lambda meta: (blocks(meta), batch), *operands, *parameters, channels, *strides, **constants)
        return

    def scan_chunks(chunk: int, *results: Tensor | None) -> None:
        chunks = triton.cdiv(length, chunk)
        sizes = (channels, length, chunk)
        scan.launch(
            lambda meta: (blocks(meta), chunks, batch),
            *operands,
            A,
            D,
            delta_bias,
            *results,
            *sizes,
            *strides,
            **constants,
        )

    chunk = max(_SHORTEST, length * batch * channels // _THREADS)
    # Two chunks scanned twice take as long as all of it once.
    if 2 * chunk >= length or batch * channels * _LANES >= _ENOUGH * _multiprocessors(A.device):
        scan_chunks(length, start, last_state, scale, y, None)
        return
    states = A.new_empty(batch, triton.cdiv(length, chunk), channels, d_state)
    total = A.new_empty(states.shape[:-1])
    scan_chunks(chunk, None, states, None, None, total)
    carry(states, total, A, start, last_state, scale)
    scan_chunks(chunk, states, None, None, y, None)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def run(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    *,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.selective_scan.selective_scan`; the last state goes `into` a tensor if it is given and suits."""
    y, last_state = _fake(u, delta, A, B, C, D, delta_bias, delta_softplus, initial_state)
    last_state = destination(last_state, into, u.shape[1])
    if u.dtype == torch.float64:
        return torch.ops.mq_ao.selective_scan_reference(u, delta, A, B, C, D, delta_bias, delta_softplus, initial_state)
    if last_state.numel():
        grids = [(x, 1.0, 0) for x in (u, delta, B, C)]
        x, dt, b, c = grids
        _launch(y, last_state, x, dt, A, b, c, D, delta_bias, delta_softplus, initial_state, None, None, 0)
    return y, last_state


def run_quantized(
    u: Tensor,
    u_scale: float,
    u_zero_point: int,
    delta: Tensor,
    delta_scale: float,
    delta_zero_point: int,
    A: Tensor,
    B: Tensor,
    B_scale: float,
    B_zero_point: int,
    C: Tensor,
    C_scale: float,
    C_zero_point: int,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    state_scale: Tensor | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    *,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.qselective_scan.qselective_scan`; the last state goes `into` a tensor if it is given and suits."""
    grids = (
        (u, u_scale, u_zero_point),
        (delta, delta_scale, delta_zero_point),
        A,
        (B, B_scale, B_zero_point),
        (C, C_scale, C_zero_point),
    )
    rest: list[Any] = [D, delta_bias, delta_softplus, initial_state, state_scale, out_scale, out_zero_point]
    x, dt, _, b, c = grids
    y, last_state = _qfake(*x, *dt, A, *b, *c, *rest)
    last_state = destination(last_state, into, u.shape[1])
    if last_state.numel():
        _launch(y, last_state, *grids, *rest)
    return y, last_state


def _arguments(
    dtype: torch.dtype, length: int, channels: int, d_state: int, groups: int | None = None
) -> tuple[Tensor, ...]:
    """u, delta, A, B and C."""

    make = partial(blank, dtype=dtype)
    matrix = (1, length, d_state) if groups is None else (1, length, groups, d_state)
    x, A = (1, length, channels), make(channels, d_state, dtype=torch.float32)
    return make(*x), make(*x), A, make(*matrix), make(*matrix)


def examples() -> Iterator[tuple[Any, ...]]:
    """bfloat16 decode and prefill with everything; float32 with many states, in groups, and too short for chunks."""
    for length, channels in ((1, 5120), (2048, 5120), (2048, 1536)):
        operands = _arguments(torch.bfloat16, length, channels, 16)
        A = operands[2]
        yield *operands, A[:, 0], A[:, 0], True, A[None]
    yield _arguments(torch.float32, 40, 1536, 128, 3)


def quantized_examples() -> Iterator[tuple[Any, ...]]:
    """int8 decode and prefill: bare, and with everything that the epilogue can have and int8 states."""
    for length, channels in ((1, 5120), (2048, 5120), (2048, 1536)):
        u, delta, A, B, C = _arguments(torch.int8, length, channels, 16)
        grids = (u, 0.1, 3, delta, 0.1, 3, A, B, 0.1, 3, C, 0.1, 3)
        yield *grids, None, None, True
        state = torch.empty(1, *A.shape, dtype=torch.int8, device="meta")
        yield *grids, A[:, 0], A[:, 0], True, state, A, 0.1, 3
