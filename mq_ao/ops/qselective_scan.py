"""`mq_ao::qselective_scan`: the recurrence of `mq_ao::selective_scan` on 8-bit operands (docs/method.md, section 5).

Operands, outputs and the carried state are read and written as integers; softplus, exponential and recurrence are
float32. Step sizes are quantized before the softplus, never after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.grids import Grid, check_grids, dequantize, output_dtype, requantize
from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, like, operator
from mq_ao.ops.selective_scan import check_shapes, selective_scan
from mq_ao.ops.state import quantize_state


def _check_state(a: Operands) -> None:
    initial_state, state_scale = a.initial_state, a.state_scale
    if state_scale is not None:
        require(
            state_scale.dtype == torch.float32 and state_scale.dim() == 2,
            f"qselective_scan: state_scale must be float32 (channels, d_state), it is {state_scale.dtype} "
            f"{tuple(state_scale.shape)}.",
        )
        for size, wanted in zip(state_scale.shape, a.A.shape, strict=True):
            require(
                size == wanted,
                f"qselective_scan: state_scale must have A's shape {tuple(a.A.shape)}, it has "
                f"{tuple(state_scale.shape)}.",
            )
    if initial_state is not None:
        good = initial_state.is_floating_point() if state_scale is None else initial_state.dtype == torch.int8
        require(
            good,
            "qselective_scan: initial_state must be int8 with state_scale and floating point without, it is "
            f"{initial_state.dtype}.",
        )


def _results(a: Operands) -> tuple[Tensor, Tensor]:
    out = check_grids("qselective_scan", a, ("u", "delta", "B", "C"))
    check_shapes(a)
    _check_state(a)
    state_dtype = torch.float32 if a.state_scale is None else torch.int8
    return like(a.u, dtype=output_dtype(a.u, out)), like(a.u, (a.u.shape[0], *a.A.shape), state_dtype)


@operator(results=_results)
def qselective_scan(
    u: Tensor,
    u_scale: float,
    u_zero_point: int,
    delta: Tensor,
    delta_scale: float,
    delta_zero_point: int,
    A: Tensor,
    B: Tensor,
    B_scale: float,
    B_zero_point: int,
    C: Tensor,
    C_scale: float,
    C_zero_point: int,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    state_scale: Tensor | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of the dequantized operands, then rounding.

    Each of u, delta, B and C is uint8 or int8, of value `(q - zero_point) * scale` in float32, or float32, when its
    scale and zero point are not looked at. Zero points lie within the operand's dtype.

    Args:
        u: (batch, length, channels).
        u_scale, u_zero_point: grid of u; the following operands' likewise.
        delta: like u, step sizes before bias and softplus.
        delta_scale, delta_zero_point: grid of delta.
        A: (channels, d_state), negative real, float32.
        B: (batch, length, d_state), or (batch, length, groups, d_state) where channel c reads group
            `c // (channels // groups)`.
        B_scale, B_zero_point: grid of B.
        C: shaped like B.
        C_scale, C_zero_point: grid of C.
        D: (channels,), the skip connection; it multiplies the dequantized u.
        delta_bias: (channels,), added to delta before the softplus.
        delta_softplus: whether softplus is applied to delta.
        initial_state: (batch, channels, d_state), zeros if None: int8, of value `q * state_scale`, with `state_scale`;
            floating point without.
        state_scale: (channels, d_state) float32, positive: the step of each carried state. None for float32 states.
        out_scale: None for float32 output; else y is rounded as by `quantized_decomposed.quantize_per_tensor`.
        out_zero_point: within y's dtype.

    Returns:
        y (batch, length, channels), float32, or with `out_scale` int8 where u is int8 and else uint8; and the state
        after the last step (batch, channels, d_state), float32, or int8 with `state_scale`. Both contiguous.

    Raises:
        MqAoError: types, shapes or grids do not fit together, or the length is 0.
    """
    x, dt = dequantize(u, Grid(u_scale, u_zero_point)), dequantize(delta, Grid(delta_scale, delta_zero_point))
    b, c = dequantize(B, Grid(B_scale, B_zero_point)), dequantize(C, Grid(C_scale, C_zero_point))
    state = initial_state
    if initial_state is not None and state_scale is not None:
        state = initial_state * state_scale
    y, last_state = selective_scan.reference(x, dt, A.to(torch.float32), b, c, D, delta_bias, delta_softplus, state)
    if state_scale is not None:
        last_state = quantize_state.reference(last_state, state_scale)
    out = Grid(out_scale, out_zero_point)
    return requantize(y, output_dtype(u, out), out), last_state
