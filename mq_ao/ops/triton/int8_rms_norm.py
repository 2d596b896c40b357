"""`mq_ao::int8_rms_norm` on CUDA: a program adds, normalises and rounds whole rows, which it reads once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mq_ao.ops.grids import Grid
from mq_ao.ops.int8_rms_norm import int8_rms_norm
from mq_ao.ops.operator import Operands, by_reference, implements
from mq_ao.ops.triton.launch import Config, Kernel
from mq_ao.ops.triton.rounding import rounded, rows_to_int8, write
from mq_ao.ops.triton.rows import LARGEST_ROW, LONG, TILE, matrix


@triton.jit
def _rms_norm(
    x,
    residual,
    weight,
    q,
    token_scale,
    total,
    rows,
    n,
    x_stride,
    residual_stride,
    eps,
    out_inverse,
    out_zero_point,
    ADDED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Rows (rows, n) of x, with those of residual added first."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    inside = (row[:, None] < rows) & (column[None, :] < n)
    first = row[:, None].to(tl.int64)
    at = first * n + column[None, :]
    values = tl.load(x + first * x_stride + column[None, :], mask=inside, other=0.0)
    if ADDED:
        values += tl.load(residual + first * residual_stride + column[None, :], mask=inside, other=0.0)
        tl.store(total + at, values, mask=inside)
    if WEIGHTED:
        factor = tl.load(weight + column, mask=column < n, other=0.0)[None, :]
    mean = tl.sum(values * values, axis=1) / n
    values = values * tl.rsqrt(mean + eps)[:, None]
    if WEIGHTED:
        values = values * factor
    if PER_TOKEN:
        integers, scale = rows_to_int8(values)
        tl.store(q + at, integers, mask=inside)
        tl.store(token_scale + row, scale, mask=row < rows)
    else:
        write(q + at, values, inside, out_inverse, out_zero_point)


short_rows = Kernel(_rms_norm, (Config(4, 1), Config(8, 1)), key=("n",))
long_rows = Kernel(_rms_norm, (Config(16, 1),), key=("n",))


@implements(int8_rms_norm)
def run(a: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """See `mq_ao.ops.int8_rms_norm.int8_rms_norm`."""
    q, scale, total = int8_rms_norm.results(a)
    n, out = a.x.shape[-1], Grid.of(a, "out")
    size, count = triton.next_power_of_2(n), a.x.numel() // n
    if size > LARGEST_ROW:
        return by_reference(int8_rms_norm, a)
    if count == 0:
        return q, scale, total
    left, right = matrix(a.x), None if a.residual is None else matrix(a.residual)
    rows = max(1, TILE // size)
    (long_rows if size > LONG else short_rows).launch(
        lambda _: (triton.cdiv(count, rows),),
        left,
        right,
        None if a.weight is None else a.weight.contiguous(),
        q,
        scale if out.scale is None else None,
        None if right is None else total,
        count,
        n,
        left.stride(0),
        0 if right is None else right.stride(0),
        float(a.eps),
        *rounded(out),
        ADDED=right is not None,
        WEIGHTED=a.weight is not None,
        PER_TOKEN=out.scale is None,
        ROWS=rows,
        SIZE=size,
    )
    return q, scale, total


def examples() -> Iterator[tuple[Any, ...]]:
    """Widths of published models, with and without a residual, and both roundings."""
    for n in (768, 2560, 5120):
        x, weight = torch.empty(4, n, device="meta"), torch.empty(n, device="meta")
        yield x, x, weight, 1e-5
    yield x, None, weight, 1e-5, 0.1, 3
