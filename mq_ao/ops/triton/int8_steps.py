"""`mq_ao::int8_conv_step_` and `int8_scan_step_` on CUDA: a linear, and in its epilogue one step of what reads it.

Both read weights and little else. All that the epilogue needs is loaded before the product, so that it is there when
the product ends. Every state belongs to one program, which reads it before it writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mq_ao.ops.gpu_tuning import FEW_ROWS
from mq_ao.ops.grids import Grid
from mq_ao.ops.int8_steps import int8_conv_step_, int8_scan_step_
from mq_ao.ops.operator import Operands, by_reference, implements
from mq_ao.ops.triton import linear_rows
from mq_ao.ops.triton.causal_conv1d import MOST_TAPS, epilogue, finished, in_steps
from mq_ao.ops.triton.launch import Config, Kernel, blank
from mq_ao.ops.triton.linear_rows import ALIGNMENT, tile, write_piece
from mq_ao.ops.triton.operands import float32, on_grid, rows
from mq_ao.ops.triton.rounding import rounded, to_bytes, write
from mq_ao.ops.triton.scan_kernels import finish_step, step_operands

_MOST_STATES = 128
_ROWS: tl.constexpr = tl.constexpr(FEW_ROWS)


@triton.jit
def _int8_conv_step(
    q,
    token_scale,
    weight,
    scale,
    correction,
    bias,
    first_out,
    second_out,
    third_out,
    m,
    n,
    k,
    first_stop,
    second_stop,
    first_inverse,
    first_zero_point,
    second_inverse,
    second_zero_point,
    third_inverse,
    third_zero_point,
    conv_weight,
    conv_weight_scale,
    conv_bias,
    conv_state,
    conv_out,
    conv_start,
    channels,
    x_scale,
    x_inverse,
    x_zero_point,
    out_inverse,
    out_zero_point,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    INT4: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of outputs in pieces, but for the one of `channels` from `conv_start` on, which the convolution reads."""
    rows = tl.arange(0, _ROWS)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = columns - conv_start
    there = (channel >= 0) & (channel < channels)
    inside = (rows < m)[:, None] & there[None, :]
    sequence = rows[:, None].to(tl.int64) * channels
    state_at = conv_state + sequence * (TAPS - 1) + channel[None, :]
    window: tl.tuple = ()
    taps: tl.tuple = ()
    for tap in tl.static_range(TAPS - 1):
        window += (tl.load(state_at + tap * channels, mask=inside, other=0.0),)
    for tap in tl.static_range(TAPS):
        taps += (tl.load(conv_weight + channel * TAPS + tap, mask=there, other=0),)
    factor, shift = epilogue(conv_weight_scale, conv_bias, x_scale, channel, there)

    operands = (q, token_scale, weight, scale, correction, bias)
    total = tile(*operands, rows, columns, m, n, k, GROUP, INT4, _ROWS, BLOCK_N, BLOCK_K)
    write_piece(first_out, total, rows, columns, m, 0, first_stop, first_inverse, first_zero_point)
    write_piece(second_out, total, rows, columns, m, first_stop, second_stop, second_inverse, second_zero_point)
    write_piece(third_out, total, rows, columns, m, second_stop, n, third_inverse, third_zero_point)

    newest = to_bytes(total * x_inverse, x_zero_point, -128.0, 127.0) - x_zero_point
    sums = newest * taps[TAPS - 1].to(tl.float32)[None, :]
    inputs: tl.tuple = ()
    for tap in tl.static_range(TAPS - 1):
        value = in_steps(window[tap], x_inverse, -128.0 - x_zero_point, 127.0 - x_zero_point)
        sums += value * taps[tap].to(tl.float32)[None, :]
        inputs += (value,)
    inputs += (newest,)
    y = finished(sums, factor, shift, SILU)
    write(conv_out + sequence + channel[None, :], y, inside, out_inverse, out_zero_point)
    tl.debug_barrier()  # one thread may write what another has read
    for entry in tl.static_range(TAPS - 1):
        tl.store(state_at + entry * channels, inputs[entry + 1] * x_scale, mask=inside)


@triton.jit
def _int8_scan_step(
    q,
    weight,
    scale,
    correction,
    bias,
    u,
    B,
    C,
    A,
    D,
    delta_bias,
    state,
    state_scale,
    y,
    channels,
    k,
    group_channels,
    u_row,
    B_row,
    C_row,
    delta_scale,
    delta_inverse,
    delta_zero_point,
    u_scale,
    u_zero_point,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Some channels of one sequence, in the first row of a tile: few sequences read the weight from the cache."""
    row = tl.program_id(1)
    sequence = row.to(tl.int64)
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    operands = step_operands(
        u,
        B,
        C,
        A,
        D,
        delta_bias,
        state,
        state_scale,
        sequence,
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
    tokens = row + tl.arange(0, _ROWS)
    linear = (q, None, weight, scale, correction, bias)
    total = tile(*linear, tokens, c, row + 1, channels, k, 0, False, _ROWS, BLOCK_N, BLOCK_K)
    steps = to_bytes(total * delta_inverse, delta_zero_point, -128.0, 127.0) - delta_zero_point
    delta = tl.sum(tl.where((tokens == row)[:, None], steps * delta_scale, 0.0), axis=0)
    finish_step(
        delta,
        operands,
        y,
        state,
        state_scale,
        sequence,
        c,
        channels,
        out_inverse,
        out_zero_point,
        D_STATE,
        N,
        SOFTPLUS,
    )


conv_step = Kernel(
    _int8_conv_step,
    (
        Config(4, 4, BLOCK_N=32, BLOCK_K=256),
        Config(4, 4, BLOCK_N=16, BLOCK_K=512),
        Config(2, 4, BLOCK_N=32, BLOCK_K=128),
    ),
    key=("n", "k"),
    changes=("conv_state",),
)
grouped_conv_step = Kernel(
    _int8_conv_step,
    (Config(4, 4, BLOCK_N=32), Config(2, 4, BLOCK_N=16), Config(4, 3, BLOCK_N=64)),
    key=("n", "k"),
    changes=("conv_state",),
)
scan_step = Kernel(
    _int8_scan_step,
    (
        Config(2, 3, BLOCK_N=16, BLOCK_K=64),
        Config(2, 2, BLOCK_N=16, BLOCK_K=256),
        Config(4, 3, BLOCK_N=32, BLOCK_K=64),
    ),
    key=("channels", "k", "D_STATE"),
    changes=("state",),
)


@implements(int8_conv_step_)
def run_conv(a: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """See `mq_ao.ops.int8_steps.int8_conv_step_`."""
    outs = int8_conv_step_.results(a)
    piece, taps, bias = a.piece, a.conv_weight.shape[1], a.conv_bias
    fits = (
        _fits(a.q, a.conv_state, whole=not a.group_size)
        and taps <= MOST_TAPS
        and (bias is None or bias.dtype == torch.float32)
    )
    if not fits:
        return by_reference(int8_conv_step_, a)
    others = [out if index != piece else None for index, out in enumerate(outs[: len(a.sizes)])]
    grids = [*map(Grid, a.out_scales, a.out_zero_points)]
    (grouped_conv_step if a.group_size else conv_step).launch(
        lambda meta: (triton.cdiv(a.weight.shape[0], meta["BLOCK_N"]),),
        *linear_rows.arguments(a, a.sizes, others, grids),
        a.conv_weight.contiguous(),
        a.conv_weight_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        a.conv_state,
        outs[piece],
        sum(a.sizes[:piece]),
        a.sizes[piece],
        *_written(a.out_scales[piece], a.out_zero_points[piece]),
        *rounded(Grid.of(a, "conv_out")),
        TAPS=taps,
        SILU=a.activation == "silu",
        **linear_rows.layout(a),
    )
    return outs


@implements(int8_scan_step_)
def run_scan(a: Operands) -> Tensor:
    """See `mq_ao.ops.int8_steps.int8_scan_step_`."""
    y = int8_scan_step_.results(a)
    channels, d_state = a.A.shape
    if not _fits(a.q, a.state, whole=True) or d_state > _MOST_STATES:
        return by_reference(int8_scan_step_, a)
    groups = a.B.shape[2] if a.B.dim() == 4 else 1
    operands = [rows(operand) for operand in (a.u, a.B, a.C)]
    scan_step.launch(
        lambda meta: (triton.cdiv(channels, meta["BLOCK_N"]), a.q.shape[0]),
        a.q.contiguous(),
        *(a.weight, a.scale, a.correction, a.bias),
        *operands,
        *(float32(parameter) for parameter in (a.A, a.D, a.delta_bias)),
        a.state,
        float32(a.state_scale),
        y,
        channels,
        a.q.shape[2],
        channels // groups,
        *(operand.stride(0) for operand in operands),
        *_written(a.delta_scale, a.delta_zero_point),
        *(value for name in ("u", "B", "C") for value in on_grid(getattr(a, name), Grid.of(a, name))),
        *rounded(Grid.of(a, "out")),
        D_STATE=d_state,
        N=triton.next_power_of_2(d_state),
        GROUPED=groups > 1,
        SOFTPLUS=a.delta_softplus,
    )
    return y


def _fits(q: Tensor, state: Tensor, whole: bool) -> bool:
    """Whether there are as few rows as the kernels take, in words of 16 bytes if the weight has no groups."""
    return 0 < q.shape[0] <= FEW_ROWS and not (whole and q.shape[2] % ALIGNMENT) and state.is_contiguous()


def _written(scale: float, zero_point: int) -> tuple[float, float, float]:
    """Scale, inverse and zero point of a grid that values are rounded to and read from."""
    return float(scale), 1.0 / scale, float(zero_point)


def conv_examples() -> Iterator[tuple[Any, ...]]:
    """in_proj of Mamba-1, whose first piece is x, in int8 and in int4; and one as of Mamba-2, whose second is."""

    make, floats = partial(blank, dtype=torch.int8), partial(blank, dtype=torch.float32)
    n, k, size = 10240, 2560, 5120
    q, tokens = make(1, 1, k), floats(1, 1, 1)
    pieces = ([size, size], [0.1, 0.0], [3, 0])
    conv: Any = (make(size, 4), floats(size), floats(size), floats(1, 3, size), "silu", 0.1, 3)
    sums = blank(n, dtype=torch.int32)
    yield q, None, make(n, k), floats(n), sums, floats(n), *pieces, 0, 0, *conv
    packed, scales = blank(n, k // 2, dtype=torch.uint8), blank(n, k // 64, dtype=torch.bfloat16)
    sums = blank(n, k // 64, dtype=torch.int32)
    yield q, tokens, packed, scales.to(torch.bfloat16), None, None, *pieces, 64, 0, *conv
    yield q, None, packed, scales, sums, None, *pieces, 64, 0, *conv
    sizes = [5120, 5376, 80]
    conv = (make(5376, 4), floats(5376), floats(5376), floats(1, 3, 5376), "silu", None, 0)
    weight, scale = make(sum(sizes), k), floats(sum(sizes))
    yield q, tokens, weight, scale, None, None, sizes, [0.0, 0.1, 0.0], [0, 3, 0], 0, 1, *conv


def scan_examples() -> Iterator[tuple[Any, ...]]:
    """dt_proj of Mamba-1, bare, and with everything that there can be and int8 states."""

    make, floats = partial(blank, dtype=torch.int8), partial(blank, dtype=torch.float32)
    channels, k = 5120, 160
    for d_state, bare in ((16, True), (16, False), (128, False)):
        linear = (make(1, 1, k), make(channels, k), floats(channels))
        A, B = floats(channels, d_state), make(1, 1, d_state)
        grids = (0.1, 3, make(1, 1, channels), 0.1, 3, A, B, 0.1, 3, B, 0.1, 3)
        if bare:
            yield *linear, None, None, *grids, None, None, True, floats(1, *A.shape), None, None, 0
            continue
        sums, bias = blank(channels, dtype=torch.int32), floats(channels)
        yield *linear, sums, bias, *grids, bias, bias, True, make(1, *A.shape), A, 0.1, 3
