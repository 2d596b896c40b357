"""`mq_ao::linear_rows` and `linears_rows` on CUDA: int8 products on tensor cores, with scales, bias and rounding.

Up to 16 rows (decode) it reads each weight once and is bound by that; a tile of 16 rows costs no more than one row,
since tensor cores take 16 at least. Larger matrices go through it where `aten._int_mm` cannot take them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mq_ao.ops.gpu_tuning import FEW_ROWS
from mq_ao.ops.grids import Grid
from mq_ao.ops.linear_rows import MOST_PIECES, linear_rows, linears_rows
from mq_ao.ops.operator import Operands, implements
from mq_ao.ops.triton.launch import Config, Kernel, blank
from mq_ao.ops.triton.rounding import rounded, write

ALIGNMENT = 16


@triton.jit
def halves(weight, group, inside, GROUP: tl.constexpr, INT4: tl.constexpr):
    """Both halves of a group of weights in int8; `weight` points at the first half of the first group."""
    if INT4:
        packed = tl.load(weight + group * (GROUP // 2), mask=inside, other=0)
        # Four bits with a sign: flipping the sign's bit and taking it away again.
        first = (((packed & 15) ^ 8).to(tl.int8) - 8).to(tl.int8)
        second = (((packed >> 4) ^ 8).to(tl.int8) - 8).to(tl.int8)
    else:
        first = tl.load(weight + group * GROUP, mask=inside, other=0)
        second = tl.load(weight + group * GROUP + GROUP // 2, mask=inside, other=0)
    return first, second


@triton.jit
def _no_sums(q, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zeros of the type that sums of products with q have."""
    sums: tl.constexpr = tl.int32 if q.dtype.element_ty == tl.int8 else tl.float32
    return tl.zeros((BLOCK_M, BLOCK_N), dtype=sums)


@triton.jit
def _add_products(a, b, sums):
    """sums plus a, int8 or bfloat16, times integers b, which bfloat16 holds exactly."""
    if a.dtype == tl.int8:
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    else:
        sums = tl.dot(a, b.to(tl.float32).to(a.dtype), sums)
    return sums


@triton.jit
def _channel_tile(
    q,
    token_scale,
    weight,
    scale,
    correction,
    rows,
    columns,
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of q (m, k) times weight (n, k), with one scale a channel."""
    inner = tl.arange(0, BLOCK_K)
    left = q + rows[:, None].to(tl.int64) * k + inner[None, :]
    right = weight + columns[None, :].to(tl.int64) * k + inner[:, None]
    sums = _no_sums(q, BLOCK_M, BLOCK_N)
    for start in range(0, k, BLOCK_K):
        more = inner < k - start
        a = tl.load(left + start, mask=(rows[:, None] < m) & more[None, :], other=0)
        b = tl.load(right + start, mask=(columns[None, :] < n) & more[:, None], other=0)
        sums = _add_products(a, b, sums)
    if correction is not None:
        sums -= tl.load(correction + columns, mask=columns < n, other=0)[None, :]
    factor = tl.load(scale + columns, mask=columns < n, other=0.0)[None, :]
    if token_scale is not None:
        factor = factor * tl.load(token_scale + rows, mask=rows < m, other=0.0)[:, None]
    return sums.to(tl.float32) * factor


@triton.jit
def _grouped_tile(
    q,
    token_scale,
    weight,
    scale,
    correction,
    rows,
    columns,
    m,
    n,
    k,
    GROUP: tl.constexpr,
    INT4: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of q (m, k) times weight (n, k) or packed (n, k / 2), with a scale for each group of a channel."""
    HALF: tl.constexpr = GROUP // 2
    inner = tl.arange(0, HALF)
    left = q + rows[:, None].to(tl.int64) * k + inner[None, :]
    right = weight + columns[None, :].to(tl.int64) * (k // 2 if INT4 else k) + inner[:, None]
    groups = k // GROUP
    beside = columns.to(tl.int64) * groups
    factor = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    if token_scale is not None:
        factor = tl.load(token_scale + rows, mask=rows < m, other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(groups):
        first = tl.load(left + group * GROUP, mask=rows[:, None] < m, other=0)
        second = tl.load(left + group * GROUP + HALF, mask=rows[:, None] < m, other=0)
        low, high = halves(right, group, columns[None, :] < n, GROUP, INT4)
        sums = _add_products(first, low, _no_sums(q, BLOCK_M, BLOCK_N))
        sums = _add_products(second, high, sums)
        if correction is not None:
            sums -= tl.load(correction + beside + group, mask=columns < n, other=0)[None, :]
        step = tl.load(scale + beside + group, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        if token_scale is not None:
            step = step * factor[:, None]
        total += sums.to(tl.float32) * step
    return total


@triton.jit
def tile(
    q,
    token_scale,
    weight,
    scale,
    correction,
    bias,
    rows,
    columns,
    m,
    n,
    k,
    GROUP: tl.constexpr,
    INT4: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of outputs in float32, with their bias: of a weight in groups, or with GROUP 0 of one scale a channel."""
    if GROUP:
        total = _grouped_tile(
            q, token_scale, weight, scale, correction, rows, columns, m, n, k, GROUP, INT4, BLOCK_M, BLOCK_N
        )
    else:
        total = _channel_tile(
            q, token_scale, weight, scale, correction, rows, columns, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K
        )
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < n, other=0.0)[None, :]
    return total


@triton.jit
def write_piece(out, total, rows, columns, m, start, stop, inverse, zero_point):
    """Writes the columns start..stop of a tile to a matrix of their own, if there is one; rounded if that is int8."""
    if out is not None:
        inside = (rows[:, None] < m) & (columns >= start)[None, :] & (columns < stop)[None, :]
        at = out + rows[:, None].to(tl.int64) * (stop - start) + (columns - start)[None, :]
        write(at, total, inside, inverse, zero_point)


@triton.jit
def linear(
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
    GROUP: tl.constexpr,
    INT4: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of outputs, in pieces."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    operands = (q, token_scale, weight, scale, correction, bias)
    total = tile(*operands, rows, columns, m, n, k, GROUP, INT4, BLOCK_M, BLOCK_N, BLOCK_K)
    write_piece(first_out, total, rows, columns, m, 0, first_stop, first_inverse, first_zero_point)
    write_piece(second_out, total, rows, columns, m, first_stop, second_stop, second_inverse, second_zero_point)
    write_piece(third_out, total, rows, columns, m, second_stop, n, third_inverse, third_zero_point)


# Shared memory of all of them is below the 99 KB of the smallest chips from Ampere on (compute capability 8.6).
_FEW = (
    Config(4, 4, BLOCK_M=16, BLOCK_N=32, BLOCK_K=256),
    Config(4, 4, BLOCK_M=16, BLOCK_N=16, BLOCK_K=512),
    Config(4, 4, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128),
    Config(2, 4, BLOCK_M=16, BLOCK_N=32, BLOCK_K=128),
)
_MANY = (
    Config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
    Config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
    Config(4, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=128),
    Config(4, 4, BLOCK_M=32, BLOCK_N=64, BLOCK_K=128),
)
_FEW_GROUPED = (
    Config(4, 4, BLOCK_M=16, BLOCK_N=32),
    Config(2, 4, BLOCK_M=16, BLOCK_N=16),
    Config(4, 3, BLOCK_M=16, BLOCK_N=64),
)
_MANY_GROUPED = (
    Config(4, 3, BLOCK_M=64, BLOCK_N=64),
    Config(8, 3, BLOCK_M=128, BLOCK_N=64),
    Config(8, 3, BLOCK_M=64, BLOCK_N=128),
)
# Rows that do not begin at multiples of 16 bytes are read byte by byte, which takes registers.
_ODD = (Config(4, 2, BLOCK_M=16, BLOCK_N=32, BLOCK_K=64), Config(4, 2, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32))
few_rows = Kernel(linear, _FEW, key=("n", "k"))
many_rows = Kernel(linear, _MANY, key=("n", "k"))
odd_rows = Kernel(linear, _ODD, key=("n", "k"))
few_rows_grouped = Kernel(linear, _FEW_GROUPED, key=("n", "k"))
many_rows_grouped = Kernel(linear, _MANY_GROUPED, key=("n", "k"))


@implements(linear_rows)
def run(a: Operands) -> Tensor:
    """See `mq_ao.ops.linear_rows.linear_rows`."""
    y = linear_rows.results(a)
    _run(a, [y], [Grid.of(a, "out")])
    return y


@implements(linears_rows)
def run_pieces(a: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """See `mq_ao.ops.linear_rows.linears_rows`."""
    pieces = linears_rows.results(a)
    _run(a, pieces[: len(a.sizes)], [*map(Grid, a.out_scales, a.out_zero_points)])
    return pieces


def _run(a: Operands, pieces: Sequence[Tensor], grids: Sequence[Grid]) -> None:
    """Fills `pieces` by the kernel for that many rows."""
    k = a.q.shape[-1]
    m = a.q.numel() // k
    if m == 0:
        return
    kernels = (few_rows_grouped, many_rows_grouped) if a.group_size else (few_rows, many_rows)
    launch(odd_rows if not a.group_size and k % ALIGNMENT else kernels[m > FEW_ROWS], a, pieces, grids)


def launch(kernel: Kernel, a: Operands, pieces: Sequence[Tensor], grids: Sequence[Grid]) -> None:
    """Fills the pieces of the outputs in order, each with its grid, whose scale is None or 0 for a float one."""
    m, n = a.q.numel() // a.q.shape[-1], a.weight.shape[0]
    kernel.launch(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"])),
        *arguments(a, [piece.shape[-1] for piece in pieces], pieces, grids),
        **layout(a),
    )


def arguments(
    a: Operands, sizes: Sequence[int], pieces: Sequence[Tensor | None], grids: Sequence[Grid]
) -> tuple[Any, ...]:
    """What kernels of linears take first: operands, `pieces` or None for each of the sizes, sizes, and their grids."""
    k, n = a.q.shape[-1], a.weight.shape[0]
    missing = MOST_PIECES - len(pieces)
    stops = list(itertools.accumulate(sizes))[:2]
    return (
        a.q.contiguous(),
        None if a.token_scale is None else a.token_scale.contiguous(),
        *(a.weight, a.scale, a.correction, a.bias),
        *pieces,
        *[None] * missing,
        a.q.numel() // k,
        n,
        k,
        *stops,
        *[n] * (2 - len(stops)),
        *(value for grid in grids for value in rounded(grid)),
        *[1.0, 0.0] * missing,
    )


def layout(a: Operands) -> dict[str, Any]:
    """The constants of a kernel that tell how its weight lies; tiles of one in groups take a group at a time."""
    whole = {"BLOCK_K": 0} if a.group_size else {}
    return {"GROUP": a.group_size, "INT4": a.weight.dtype == torch.uint8, **whole}


def examples() -> Iterator[tuple[Any, ...]]:
    """Decode and prefill; plain, and with everything that an epilogue can have."""

    make = partial(blank, dtype=torch.int8)
    n, k = 10240, 2560
    bias, sums = make(n, dtype=torch.float32), make(n, dtype=torch.int32)
    packed = make(n, k // 2, dtype=torch.uint8)
    for rows in (1, 1024):
        q, token_scale = make(rows, k), make(rows, 1, dtype=torch.float32)
        scales = make(n, k // 64, dtype=torch.bfloat16)
        yield q, token_scale, packed, scales, None, None, None, 0, 64
        scales, corrections = (make(n, k // 128, dtype=dtype) for dtype in (torch.float32, torch.int32))
        yield q, None, packed, scales, corrections, bias, 0.1, 3, 128
        yield q, None, make(n, k), make(n, dtype=torch.float32), sums, bias, 0.1, 3
    yield q, token_scale, make(n, k), make(n, dtype=torch.float32)
    yield q, token_scale, make(n, k), scales, None, None, None, 0, 128
    n, k = 81, 1532
    bias, sums = make(n, dtype=torch.float32), make(n, dtype=torch.int32)
    yield make(1024, k), None, make(n, k), make(n, dtype=torch.float32), sums, bias, 0.1, 3


def pieces_examples() -> Iterator[tuple[Any, ...]]:
    """in_proj, of which x is rounded and z is not, and x_proj, whose three pieces are rounded; for one token."""

    make = partial(blank, dtype=torch.int8)
    for rows in (1, 1024):
        q, token_scale, scale = make(rows, 2560), make(rows, 1, dtype=torch.float32), make(10240, dtype=torch.float32)
        yield q, token_scale, make(10240, 2560), scale, None, None, [5120, 5120], [0.1, 0.0], [3, 0]
    grouped = make(10240, 2560 // 64, dtype=torch.float32)
    weight = make(10240, 1280, dtype=torch.uint8)
    yield (
        make(1, 2560),
        make(1, 1, dtype=torch.float32),
        weight,
        grouped,
        None,
        None,
        [5120, 5120],
        [0.1, 0],
        [3, 0],
        64,
    )
    sums, scale = make(192, dtype=torch.int32), make(192, dtype=torch.float32)
    sizes = [160, 16, 16]
    yield make(1, 5120), None, make(192, 5120), scale, sums, None, sizes, [0.1, 0.2, 0.3], [3, 0, 1]
