"""Our operators in terms of those that every ExecuTorch runtime has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.nn import functional

from mq_ao.ops import hadamard_matrix

mq = torch.ops.mq_ao


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.causal_conv1d`."""
    channels, taps = weight.shape
    padded = torch.cat([initial_state, x], dim=1)
    y = functional.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), bias, groups=channels).transpose(1, 2)
    last_state = padded[:, padded.shape[1] - (taps - 1) :]
    return (y if activation is None else y * torch.sigmoid(y)), last_state


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.selective_scan`; one group of B and C."""
    dt = delta if delta_bias is None else delta + delta_bias
    if delta_softplus:
        # log(1 + e^x) in operators that XNNPACK has.
        dt = torch.relu(dt) + torch.log(torch.exp(-torch.abs(dt)) + 1)
    h = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state

    def step(state: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        dt_t, dtu_t, b_t, c_t = now
        state = torch.exp(dt_t.unsqueeze(-1) * A) * state + dtu_t.unsqueeze(-1) * b_t.unsqueeze(1)
        return state, torch.matmul(state, c_t.unsqueeze(-1)).squeeze(-1)

    def copied(state: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        # What a step gives must not share memory with what it carries.
        state, y = step(state, now)
        return state.clone(), y.clone()

    operands = (dt, dt * u, B, C)
    if isinstance(u.shape[1], int) and u.shape[1] == 1:
        h, y = step(h, tuple(value.squeeze(1) for value in operands))
        y = y.unsqueeze(1)
    else:
        h, outputs = scan(copied, h, tuple(value.transpose(0, 1).contiguous() for value in operands))
        y = outputs.transpose(0, 1)
    return (y if D is None else y + D * u), h


def hadamard(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """See `mq_ao.ops.hadamard`: two products with small matrices, whose Kronecker product is the rotation."""
    if scale is not None:
        x = x * scale
    order, power = hadamard_matrix.factor(x.shape[-1])
    inner = (hadamard_matrix.sylvester(power) * x.shape[-1] ** -0.5).to(x.dtype)
    rows = x.unflatten(-1, (order, power)) @ inner
    outer = hadamard_matrix.base(order).to(x.dtype)
    return (rows.transpose(-1, -2) @ outer).transpose(-1, -2).flatten(-2)


OPERATORS: Mapping[Any, Callable[..., Any]] = {
    mq.causal_conv1d.default: causal_conv1d,
    mq.selective_scan.default: selective_scan,
    mq.hadamard.default: hadamard,
}
"""What takes the place of each of our operators."""
