"""`mq_ao::scan_states`: every state of the recurrence of `mq_ao::selective_scan`.

`selective_scan(u, ..., C, D)` is `(h * C).sum(-1) + D * u` of these states h: graphs that quantize the states that
enter that product (docs/method.md, section 5; recipe `mambaquant-paper`) compute it in two steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.operator import Operands, like, operator
from mq_ao.ops.selective_scan import _per_channel, _state_dtype, _step_sizes, check


def _results(a: Operands) -> tuple[Tensor, Tensor]:
    check(a.but(C=a.B, D=None))
    dtype = _state_dtype(a.u)
    return like(a.u, (*a.u.shape[:2], *a.A.shape), dtype), like(a.u, (a.u.shape[0], *a.A.shape), dtype)


@operator(results=_results)
def scan_states(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All states of the scan, computed in float32 (float64 for float64 inputs).

    Args:
        u: (batch, length, channels), the input; floating point.
        delta: like u, step sizes before bias and softplus.
        A: (channels, d_state), negative real.
        B: (batch, length, d_state), or (batch, length, groups, d_state) where channel c reads group
            `c // (channels // groups)`; u's dtype.
        delta_bias: (channels,), added to delta before the softplus.
        delta_softplus: whether softplus is applied to delta.
        initial_state: (batch, channels, d_state), zeros if None.

    Returns:
        h (batch, length, channels, d_state), the states after each step; and the last of them (batch, channels,
        d_state). Both float32 (float64 for float64 inputs) and contiguous.

    Raises:
        MqAoError: shapes or dtypes do not fit together, or the length is 0.
    """
    dtype = _state_dtype(u)
    x, dt, decay = u.to(dtype), _step_sizes(delta, delta_bias, delta_softplus, dtype), A.to(dtype)
    b = _per_channel(B.to(dtype), u.shape[2])
    h = x.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)
    states = []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * decay) * h + (dt[:, t] * x[:, t])[..., None] * b[:, t]
        states.append(h)
    return torch.stack(states, dim=1), h.contiguous()
