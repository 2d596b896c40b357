"""Our operators in terms of those that every ExecuTorch runtime has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mq_ao.compat.executorch import scan
from mq_ao.errors import MqAoError
from mq_ao.ops.attention_into_cache import attention_into_cache as attention
from mq_ao.ops.causal_conv1d import causal_conv1d as convolution
from mq_ao.ops.operator import Operands, implements
from mq_ao.ops.selective_scan import selective_scan as recurrence
from mq_ao.ops.ssd_scan import ssd_scan as head_recurrence

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
    dt = _step_sizes(a.delta, a.delta_bias, a.delta_softplus)
    h = u.new_zeros(u.shape[0], *A.shape) if a.initial_state is None else a.initial_state

    def step(state: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        dt_t, dtu_t, b_t, c_t = now
        state = torch.exp(dt_t.unsqueeze(-1) * A) * state + dtu_t.unsqueeze(-1) * b_t.unsqueeze(1)
        return state, torch.matmul(state, c_t.unsqueeze(-1)).squeeze(-1)

    h, y = _stepped(step, h, (dt, dt * u, a.B, a.C))
    return (y if a.D is None else y + a.D * u), h


@implements(head_recurrence)
def ssd_scan(a: Operands) -> tuple[Tensor, Tensor]:
    """See `mq_ao.ops.ssd_scan`; without `seq_idx`."""
    if a.seq_idx is not None:
        raise MqAoError("the portable scan takes no packed sequences: choose the native one.")
    x, (batch, length, heads, headdim), (groups, d_state) = a.x, a.x.shape, a.B.shape[2:]
    dt = torch.clamp(_step_sizes(a.dt, a.dt_bias, a.dt_softplus), a.dt_min, a.dt_max)
    zeros = x.new_zeros(batch, heads, headdim, d_state)
    h = zeros if a.initial_state is None else a.initial_state

    def step(state: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        decay, dtx, b, c = now
        state = decay[..., None, None] * state + dtx.unsqueeze(-1) * b.unsqueeze(2)
        return state, torch.matmul(state, c.unsqueeze(-1)).squeeze(-1)

    def of_heads(m: Tensor) -> Tensor:
        """Of the groups, for every head."""
        each = m.unsqueeze(3).expand(batch, length, groups, heads // groups, d_state)
        return each.reshape(batch, length, heads, d_state)

    h, y = _stepped(step, h, (torch.exp(dt * a.A), dt.unsqueeze(-1) * x, of_heads(a.B), of_heads(a.C)))
    if a.D is not None:
        y = y + x * (a.D.unsqueeze(-1) if a.D.dim() == 1 else a.D)
    return y, h


@implements(attention)
def attention_into_cache(a: Operands) -> Tensor:
    """See `mq_ao.ops.attention_into_cache`; the scores of all rows of the cache are computed."""
    heads, length = a.query.shape[1:3]
    most, groups = a.key_cache.shape[0], a.key.shape[2]
    places = torch.arange(length) + a.position
    for cache, rows in ((a.key_cache, a.key), (a.value_cache, a.value)):
        cache.index_copy_(0, places, rows)
    keys, values = (cache.permute(1, 2, 0, 3).unsqueeze(2) for cache in (a.key_cache, a.value_cache))
    rows = a.query.contiguous().unflatten(1, (groups, heads // groups))
    hidden = torch.arange(most) > places.unsqueeze(1)
    scores = torch.matmul(rows, keys.transpose(-1, -2)) * a.scaling
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    return torch.matmul(weights, values).flatten(1, 2).transpose(1, 2).contiguous()


def _step_sizes(raw: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = raw if bias is None else raw + bias
    # log(1 + e^x) in operators that XNNPACK has.
    return torch.relu(dt) + torch.log(torch.exp(-torch.abs(dt)) + 1) if softplus else dt


def _stepped(
    step: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]], h: Tensor, operands: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The last state and all outputs (batch, length, ...) of steps over operands (batch, length, ...)."""

    def copied(state: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        # What a step gives must not share memory with what it carries.
        state, y = step(state, now)
        return state.clone(), y.clone()

    length = operands[0].shape[1]
    if isinstance(length, int) and length == 1:
        h, y = step(h, tuple(value.squeeze(1) for value in operands))
        return h, y.unsqueeze(1)
    h, outputs = scan(copied, h, tuple(value.transpose(0, 1).contiguous() for value in operands))
    return h, outputs.transpose(0, 1)


OPERATORS: Mapping[Any, Callable[..., Any]] = {
    mq.causal_conv1d.default: causal_conv1d,
    mq.selective_scan.default: selective_scan,
    mq.ssd_scan.default: ssd_scan,
    mq.attention_into_cache.default: attention_into_cache,
}
"""What takes the place of each of our operators."""
