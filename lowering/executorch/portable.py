"""Our operators in terms of those that every ExecuTorch runtime has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mq_ao.compat.executorch import scan
from mq_ao.errors import MqAoError
from mq_ao.ops.causal_conv1d import causal_conv1d as convolution
from mq_ao.ops.operator import Operands, implements
from mq_ao.ops.selective_scan import selective_scan as recurrence

mq = torch.ops.mq_ao


@implements(convolution)
def causal_conv1d(a: Operands) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.causal_conv1d`, with the weight (channels, 1, d_conv) of `conv1d`."""
    x, state, (channels, _, taps) = a.x, a.initial_state, a.weight.shape
    before = x.new_zeros(x.shape[0], taps - 1, channels) if state is None else state
    padded = torch.cat([before, x], dim=1)
    y = functional.conv1d(padded.transpose(1, 2), a.weight, a.bias, groups=channels).transpose(1, 2)
    last_state = padded[:, padded.shape[1] - (taps - 1) :]
    return (y if a.activation is None else y * torch.sigmoid(y)), last_state


@implements(recurrence)
def selective_scan(a: Operands) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.selective_scan`; one group of B and C."""
    u, A = a.u, a.A
    if a.B.dim() != 3:
        raise MqAoError("the portable scan has one group of B and C: choose the native one.")
    dt = a.delta if a.delta_bias is None else a.delta + a.delta_bias
    if a.delta_softplus:
        # log(1 + e^x) in operators that XNNPACK has.
        dt = torch.relu(dt) + torch.log(torch.exp(-torch.abs(dt)) + 1)
    h = u.new_zeros(u.shape[0], *A.shape) if a.initial_state is None else a.initial_state

    def step(state: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        dt_t, dtu_t, b_t, c_t = now
        state = torch.exp(dt_t.unsqueeze(-1) * A) * state + dtu_t.unsqueeze(-1) * b_t.unsqueeze(1)
        return state, torch.matmul(state, c_t.unsqueeze(-1)).squeeze(-1)

    def copied(state: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        # What a step gives must not share memory with what it carries.
        state, y = step(state, now)
        return state.clone(), y.clone()

    operands = (dt, dt * u, a.B, a.C)
    if isinstance(u.shape[1], int) and u.shape[1] == 1:
        h, y = step(h, tuple(value.squeeze(1) for value in operands))
        y = y.unsqueeze(1)
    else:
        h, outputs = scan(copied, h, tuple(value.transpose(0, 1).contiguous() for value in operands))
        y = outputs.transpose(0, 1)
    return (y if a.D is None else y + a.D * u), h


OPERATORS: Mapping[Any, Callable[..., Any]] = {
    mq.causal_conv1d.default: causal_conv1d,
    mq.selective_scan.default: selective_scan,
}
"""What takes the place of each of our operators."""
