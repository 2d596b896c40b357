"""`mq_ao::int8_gate`, `mq_ao::gate` and `mq_ao::hadamard` on CUDA: a program takes whole rows through all steps.

Rows are read and written once; the rotation's partial results stay in registers and shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mq_ao.ops import gate as float_gate
from mq_ao.ops import hadamard as float_hadamard
from mq_ao.ops.int8_gate import fake
from mq_ao.ops.triton.launch import Config, Kernel
from mq_ao.ops.triton.rotation import Rotation, rotate_rows, rotation
from mq_ao.ops.triton.rounding import rounded, rows_to_int8, write
from mq_ao.ops.triton.rows import LARGEST_ROW, LONG, TILE, matrix

mq = torch.ops.mq_ao


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


def run(
    y: Tensor,
    y_scale: float,
    y_zero_point: int,
    z: Tensor,
    z_scale: float,
    z_zero_point: int,
    s: Tensor | None,
    hadamard: bool,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.int8_gate.int8_gate`."""
    operands = (y, y_scale, y_zero_point, z, z_scale, z_zero_point, s, hadamard, out_scale, out_zero_point)
    q, scale = fake(*operands)
    plan = _plan(y, hadamard)
    if plan is None:
        return mq.int8_gate_reference(*operands)
    grids = (float(y_scale), float(y_zero_point), float(z_scale), float(z_zero_point))
    rounding = rounded(out_scale, out_zero_point)
    _launch(y, z, s, q, scale if out_scale is None else None, plan, hadamard, grids, rounding)
    return q, scale


def run_gate(y: Tensor, z: Tensor, s: Tensor | None = None, hadamard: bool = False) -> Tensor:
    """See `mq_ao.ops.gate.gate`."""
    out = float_gate.fake(y, z, s, hadamard)
    plan = _plan(y, hadamard)
    if plan is None:
        return mq.gate_reference(y, z, s, hadamard)
    _launch(y, z, s, out, None, plan, hadamard)
    return out


def run_hadamard(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """See `mq_ao.ops.hadamard.hadamard`."""
    out = float_hadamard.fake(x, scale)
    plan = _plan(x, True)
    if plan is None or torch.float64 in (x.dtype, None if scale is None else scale.dtype):
        return mq.hadamard_reference(x, scale)
    _launch(x, None, scale, out, None, plan, True)
    return out


def _plan(x: Tensor, rotated: bool) -> Rotation | None:
    """The sizes of a row in a program, rotated or not; None if it is too large."""
    n = x.shape[-1]
    if rotated:
        return rotation(n)
    size = triton.next_power_of_2(n)
    return Rotation(n, n, size, 1, 1) if size <= LARGEST_ROW else None


def _launch(
    y: Tensor,
    z: Tensor | None,
    s: Tensor | None,
    out: Tensor,
    token_scale: Tensor | None,
    plan: Rotation,
    rotated: bool,
    grids: tuple[float, float, float, float] = (1.0, 0.0, 1.0, 0.0),
    rounding: tuple[float, float] = (1.0, 0.0),
) -> None:
    n = plan.order
    count = out.numel() // n
    if count == 0:
        return
    left, right = matrix(y), None if z is None else matrix(z)
    rows = max(triton.next_power_of_2(plan.rows) if rotated else 1, TILE // plan.size)
    constants: dict[str, Any] = {
        "GATED": z is not None,
        "SMOOTH": s is not None,
        "ROTATED": rotated,
        "PER_TOKEN": token_scale is not None,
        "ROWS": rows,
        "B": plan.padded,
        "FIRST": plan.first,
        "SECOND": plan.second,
    }
    kernel = long_rows if rows * plan.size > LONG else short_rows
    kernel.launch(
        lambda _: (triton.cdiv(count, rows),),
        left,
        right,
        None if s is None else s.contiguous(),
        plan.matrix(y.device) if rotated else None,
        out,
        token_scale,
        count,
        n,
        left.stride(0),
        0 if right is None else right.stride(0),
        *grids,
        n**-0.5,
        *rounding,
        **constants,
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
