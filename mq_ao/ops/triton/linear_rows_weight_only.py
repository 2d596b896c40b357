"""`mq_ao::linear_rows_weight_only` on CUDA: for few rows each weight is read once and becomes a float in registers.

Many rows are bound by arithmetic, not by weights: there activations are rounded to bfloat16, and tensor cores take them
and the integers, which bfloat16 holds exactly; scales multiply their float32 sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mq_ao.ops.gpu_tuning import FEW_ROWS
from mq_ao.ops.grids import FLOATS
from mq_ao.ops.linear_rows_weight_only import linear_rows_weight_only
from mq_ao.ops.operator import Operands, implements
from mq_ao.ops.triton.launch import Config, Kernel, blank
from mq_ao.ops.triton.linear_rows import ALIGNMENT, halves, launch, linear


@triton.jit
def _linear_rows_weight_only(
    x, weight, scale, bias, out, n, k, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A row of x (m, k) times weight (n, k), with one scale a channel."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    left = x + row.to(tl.int64) * k
    right = weight + columns[:, None].to(tl.int64) * k + inner[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        more = inner < k - start
        a = tl.load(left + start + inner, mask=more, other=0.0).to(tl.float32)
        b = tl.load(right + start, mask=(columns[:, None] < n) & more[None, :], other=0)
        sums += b.to(tl.float32) * a[None, :]
    total = tl.sum(sums, axis=1) * tl.load(scale + columns, mask=columns < n, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < n, other=0.0)
    tl.store(out + row.to(tl.int64) * n + columns, total, mask=columns < n)


@triton.jit
def _grouped_linear_rows_weight_only(
    x,
    weight,
    scale,
    bias,
    out,
    n,
    k,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    INT4: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A row of x (m, k) times weight (n, k) or packed (n, k / 2), with a scale for each group of a channel."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    HALF: tl.constexpr = GROUP // 2
    inner = tl.arange(0, HALF)
    left = x + row.to(tl.int64) * k + inner
    right = weight + columns[:, None].to(tl.int64) * (k // 2 if INT4 else k) + inner[None, :]
    groups = k // GROUP
    sums = tl.zeros((BLOCK_N, HALF), dtype=tl.float32)
    for group in range(groups):
        first = tl.load(left + group * GROUP).to(tl.float32)
        second = tl.load(left + group * GROUP + HALF).to(tl.float32)
        low, high = halves(right, group, columns[:, None] < n, GROUP, INT4)
        step = tl.load(scale + columns.to(tl.int64) * groups + group, mask=columns < n, other=0.0).to(tl.float32)
        sums += (low.to(tl.float32) * first[None, :] + high.to(tl.float32) * second[None, :]) * step[:, None]
    total = tl.sum(sums, axis=1)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < n, other=0.0)
    tl.store(out + row.to(tl.int64) * n + columns, total, mask=columns < n)


many_rows = Kernel(
    linear,
    (
        Config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        Config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        Config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64),
    ),
    key=("n", "k"),
)
many_rows_grouped = Kernel(
    linear,
    (
        Config(8, 2, BLOCK_M=64, BLOCK_N=64),
        Config(8, 2, BLOCK_M=64, BLOCK_N=128),
        Config(4, 2, BLOCK_M=64, BLOCK_N=32),
    ),
    key=("n", "k"),
)
odd_rows = Kernel(linear, (Config(4, 1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32),), key=("n", "k"))
few_rows = Kernel(
    _linear_rows_weight_only,
    (
        Config(4, 3, BLOCK_N=16, BLOCK_K=256),
        Config(4, 3, BLOCK_N=8, BLOCK_K=512),
        Config(4, 3, BLOCK_N=32, BLOCK_K=128),
    ),
    key=("n", "k"),
)
few_rows_grouped = Kernel(
    _grouped_linear_rows_weight_only,
    (Config(4, 3, BLOCK_N=32), Config(4, 3, BLOCK_N=16), Config(2, 4, BLOCK_N=16)),
    key=("n", "k"),
)


@implements(linear_rows_weight_only)
def run(a: Operands) -> Tensor:
    """See `mq_ao.ops.linear_rows_weight_only.linear_rows_weight_only`."""
    y = linear_rows_weight_only.results(a)
    k, n = a.x.shape[-1], a.weight.shape[0]
    m = a.x.numel() // max(k, 1)
    if m == 0:
        return y
    if m > FEW_ROWS:
        kernel = many_rows_grouped if a.group_size else odd_rows if k % ALIGNMENT else many_rows
        launch(kernel, a.but(q=a.x.to(torch.bfloat16), token_scale=None, correction=None), [y], [FLOATS])
        return y
    constants: dict[str, Any] = {"HAS_BIAS": a.bias is not None}
    if a.group_size:
        constants |= {"GROUP": a.group_size, "INT4": a.weight.dtype == torch.uint8}
    kernel = few_rows_grouped if a.group_size else few_rows
    operands = (a.x.contiguous(), a.weight, a.scale, a.bias, y, n, k)
    kernel.launch(lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), m), *operands, **constants)
    return y


def examples() -> Iterator[tuple[Any, ...]]:
    """One token and a prompt."""

    n, k = 10240, 2560
    whole, packed = blank(n, k, dtype=torch.int8), blank(n, k // 2, dtype=torch.uint8)
    for rows, group in ((1, 64), (1024, 128)):
        x, scale = blank(rows, k), blank(n, k // group, dtype=torch.bfloat16)
        yield x, whole, blank(n)
        yield x, packed, scale, None, group
    yield blank(1, k), whole, blank(n, k // 128), blank(n), 128
    yield blank(1024, 1532), blank(81, 1532, dtype=torch.int8), blank(81), blank(81)
