"""`mq_ao::ssd_scan` and `mq_ao::qssd_scan` on CUDA: what `ssd_kernels` compute, launched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from mq_ao.ops.gpu_tuning import SSD_CHUNK
from mq_ao.ops.grids import BYTES
from mq_ao.ops.qssd_scan import _fake as _qfake
from mq_ao.ops.ssd_scan import _fake
from mq_ao.ops.triton.carry import carry
from mq_ao.ops.triton.launch import blank
from mq_ao.ops.triton.operands import destination, float32, on_grid, rows
from mq_ao.ops.triton.rounding import rounded
from mq_ao.ops.triton.ssd_kernels import add_up, add_up_float32, outputs, outputs_float32, step

_Grid = tuple[Tensor, float, int]  # an operand with its scale and zero point


def _sequences(seq_idx: Tensor | None) -> Tensor | None:
    """Sequences counted from 0 in each row, int32: their numbers may come again, and these do not."""
    if seq_idx is None:
        return None
    changes = torch.zeros(seq_idx.shape, dtype=torch.int32, device=seq_idx.device)
    changes[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return changes.cumsum(1, dtype=torch.int32)


def _launch(
    y: Tensor,
    last_state: Tensor,
    x: _Grid,
    dt: _Grid,
    A: Tensor,
    B: _Grid,
    C: _Grid,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    out_scale: float | None,
    out_zero_point: int,
) -> None:
    """Writes y and the last state."""
    batch, length, heads, headdim = x[0].shape
    groups, d_state = B[0].shape[2:]
    values, steps, b, c = (rows(grid[0]) for grid in (x, dt, B, C))
    strides = [operand.stride(0) for operand in (values, steps, b, c)]
    skip = float32(D)
    skip_strides = (0, 0) if skip is None else (skip.stride(0), skip.stride(1) if skip.dim() == 2 else 0)
    A = A.to(torch.float32).contiguous()
    bias, start = float32(dt_bias), float32(initial_state)
    limits = (float(dt_min), float("inf") if dt_max is None else float(dt_max))
    x_grid, dt_grid, b_grid, c_grid = (on_grid(*grid) for grid in (x, dt, B, C))
    out_grid = rounded(out_scale, out_zero_point)
    grids = (*dt_grid, *limits, *x_grid, *b_grid)
    constants: dict[str, Any] = {"HEADDIM": headdim, "D_STATE": d_state, "SOFTPLUS": dt_softplus}
    if length == 1:
        step.launch(
            lambda meta: (triton.cdiv(headdim, meta["BLOCK_P"]), heads, batch),
            *(values, steps, b, c, A, skip, bias, start, last_state, y, heads, heads // groups),
            *(*strides, *skip_strides, *grids, *c_grid, *out_grid),
            **constants,
            N=triton.next_power_of_2(d_state),
        )
        return
    constants["CHUNK"] = SSD_CHUNK
    chunks = triton.cdiv(length, SSD_CHUNK)
    states = A.new_empty(batch, chunks, heads, headdim, d_state)
    totals = A.new_empty(batch, chunks, heads)
    ids = _sequences(seq_idx)
    sizes = (heads, length, heads // groups)

    def blocks(meta: Mapping[str, Any]) -> int:
        return chunks * int(triton.cdiv(headdim, meta["BLOCK_P"]))

    exact = all(operand.dtype in (*BYTES, torch.bfloat16) for operand in (values, b, c))
    (add_up if exact else add_up_float32).launch(
        lambda meta: (blocks(meta) * triton.cdiv(d_state, meta["BLOCK_N"]), heads, batch),
        *(values, steps, b, A, bias, ids, states, totals, *sizes, *strides[:3], *grids),
        **constants,
    )
    carry(states, totals, None, start, last_state)
    (outputs if exact else outputs_float32).launch(
        lambda meta: (blocks(meta), heads, batch),
        *(values, steps, b, c, A, skip, bias, ids, states, y, *sizes),
        *(*strides, *skip_strides, *grids, *c_grid, *out_grid),
        **constants,
    )


def run(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    *,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.ssd_scan.ssd_scan`; the last state goes `into` a tensor if it is given and suits."""
    rest = (D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx)
    y, last_state = _fake(x, dt, A, B, C, *rest)
    last_state = destination(last_state, into, x.shape[1])
    if x.dtype == torch.float64:
        y, last_state = torch.ops.mq_ao.ssd_scan_reference(x, dt, A, B, C, *rest)
    elif last_state.numel():
        _launch(y, last_state, (x, 1.0, 0), (dt, 1.0, 0), A, (B, 1.0, 0), (C, 1.0, 0), *rest, None, 0)
    return y, last_state


def run_quantized(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    dt: Tensor,
    dt_scale: float,
    dt_zero_point: int,
    A: Tensor,
    B: Tensor,
    B_scale: float,
    B_zero_point: int,
    C: Tensor,
    C_scale: float,
    C_zero_point: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    *,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.qssd_scan.qssd_scan`; the last state goes `into` a tensor if it is given and suits."""
    values, steps = (x, x_scale, x_zero_point), (dt, dt_scale, dt_zero_point)
    b, c = (B, B_scale, B_zero_point), (C, C_scale, C_zero_point)
    rest: list[Any] = [D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, out_scale, out_zero_point]
    y, last_state = _qfake(*values, *steps, A, *b, *c, *rest)
    last_state = destination(last_state, into, x.shape[1])
    if last_state.numel():
        _launch(y, last_state, values, steps, A, b, c, *rest)
    return y, last_state


def _arguments(dtype: torch.dtype, length: int, heads: int, headdim: int, d_state: int) -> tuple[Tensor, ...]:
    """x, dt, A, B and C."""

    make = partial(blank, dtype=dtype)
    A, matrix = make(heads, dtype=torch.float32), (1, length, 1, d_state)
    return make(1, length, heads, headdim), make(1, length, heads), A, make(*matrix), make(*matrix)


def examples() -> Iterator[tuple[Any, ...]]:
    """bfloat16 decode and prefill with everything; float32 prefill with sequences."""
    for length in (1, 2048):
        operands = _arguments(torch.bfloat16, length, 80, 64, 128)
        A = operands[2]
        state = torch.empty(1, 80, 64, 128, device="meta")
        yield *operands, A, A, True, 0.0, None, state
    seq_idx = torch.empty(1, 2048, dtype=torch.int32, device="meta")
    yield *_arguments(torch.float32, 2048, 24, 64, 128), None, None, True, 0.0, None, None, seq_idx


def quantized_examples() -> Iterator[tuple[Any, ...]]:
    """int8 decode and prefill: bare, and with everything that the epilogue can have."""
    for length in (1, 2048):
        x, dt, A, B, C = _arguments(torch.int8, length, 80, 64, 128)
        grids = (x, 0.1, 3, dt, 0.1, 3, A, B, 0.1, 3, C, 0.1, 3)
        yield *grids, None, None, True
        state = torch.empty(1, 80, 64, 128, device="meta")
        yield *grids, A, A, True, 0.0, None, state, None, 0.1, 3
