"""`mq_ao::ssd_scan` and `mq_ao::qssd_scan` on CUDA: what `ssd_kernels` compute, launched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from mq_ao.ops.gpu_tuning import SSD_CHUNK
from mq_ao.ops.grids import BYTES, FLOATS, Grid
from mq_ao.ops.operator import Operands, by_reference, implements
from mq_ao.ops.qssd_scan import qssd_scan
from mq_ao.ops.ssd_scan import ssd_scan
from mq_ao.ops.triton.carry import carry
from mq_ao.ops.triton.launch import blank
from mq_ao.ops.triton.operands import destination, float32, on_grid, rows
from mq_ao.ops.triton.rounding import rounded
from mq_ao.ops.triton.ssd_kernels import add_up, add_up_float32, outputs, outputs_float32, step


def _sequences(seq_idx: Tensor | None) -> Tensor | None:
    """Sequences counted from 0 in each row, int32: their numbers may come again, and these do not."""
    if seq_idx is None:
        return None
    changes = torch.zeros(seq_idx.shape, dtype=torch.int32, device=seq_idx.device)
    changes[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return changes.cumsum(1, dtype=torch.int32)


def _launch(
    a: Operands, y: Tensor, last_state: Tensor, grids: Sequence[Grid] = (FLOATS,) * 4, out: Grid = FLOATS
) -> None:
    """Writes y and the last state; `grids` are those of x, dt, B and C."""
    batch, length, heads, headdim = a.x.shape
    groups, d_state = a.B.shape[2:]
    given = (a.x, a.dt, a.B, a.C)
    values, steps, b, c = (rows(operand) for operand in given)
    strides = [operand.stride(0) for operand in (values, steps, b, c)]
    skip = float32(a.D)
    skip_strides = (0, 0) if skip is None else (skip.stride(0), skip.stride(1) if skip.dim() == 2 else 0)
    A = a.A.to(torch.float32).contiguous()
    bias, start = float32(a.dt_bias), float32(a.initial_state)
    limits = (float(a.dt_min), float("inf") if a.dt_max is None else float(a.dt_max))
    x_grid, dt_grid, b_grid, c_grid = map(on_grid, given, grids)
    out_grid = rounded(out)
    on_grids = (*dt_grid, *limits, *x_grid, *b_grid)
    constants: dict[str, Any] = {"HEADDIM": headdim, "D_STATE": d_state, "SOFTPLUS": a.dt_softplus}
    if length == 1:
        step.launch(
            lambda meta: (triton.cdiv(headdim, meta["BLOCK_P"]), heads, batch),
            *(values, steps, b, c, A, skip, bias, start, last_state, y, heads, heads // groups),
            *(*strides, *skip_strides, *on_grids, *c_grid, *out_grid),
            **constants,
            N=triton.next_power_of_2(d_state),
        )
        return
    constants["CHUNK"] = SSD_CHUNK
    chunks = triton.cdiv(length, SSD_CHUNK)
    states = A.new_empty(batch, chunks, heads, headdim, d_state)
    totals = A.new_empty(batch, chunks, heads)
    ids = _sequences(a.seq_idx)
    sizes = (heads, length, heads // groups)

    def blocks(meta: Mapping[str, Any]) -> int:
        return chunks * int(triton.cdiv(headdim, meta["BLOCK_P"]))

    exact = all(operand.dtype in (*BYTES, torch.bfloat16) for operand in (values, b, c))
    (add_up if exact else add_up_float32).launch(
        lambda meta: (blocks(meta) * triton.cdiv(d_state, meta["BLOCK_N"]), heads, batch),
        *(values, steps, b, A, bias, ids, states, totals, *sizes, *strides[:3], *on_grids),
        **constants,
    )
    carry(states, totals, None, start, last_state)
    (outputs if exact else outputs_float32).launch(
        lambda meta: (blocks(meta), heads, batch),
        *(values, steps, b, c, A, skip, bias, ids, states, y, *sizes),
        *(*strides, *skip_strides, *on_grids, *c_grid, *out_grid),
        **constants,
    )


@implements(ssd_scan, into=None)
def run(a: Operands) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.ssd_scan.ssd_scan`; the last state goes `into` a tensor if it is given and suits."""
    y, last_state = ssd_scan.results(a)
    last_state = destination(last_state, a.into, a.x.shape[1])
    if a.x.dtype == torch.float64:
        return by_reference(ssd_scan, a)
    if last_state.numel():
        _launch(a, y, last_state)
    return y, last_state


@implements(qssd_scan, into=None)
def run_quantized(a: Operands) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.qssd_scan.qssd_scan`; the last state goes `into` a tensor if it is given and suits."""
    y, last_state = qssd_scan.results(a)
    last_state = destination(last_state, a.into, a.x.shape[1])
    if last_state.numel():
        _launch(a, y, last_state, [Grid.of(a, name) for name in ("x", "dt", "B", "C")], Grid.of(a, "out"))
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
