"""`mq_ao::int8_linear` on CUDA: int8 products on tensor cores with scales, bias and rounding behind them.

Up to 16 rows (decode) it reads each weight once and is bound by that; a tile of 16 rows costs no more than one row,
since tensor cores take 16 at least. Larger matrices go through it where `aten._int_mm` cannot take them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mq_ao.ops.int8_linear import fake
from mq_ao.ops.triton.launch import Config, Kernel
from mq_ao.ops.triton.rounding import to_bytes

FEW_ROWS = 16
_ALIGNMENT = 16


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
def _epilogue(
    total, bias, out, rows, columns, m, n, out_inverse, out_zero_point, HAS_BIAS: tl.constexpr, INT8: tl.constexpr
):
    """Adds the bias and writes a tile, rounded if asked."""
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < n, other=0.0)[None, :]
    at = out + rows[:, None].to(tl.int64) * n + columns[None, :]
    if INT8:
        tl.store(at, to_bytes(total * out_inverse, out_zero_point, -128.0, 127.0).to(tl.int8), mask=inside)
    else:
        tl.store(at, total, mask=inside)


@triton.jit
def _int8_linear(
    q,
    token_scale,
    weight,
    scale,
    correction,
    bias,
    out,
    m,
    n,
    k,
    out_inverse,
    out_zero_point,
    PER_TOKEN: tl.constexpr,
    CORRECTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q (m, k) times weight (n, k), with one scale a channel."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    left = q + rows[:, None].to(tl.int64) * k + inner[None, :]
    right = weight + columns[None, :].to(tl.int64) * k + inner[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, k, BLOCK_K):
        more = inner < k - start
        a = tl.load(left + start, mask=(rows[:, None] < m) & more[None, :], other=0)
        b = tl.load(right + start, mask=(columns[None, :] < n) & more[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    if CORRECTED:
        sums -= tl.load(correction + columns, mask=columns < n, other=0)[None, :]
    factor = tl.load(scale + columns, mask=columns < n, other=0.0)[None, :]
    if PER_TOKEN:
        factor = factor * tl.load(token_scale + rows, mask=rows < m, other=0.0)[:, None]
    total = sums.to(tl.float32) * factor
    _epilogue(total, bias, out, rows, columns, m, n, out_inverse, out_zero_point, HAS_BIAS, INT8)


@triton.jit
def _grouped_linear(
    q,
    token_scale,
    weight,
    scale,
    correction,
    bias,
    out,
    m,
    n,
    k,
    out_inverse,
    out_zero_point,
    PER_TOKEN: tl.constexpr,
    CORRECTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INT8: tl.constexpr,
    GROUP: tl.constexpr,
    INT4: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """q (m, k) times weight (n, k) or packed (n, k / 2), with a scale for each group of a channel."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    HALF: tl.constexpr = GROUP // 2
    inner = tl.arange(0, HALF)
    left = q + rows[:, None].to(tl.int64) * k + inner[None, :]
    right = weight + columns[None, :].to(tl.int64) * (k // 2 if INT4 else k) + inner[:, None]
    groups = k // GROUP
    beside = columns.to(tl.int64) * groups
    factor = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    if PER_TOKEN:
        factor = tl.load(token_scale + rows, mask=rows < m, other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(groups):
        first = tl.load(left + group * GROUP, mask=rows[:, None] < m, other=0)
        second = tl.load(left + group * GROUP + HALF, mask=rows[:, None] < m, other=0)
        low, high = halves(right, group, columns[None, :] < n, GROUP, INT4)
        sums = tl.dot(first, low, out_dtype=tl.int32)
        sums = tl.dot(second, high, sums, out_dtype=tl.int32)
        if CORRECTED:
            sums -= tl.load(correction + beside + group, mask=columns < n, other=0)[None, :]
        step = tl.load(scale + beside + group, mask=columns < n, other=0.0)[None, :]
        if PER_TOKEN:
            step = step * factor[:, None]
        total += sums.to(tl.float32) * step
    _epilogue(total, bias, out, rows, columns, m, n, out_inverse, out_zero_point, HAS_BIAS, INT8)


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
few_rows = Kernel(_int8_linear, _FEW, key=("n", "k"))
many_rows = Kernel(_int8_linear, _MANY, key=("m", "n", "k"))
odd_rows = Kernel(_int8_linear, _ODD, key=("m", "n", "k"))
few_rows_grouped = Kernel(_grouped_linear, _FEW_GROUPED, key=("n", "k"))
many_rows_grouped = Kernel(_grouped_linear, _MANY_GROUPED, key=("m", "n", "k"))


def run(
    q: Tensor,
    token_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor | None = None,
    bias: Tensor | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    group_size: int = 0,
) -> Tensor:
    """See `mq_ao.ops.int8_linear.int8_linear`."""
    out = fake(q, token_scale, weight, scale, correction, bias, out_scale, out_zero_point, group_size)
    k, n = q.shape[-1], weight.shape[0]
    m = q.numel() // k
    if m == 0:
        return out
    kernels = (few_rows_grouped, many_rows_grouped) if group_size else (few_rows, many_rows)
    kernel = odd_rows if not group_size and k % _ALIGNMENT else kernels[m > FEW_ROWS]
    scales = None if token_scale is None else token_scale.contiguous()
    operands = (q.contiguous(), scales, weight, scale, correction, bias, out, m, n, k)
    constants: dict[str, Any] = {
        "PER_TOKEN": token_scale is not None,
        "CORRECTED": correction is not None,
        "HAS_BIAS": bias is not None,
        "INT8": out_scale is not None,
    }
    if group_size:
        constants |= {"GROUP": group_size, "INT4": weight.dtype == torch.uint8}
    kernel.launch(
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"])),
        *operands,
        1.0 if out_scale is None else 1.0 / out_scale,
        float(out_zero_point),
        **constants,
    )
    return out


def examples() -> Iterator[tuple[Any, ...]]:
    """Decode and prefill; plain, and with everything that an epilogue can have."""

    def make(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n, k = 10240, 2560
    bias, sums = make(n, dtype=torch.float32), make(n, dtype=torch.int32)
    for rows in (1, 1024):
        q, token_scale = make(rows, k), make(rows, 1, dtype=torch.float32)
        yield q, token_scale, make(n, k), make(n, dtype=torch.float32)
        yield q, None, make(n, k), make(n, dtype=torch.float32), sums, bias, 0.1, 3
        scales = make(n, k // 64, dtype=torch.float32)
        yield q, token_scale, make(n, k // 2, dtype=torch.uint8), scales, None, None, None, 0, 64
        scales, corrections = (make(n, k // 128, dtype=dtype) for dtype in (torch.float32, torch.int32))
        yield q, None, make(n, k // 2, dtype=torch.uint8), scales, corrections, bias, 0.1, 3, 128
        yield q, token_scale, make(n, k), scales, None, None, None, 0, 128
    n, k = 81, 1532
    bias, sums = make(n, dtype=torch.float32), make(n, dtype=torch.int32)
    yield make(1024, k), None, make(n, k), make(n, dtype=torch.float32), sums, bias, 0.1, 3
