"""`mq_ao::int8_conv_step_` and `int8_scan_step_`: one decode step of a linear and of what reads its output, for GPUs.

Each stands for two operators and a copy of the carried state, which it overwrites: in_proj and the convolution, dt_proj
and the selective scan. What lies between the two moves nowhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mq_ao.ops import causal_conv1d, int8_linear, library, qcausal_conv1d, qselective_scan
from mq_ao.ops.grids import output_dtype
from mq_ao.ops.library import require

mq = torch.ops.mq_ao


def _check_step(name: str, q: Tensor, state_name: str, state: Tensor, dtype: torch.dtype) -> None:
    require(q.dim() == 3, f"{name}: q must be (batch, 1, K), it has {q.dim()} dimensions.")
    require(q.shape[1] == 1, f"{name} takes one step, q (batch, 1, K), not {q.shape[1]} of them.")
    require(state.dtype == dtype, f"{name}: {state_name} must be {dtype}, it is {state.dtype}.")


def fake_conv_step(
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
    """Checks the operands of `int8_conv_step_`, and gives empty results."""
    _check_step("int8_conv_step_", q, "conv_state", conv_state, torch.float32)
    pieces = int8_linear.fake_pieces(
        q, token_scale, weight, scale, correction, bias, sizes, out_scales, out_zero_points, group_size
    )
    require(
        0 <= piece < len(sizes) and out_scales[piece] > 0,
        f"int8_conv_step_: the convolution reads piece {piece}, which must be one of {len(sizes)} and rounded.",
    )
    x, grid = pieces[piece], (out_scales[piece], out_zero_points[piece])
    causal_conv1d.check_shapes(x, conv_weight, conv_bias, conv_state, activation)
    qcausal_conv1d._check(x, *grid, conv_weight, conv_weight_scale, activation, conv_out_scale, conv_out_zero_point)
    given = list(pieces)
    if conv_out_scale is None:
        given[piece] = x.new_empty(x.shape, dtype=torch.float32)
    first, second, third = given
    return first, second, third


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
    """The operators `int8_linears`, and `qcausal_conv1d_` of one piece, which overwrites `conv_state`.

    Args:
        q: int8 (batch, 1, K).
        token_scale, weight, scale, correction, bias, sizes, out_scales, out_zero_points, group_size: as in
            `int8_linears`.
        piece: the place of the piece that the convolution reads; its scale is not 0.
        conv_weight: (size, d_conv) int8.
        conv_weight_scale: (size,) float32.
        conv_bias: (size,) float32, or None.
        conv_state: (batch, d_conv - 1, size) float32, the inputs before this one, oldest first; it is overwritten.
        activation: None or "silu".
        conv_out_scale: None for a float32 output of the convolution; else it is rounded to int8.
        conv_out_zero_point: within -128..127.

    Returns:
        The three pieces of `int8_linears`, in the place of one of which is the convolution's output (batch, 1, size).

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above; the state is as it was.
    """
    operands = (
        q,
        token_scale,
        weight,
        scale,
        correction,
        bias,
        sizes,
        out_scales,
        out_zero_points,
        group_size,
    )
    taps: list[Any] = [
        conv_weight,
        conv_weight_scale,
        conv_bias,
        conv_state,
        activation,
        conv_out_scale,
        conv_out_zero_point,
    ]
    fake_conv_step(*operands, piece, *taps)
    given = list(mq.int8_linears(*operands))
    given[piece] = mq.qcausal_conv1d_(given[piece], out_scales[piece], out_zero_points[piece], *taps)
    first, second, third = given
    return first, second, third


library.define(
    "int8_conv_step_",
    "(Tensor q, Tensor? token_scale, Tensor weight, Tensor scale, Tensor? correction, Tensor? bias, int[] sizes, "
    "float[] out_scales, int[] out_zero_points, int group_size, int piece, Tensor conv_weight, "
    "Tensor conv_weight_scale, Tensor? conv_bias, Tensor(a!) conv_state, str? activation, float? conv_out_scale, "
    "int conv_out_zero_point) -> (Tensor first, Tensor second, Tensor third)",
    fake=fake_conv_step,
    reference=int8_conv_step_,
)


def fake_scan_step(
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
    """Checks the operands of `int8_scan_step_`, and gives an empty result."""
    _check_step("int8_scan_step_", q, "state", state, torch.float32 if state_scale is None else torch.int8)
    delta = int8_linear.fake(q, None, weight, scale, correction, bias, delta_scale, delta_zero_point)
    qselective_scan._check(
        (u, u_scale, u_zero_point),
        (delta, delta_scale, delta_zero_point),
        A,
        (B, B_scale, B_zero_point),
        (C, C_scale, C_zero_point),
        D,
        delta_bias,
        state,
        state_scale,
        out_scale,
        out_zero_point,
    )
    return delta.new_empty(delta.shape, dtype=output_dtype(u, out_scale))


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
    """The operators `int8_linear`, rounded, and `qselective_scan_` with it as delta, which overwrites `state`.

    Args:
        q: int8 (batch, 1, dt_rank).
        weight: int8 (channels, dt_rank).
        scale: float32 (channels,).
        correction, bias: as in `int8_linear`.
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
    linear, grid = (weight, scale, correction, bias), (delta_scale, delta_zero_point)
    first, second = (u, u_scale, u_zero_point), (A, B, B_scale, B_zero_point, C, C_scale, C_zero_point)
    rest = (D, delta_bias, delta_softplus, state, state_scale, out_scale, out_zero_point)
    everything: list[Any] = [q, *linear, *grid, *first, *second, *rest]
    fake_scan_step(*everything)
    delta = mq.int8_linear(q, None, *linear, *grid)
    return mq.qselective_scan_(*first, delta, *grid, *second, *rest)


library.define(
    "int8_scan_step_",
    "(Tensor q, Tensor weight, Tensor scale, Tensor? correction, Tensor? bias, float delta_scale, "
    "int delta_zero_point, Tensor u, float u_scale, int u_zero_point, Tensor A, Tensor B, float B_scale, "
    "int B_zero_point, Tensor C, float C_scale, int C_zero_point, Tensor? D, Tensor? delta_bias, "
    "bool delta_softplus, Tensor(a!) state, Tensor? state_scale, float? out_scale, int out_zero_point) -> Tensor y",
    fake=fake_scan_step,
    reference=int8_scan_step_,
)
