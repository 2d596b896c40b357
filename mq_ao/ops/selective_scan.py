"""`mq_ao::selective_scan`: the recurrence of Mamba-1, channel-last (Gu and Dao 2023, equations 2a and 2b).

With dt = softplus(delta + delta_bias) (or without the softplus), for every channel c and state n

    h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t],    y[t] = sum_n C[t] h[t] + D u[t].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mq_ao.ops.library import require, schemas
from mq_ao.ops.operator import Operands, like, operator

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def check_shapes(a: Operands) -> None:
    """Raises MqAoError on operands whose shapes do not fit together."""
    u, delta, A, B, C = a.u, a.delta, a.A, a.B, a.C
    require(u.dim() == 3, f"selective_scan: u must be (batch, length, channels), it has {u.dim()} dimensions.")
    batch, length, channels = u.shape
    if isinstance(length, int):
        require(length > 0, "selective_scan: the sequence is empty (length 0); give at least one step.")
    require(delta.dim() == 3, f"selective_scan: delta must have u's shape, it has {delta.dim()} dimensions.")
    require(A.dim() == 2, f"selective_scan: A must be (channels, d_state), it has {A.dim()} dimensions.")
    d_state = A.shape[1]
    shapes = [("delta", delta, (batch, length, channels)), ("A", A, (channels, d_state))]
    for name, value in (("B", B), ("C", C)):
        require(
            value.dim() in (3, 4),
            f"selective_scan: {name} must be (batch, length, d_state) or (batch, length, groups, d_state), "
            f"it has {value.dim()} dimensions.",
        )
        shapes.append((name, value, (batch, length, *value.shape[2:-1], d_state)))
        if value.dim() == 4:
            require(
                channels % value.shape[2] == 0,
                f"selective_scan: {channels} channels cannot be divided into the {value.shape[2]} groups of {name}.",
            )
    require(
        B.dim() == C.dim() and (B.dim() == 3 or B.shape[2] == C.shape[2]),
        f"selective_scan: B and C must have the same groups, their shapes are {tuple(B.shape)} and {tuple(C.shape)}.",
    )
    shapes += [(n, v, (channels,)) for n, v in (("D", a.D), ("delta_bias", a.delta_bias)) if v is not None]
    if a.initial_state is not None:
        shapes.append(("initial_state", a.initial_state, (batch, channels, d_state)))
    for name, value, shape in shapes:
        require(
            value.dim() == len(shape),
            f"selective_scan: {name} must have shape {tuple(shape)}, it has {tuple(value.shape)}.",
        )
        for size, wanted in zip(value.shape, shape, strict=True):
            require(
                size == wanted,
                f"selective_scan: {name} must have shape {tuple(shape)}, it has {tuple(value.shape)}.",
            )


def check(a: Operands) -> None:
    """Raises MqAoError on operands that do not fit together."""
    check_shapes(a)
    require(a.u.is_floating_point(), f"selective_scan: u must be floating point, it is {a.u.dtype}.")
    for name, value in (("delta", a.delta), ("B", a.B), ("C", a.C)):
        require(
            value.dtype == a.u.dtype,
            f"selective_scan: u, delta, B and C must share a dtype, u is {a.u.dtype} and {name} {value.dtype}.",
        )


def _state_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _results(a: Operands) -> tuple[Tensor, Tensor]:
    check(a)
    return like(a.u), like(a.u, (a.u.shape[0], *a.A.shape), _state_dtype(a.u))


def _per_channel(matrix: Tensor, channels: int) -> Tensor:
    """B or C, grouped or not, as (batch, length, channels or 1, d_state)."""
    if matrix.dim() == 3:
        return matrix.unsqueeze(2)
    return matrix.repeat_interleave(channels // matrix.shape[2], dim=2)


def _step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool, dtype: torch.dtype) -> Tensor:
    dt = delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)
    return softplus(dt) if delta_softplus else dt


@operator(results=_results)
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
    """The scan and the state after it, computed in float32 (float64 for float64 inputs).

    Args:
        u: (batch, length, channels), the input; float32, bfloat16, or any other floating dtype.
        delta: like u, step sizes before bias and softplus.
        A: (channels, d_state), negative real: `-exp(A_log)`.
        B: (batch, length, d_state), or (batch, length, groups, d_state) where channel c reads group
            `c // (channels // groups)`; u's dtype.
        C: like B.
        D: (channels,), the skip connection.
        delta_bias: (channels,), added to delta before the softplus.
        delta_softplus: whether softplus is applied to delta.
        initial_state: (batch, channels, d_state), zeros if None.

    Returns:
        y like u, contiguous; and the state after the last step, (batch, channels, d_state), float32 (float64 for
        float64 inputs).

    Raises:
        MqAoError: shapes or dtypes do not fit together, or the length is 0.
    """
    dtype = _state_dtype(u)
    x, dt, decay = u.to(dtype), _step_sizes(delta, delta_bias, delta_softplus, dtype), A.to(dtype)
    b, c = (_per_channel(m.to(dtype), u.shape[2]) for m in (B, C))
    h = x.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * decay) * h + (dt[:, t] * x[:, t])[..., None] * b[:, t]
        outputs.append((h * c[:, t]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + x * D.to(dtype)
    return y.to(u.dtype).contiguous(), h.clone(memory_format=torch.contiguous_format)


def _gradients(a: Operands) -> _Gradients:
    check(a)
    D, delta_bias, start = (like(a.u, (0,)) if v is None else like(v) for v in (a.D, a.delta_bias, a.initial_state))
    return like(a.u), like(a.delta), like(a.A), like(a.B), like(a.C), D, delta_bias, start


def _sum_groups(per_channel: Tensor, like: Tensor) -> Tensor:
    """Adds up (batch, length, channels, d_state) over the channels of each group, into the shape of B or C."""
    if like.dim() == 3:
        return per_channel.sum(2).to(like.dtype)
    return per_channel.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)


@operator(results=_gradients)
def selective_scan_backward(
    dy: Tensor,
    dlast_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> _Gradients:
    """Gradient of `selective_scan`: the adjoint recurrence, run from the last step to the first.

    With g[t] the gradient of h[t]: g[t] = dy[t] C[t] + exp(dt[t+1] A) g[t+1], starting from `dlast_state`.

    Args:
        dy: (batch, length, channels), gradient of y.
        dlast_state: (batch, channels, d_state), gradient of the last state.
        u, delta, A, B, C, D, delta_bias, delta_softplus, initial_state: as in `selective_scan`.

    Returns:
        Gradients of u, delta, A, B, C, D, delta_bias and initial_state, each of its operand's shape and dtype; an
        empty tensor for an operand that is None.

    Raises:
        MqAoError: as `selective_scan`.
    """
    dtype = _state_dtype(u)
    channels = u.shape[2]
    x, decay, dy_ = u.to(dtype), A.to(dtype), dy.to(dtype)
    raw = _step_sizes(delta, delta_bias, False, dtype)
    dt = softplus(raw) if delta_softplus else raw
    b, c = (_per_channel(m.to(dtype), channels) for m in (B, C))
    states = [x.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)]
    for t in range(u.shape[1]):
        states.append(torch.exp(dt[:, t, :, None] * decay) * states[-1] + (dt[:, t] * x[:, t])[..., None] * b[:, t])

    g = dlast_state.to(dtype)
    d_decay = torch.zeros_like(decay)
    dx, ddt, db, dc = [], [], [], []
    for t in reversed(range(u.shape[1])):
        g = g + dy_[:, t, :, None] * c[:, t]
        dc.append(dy_[:, t, :, None] * states[t + 1])
        db.append(g * (dt[:, t] * x[:, t])[..., None])
        through_input = (g * b[:, t]).sum(-1)
        a = torch.exp(dt[:, t, :, None] * decay)
        through_decay = g * a * states[t]
        d_decay = d_decay + (through_decay * dt[:, t, :, None]).sum(0)
        dx.append(dt[:, t] * through_input)
        ddt.append(x[:, t] * through_input + (through_decay * decay).sum(-1))
        g = a * g
    du, ddelta, dB, dC = (torch.stack(parts[::-1], dim=1) for parts in (dx, ddt, db, dc))
    if delta_softplus:
        ddelta = ddelta * torch.sigmoid(raw)
    dD = u.new_empty(0) if D is None else (dy_ * x).sum((0, 1)).to(D.dtype)
    if D is not None:
        du = du + dy_ * D.to(dtype)
    dbias = u.new_empty(0) if delta_bias is None else ddelta.sum((0, 1)).to(delta_bias.dtype)
    dinit = u.new_empty(0) if initial_state is None else g.to(initial_state.dtype).contiguous()
    return (
        du.to(u.dtype),
        ddelta.to(delta.dtype),
        d_decay.to(A.dtype),
        _sum_groups(dB, B),
        _sum_groups(dC, C),
        dD,
        dbias,
        dinit,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, delta_softplus, initial_state = inputs
    ctx.save_for_backward(*tensors, initial_state)
    ctx.delta_softplus = delta_softplus


def _autograd(ctx: Any, dy: Tensor, dlast_state: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, initial_state = ctx.saved_tensors
    inputs = (*tensors, ctx.delta_softplus, initial_state)
    grads = selective_scan_backward(dy, dlast_state, *inputs)
    du, ddelta, dA, dB, dC, dD, dbias, dinit = grads
    given = [None if value is None else grad for value, grad in zip(tensors[5:], (dD, dbias), strict=True)]
    return du, ddelta, dA, dB, dC, *given, None, None if initial_state is None else dinit


torch.library.register_autograd("mq_ao::selective_scan", _autograd, setup_context=_setup_context, lib=schemas)
