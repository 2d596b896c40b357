"""`mq_ao::int8_gate`, `mq_ao::gate` and `mq_ao::hadamard` on CUDA: a program takes whole rows through all steps.

Rows are read and written once; the rotation's partial results stay in registers and shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mq_ao.ops.gate import gate
from mq_ao.ops.grids import FLOATS, Grid
from mq_ao.ops.hadamard import hadamard
from mq_ao.ops.int8_gate import int8_gate
from mq_ao.ops.operator import Operands, by_reference, implements
from mq_ao.ops.triton.launch import Config, Kernel
from mq_ao.ops.triton.operands import on_grid
from mq_ao.ops.triton.rotation import Rotation, rotate_rows, rotation
from mq_ao.ops.triton.rounding import rounded, rows_to_int8, write
from mq_ao.ops.triton.rows import LARGEST_ROW, LONG, TILE, matrix


@triton.jit
def _load(x, at, inside, scale, zero_point):
    """Values of 8-bit or floating operands, 0 outside."""
    values = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if x.dtype.element_ty == tl.int8:
        values = tl.where(inside, (values - zero_point) * scale, 0.0)
    return values


@triton.jit
def _gated_rows(
    y,
    z,
    s,
    base_matrix,
    out,
    token_scale,
    rows,
    n,
    y_stride,
    z_stride,
    y_scale,
    y_zero_point,
    z_scale,
    z_zero_point,
    norm,
    out_inverse,
    out_zero_point,
    GATED: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROTATED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    B: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Rows of y: gated by z or, without it, scaled by s; rotated; rounded if `out` is int8."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, B * FIRST * SECOND)
    inside = (row[:, None] < rows) & (column[None, :] < n)
    first = row[:, None].to(tl.int64)
    x = _load(y, first * y_stride + column[None, :], inside, y_scale, y_zero_point)
    if SMOOTH:
        smooth = tl.load(s + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate = _load(z, first * z_stride + column[None, :], inside, z_scale, z_zero_point)
        x = x * (gate * tl.sigmoid(smooth * gate if SMOOTH else gate))
    elif SMOOTH:
        x = x * smooth
    if ROTATED:
        x = rotate_rows(x, base_matrix, norm, ROWS, B, FIRST, SECOND)
    at = out + first * n + column[None, :]
    if PER_TOKEN:
        q, scale = rows_to_int8(x)
        tl.store(at, q, mask=inside)
        tl.store(token_scale + row, scale, mask=row < rows)
    else:
        write(at, x, inside, out_inverse, out_zero_point)


short_rows = Kernel(_gated_rows, (Config(4, 1), Config(2, 1), Config(8, 1)), key=("n",))
long_rows = Kernel(_gated_rows, (Config(8, 1), Config(16, 1)), key=("n",))


@implements(int8_gate)
def run(a: Operands) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.int8_gate.int8_gate`."""
    q, scale = int8_gate.results(a)
    plan, out = _plan(a.y, a.hadamard), Grid.of(a, "out")
    if plan is None:
        return by_reference(int8_gate, a)
    rows = _Rows(a.y, a.z, a.s, Grid.of(a, "y"), Grid.of(a, "z"))
    _launch(rows, q, scale if out.scale is None else None, plan, a.hadamard, out)
    return q, scale


@implements(gate)
def run_gate(a: Operands) -> Tensor:
    """See `mq_ao.ops.gate.gate`."""
    out = gate.results(a)
    plan = _plan(a.y, a.hadamard)
    if plan is None:
        return by_reference(gate, a)
    _launch(_Rows(a.y, a.z, a.s), out, None, plan, a.hadamard)
    return out


@implements(hadamard)
def run_hadamard(a: Operands) -> Tensor:
    """See `mq_ao.ops.hadamard.hadamard`."""
    out = hadamard.results(a)
    plan = _plan(a.x, True)
    if plan is None or torch.float64 in (a.x.dtype, None if a.scale is None else a.scale.dtype):
        return by_reference(hadamard, a)
    _launch(_Rows(a.x, None, a.scale), out, None, plan, True)
    return out


@dataclass(frozen=True)
class _Rows:
    """What the kernel reads: y, gated by z, or scaled by s."""

    y: Tensor
    z: Tensor | None
    s: Tensor | None
    y_grid: Grid = FLOATS
    z_grid: Grid = FLOATS


def _plan(x: Tensor, rotated: bool) -> Rotation | None:
    """The sizes of a row in a program, rotated or not; None if it is too large."""
    n = x.shape[-1]
    if rotated:
        return rotation(n)
    size = triton.next_power_of_2(n)
    return Rotation(n, n, size, 1, 1) if size <= LARGEST_ROW else None


def _launch(
    given: _Rows, result: Tensor, token_scale: Tensor | None, plan: Rotation, rotated: bool, out: Grid = FLOATS
) -> None:
    y, z, s, n = given.y, given.z, given.s, plan.order
    count = result.numel() // n
    if count == 0:
        return
    left, right = matrix(y), None if z is None else matrix(z)
    rows = max(triton.next_power_of_2(plan.rows) if rotated else 1, TILE // plan.size)
    kernel = long_rows if rows * plan.size > LONG else short_rows
    kernel.launch(
        lambda _: (triton.cdiv(count, rows),),
        left,
        right,
        None if s is None else s.contiguous(),
        plan.matrix(y.device) if rotated else None,
        result,
        token_scale,
        count,
        n,
        left.stride(0),
        0 if right is None else right.stride(0),
        *on_grid(y, given.y_grid),
        *on_grid(y if z is None else z, given.z_grid),
        n**-0.5,
        *rounded(out),
        GATED=z is not None,
        SMOOTH=s is not None,
        ROTATED=rotated,
        PER_TOKEN=token_scale is not None,
        ROWS=rows,
        B=plan.padded,
        FIRST=plan.first,
        SECOND=plan.second,
    )


def examples() -> Iterator[tuple[Any, ...]]:
    """Inner widths of published models; every way in which rows are rotated, and both roundings."""
    for n in (768, 1536, 3072, 5120):
        y, s = torch.empty(4, n, dtype=torch.int8, device="meta"), torch.empty(n, device="meta")
        yield y, 0.1, 3, y, 0.1, 5, s, True
    yield y, 0.1, 3, y, 0.1, 5, None, False, 0.1, 3
    wide = torch.empty(4, 2 * n, device="meta")
    yield wide[:, :n], 1.0, 0, wide[:, n:], 1.0, 0, s, True, 0.1, 3


def gate_examples() -> Iterator[tuple[Any, ...]]:
    """In float."""
    y, s = torch.empty(4, 5120, device="meta"), torch.empty(5120, device="meta")
    yield y, y, s, True
    yield y, y, None, False


def hadamard_examples() -> Iterator[tuple[Any, ...]]:
    """float32 and bfloat16, with and without a scale."""
    yield torch.empty(4, 3072, device="meta"), torch.empty(3072, device="meta")
    yield torch.empty(4, 5120, device="meta", dtype=torch.bfloat16), None
