"""`mq_ao::selective_scan` and `mq_ao::qselective_scan` on CUDA: what `scan_kernels` compute, launched.

Where one walk over time leaves most of a GPU idle, time is cut into chunks that are scanned side by side, twice: the
first time from zero and without outputs, to learn what each adds to the state (its decay is that of the sum of its step
sizes), and after `carry` from the states that they really start from. That costs twice the arithmetic and reads u,
delta and B twice, and needs no communication between programs; `tl.associative_scan` over time would hold decays and
inputs of all states and steps in registers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from mq_ao.ops.gpu_tuning import scan_chunk
from mq_ao.ops.grids import FLOATS, Grid
from mq_ao.ops.operator import Operands, by_reference, implements
from mq_ao.ops.qselective_scan import qselective_scan
from mq_ao.ops.selective_scan import selective_scan
from mq_ao.ops.triton.carry import carry
from mq_ao.ops.triton.launch import blank
from mq_ao.ops.triton.operands import destination, float32, on_grid, rows
from mq_ao.ops.triton.rounding import rounded
from mq_ao.ops.triton.scan_kernels import channels_of, scan, step

_MULTIPROCESSORS = 64  # of the chip that is thought of where there is none


def _launch(
    a: Operands,
    y: Tensor,
    last_state: Tensor,
    grids: Sequence[Grid] = (FLOATS,) * 4,
    state_scale: Tensor | None = None,
    out: Grid = FLOATS,
) -> None:
    """Writes y and the last state; `grids` are those of u, delta, B and C."""
    batch, length, channels = a.u.shape
    d_state = a.A.shape[1]
    N = triton.next_power_of_2(d_state)
    groups = a.B.shape[2] if a.B.dim() == 4 else 1
    given = (a.u, a.delta, a.B, a.C)
    operands = [rows(operand) for operand in given]
    steps = [value for operand, grid in zip(given, grids, strict=True) for value in on_grid(operand, grid)]
    A = a.A.to(torch.float32).contiguous()
    D, delta_bias, scale = (float32(x) for x in (a.D, a.delta_bias, state_scale))
    start = float32(a.initial_state) if scale is None or a.initial_state is None else a.initial_state.contiguous()
    strides = (channels // groups, *(operand.stride(0) for operand in operands), *steps, *rounded(out))
    constants = {"D_STATE": d_state, "N": N, "GROUPED": groups > 1, "SOFTPLUS": a.delta_softplus}

    def blocks(meta: Mapping[str, Any]) -> int:
        return int(triton.cdiv(channels, channels_of(meta["ELEMENTS"], N)))

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

    chunk = scan_chunk(batch, length, channels, _multiprocessors(A.device))
    if chunk == length:
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


@implements(selective_scan, into=None)
def run(a: Operands) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.selective_scan.selective_scan`; the last state goes `into` a tensor if it is given and suits."""
    y, last_state = selective_scan.results(a)
    last_state = destination(last_state, a.into, a.u.shape[1])
    if a.u.dtype == torch.float64:
        return by_reference(selective_scan, a)
    if last_state.numel():
        _launch(a, y, last_state)
    return y, last_state


@implements(qselective_scan, into=None)
def run_quantized(a: Operands) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.qselective_scan.qselective_scan`; the last state goes `into` a tensor if it is given and suits."""
    y, last_state = qselective_scan.results(a)
    last_state = destination(last_state, a.into, a.u.shape[1])
    if last_state.numel():
        grids = [Grid.of(a, name) for name in ("u", "delta", "B", "C")]
        _launch(a, y, last_state, grids, a.state_scale, Grid.of(a, "out"))
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
