"""`mq_ao::int8_conv_step_` and `int8_scan_step_`: one decode step of a linear and of what reads its output, for GPUs.

Each stands for two operators and a copy of the carried state, which it overwrites: in_proj and the convolution, dt_proj
and the selective scan. What lies between the two moves nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.causal_conv1d import check_shapes
from mq_ao.ops.library import require
from mq_ao.ops.linear_rows import linear_rows, linears_rows
from mq_ao.ops.operator import Operands, operator
from mq_ao.ops.qcausal_conv1d import qcausal_conv1d
from mq_ao.ops.qselective_scan import qselective_scan

mq = torch.ops.mq_ao


def _check_step(name: str, q: Tensor, state_name: str, state: Tensor, dtype: torch.dtype) -> None:
    require(q.dim() == 3, f"{name}: q must be (batch, 1, K), it has {q.dim()} dimensions.")
    require(q.shape[1] == 1, f"{name} takes one step, q (batch, 1, K), not {q.shape[1]} of them.")
    require(state.dtype == dtype, f"{name}: {state_name} must be {dtype}, it is {state.dtype}.")


def _conv_step(a: Operands) -> tuple[Tensor, Tensor, Tensor]:
    _check_step("int8_conv_step_", a.q, "conv_state", a.conv_state, torch.float32)
    given, piece = list(linears_rows.results(a)), a.piece
    require(
        0 <= piece < len(a.sizes) and a.out_scales[piece] > 0,
        f"int8_conv_step_: the convolution reads piece {piece}, which must be one of {len(a.sizes)} and rounded.",
    )
    conv = a.but(
        x=given[piece],
        x_scale=a.out_scales[piece],
        x_zero_point=a.out_zero_points[piece],
        weight=a.conv_weight,
        weight_scale=a.conv_weight_scale,
        bias=a.conv_bias,
        initial_state=a.conv_state,
        out_scale=a.conv_out_scale,
        out_zero_point=a.conv_out_zero_point,
    )
    check_shapes(conv)
    given[piece], _ = qcausal_conv1d.results(conv)
    first, second, third = given
    return first, second, third


@operator(results=_conv_step, changes=("conv_state",))
def int8_conv_step_(
    q: Tensor,
    token_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    sizes: list[int],
    out_scales: list[float],
    out_zero_points: list[int],
    group_size: int,
    piece: int,
    conv_weight: Tensor,
    conv_weight_scale: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    activation: str | None,
    conv_out_scale: float | None,
    conv_out_zero_point: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operators `linears_rows`, and `qcausal_conv1d_` of one piece, which overwrites `conv_state`.

    Args:
        q: int8 (batch, 1, K).
        token_scale, weight, scale, correction, bias, sizes, out_scales, out_zero_points, group_size: as in
            `linears_rows`.
        piece: the place of the piece that the convolution reads; its scale is not 0.
        conv_weight: (size, d_conv) int8.
        conv_weight_scale: (size,) float32.
        conv_bias: (size,) float32, or None.
        conv_state: (batch, d_conv - 1, size) float32, the inputs before this one, oldest first; it is overwritten.
        activation: None or "silu".
        conv_out_scale: None for a float32 output of the convolution; else it is rounded to int8.
        conv_out_zero_point: within -128..127.

    Returns:
        The three pieces of `linears_rows`, in the place of one of which is the convolution's output (batch, 1, size).

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above; the state is as it was.
    """
    linear = (q, token_scale, weight, scale, correction, bias)
    given = list(linears_rows(*linear, sizes, out_scales, out_zero_points, group_size))
    given[piece] = mq.qcausal_conv1d_(
        *(given[piece], out_scales[piece], out_zero_points[piece], conv_weight, conv_weight_scale, conv_bias),
        *(conv_state, activation, conv_out_scale, conv_out_zero_point),
    )
    first, second, third = given
    return first, second, third


def _scan_step(a: Operands) -> Tensor:
    _check_step("int8_scan_step_", a.q, "state", a.state, torch.float32 if a.state_scale is None else torch.int8)
    out = {"out_scale": a.delta_scale, "out_zero_point": a.delta_zero_point}
    delta = linear_rows.results(a.but(token_scale=None, group_size=0, **out))
    y, _ = qselective_scan.results(a.but(delta=delta, initial_state=a.state))
    return y


@operator(results=_scan_step, changes=("state",))
def int8_scan_step_(
    q: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    delta_scale: float,
    delta_zero_point: int,
    u: Tensor,
    u_scale: float,
    u_zero_point: int,
    A: Tensor,
    B: Tensor,
    B_scale: float,
    B_zero_point: int,
    C: Tensor,
    C_scale: float,
    C_zero_point: int,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state: Tensor,
    state_scale: Tensor | None,
    out_scale: float | None,
    out_zero_point: int,
) -> Tensor:
    """The operators `linear_rows`, rounded, and `qselective_scan_` with it as delta, which overwrites `state`.

    Args:
        q: int8 (batch, 1, dt_rank).
        weight: int8 (channels, dt_rank).
        scale: float32 (channels,).
        correction, bias: as in `linear_rows`.
        delta_scale, delta_zero_point: the grid of delta, int8.
        u, A, B, C, D, delta_bias, delta_softplus, out_scale, out_zero_point: as in `qselective_scan`, of one step; u, B
            and C with their grids.
        state: (batch, channels, d_state), float32, or int8 with `state_scale`; it is overwritten.
        state_scale: (channels, d_state) float32, or None.

    Returns:
        y (batch, 1, channels), as of `qselective_scan`.

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above; the state is as it was.
    """
    delta = linear_rows(q, None, weight, scale, correction, bias, delta_scale, delta_zero_point)
    return mq.qselective_scan_(
        *(u, u_scale, u_zero_point, delta, delta_scale, delta_zero_point, A, B, B_scale, B_zero_point),
        *(C, C_scale, C_zero_point, D, delta_bias, delta_softplus, state, state_scale, out_scale, out_zero_point),
    )
