"""`mq_ao::ssd_scan`: the recurrence of Mamba-2, whose decay is one number a head (Dao and Gu 2024, section 6).

With step = clamp(softplus(dt + dt_bias), dt_min, dt_max) (or without the softplus), for every head

    h[t] = exp(step[t] A) h[t-1] + step[t] x[t] B[t]^T,    y[t] = h[t] C[t] + D x[t].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mq_ao.ops.library import require, schemas
from mq_ao.ops.operator import Operands, like, operator


def check_shapes(a: Operands) -> None:
    """Raises MqAoError on operands whose shapes, or limits, do not fit together."""
    x, dt, A, B, C = a.x, a.dt, a.A, a.B, a.C
    D, initial_state, seq_idx, dt_min, dt_max = a.D, a.initial_state, a.seq_idx, a.dt_min, a.dt_max
    require(x.dim() == 4, f"ssd_scan: x must be (batch, length, heads, headdim), it has {x.dim()} dimensions.")
    batch, length, heads, headdim = x.shape
    if isinstance(length, int):
        require(length > 0, "ssd_scan: the sequence is empty (length 0); give at least one step.")
    require(
        B.dim() == 4,
        f"ssd_scan: B must be (batch, length, groups, d_state), it has {B.dim()} dimensions; unsqueeze it.",
    )
    groups, d_state = B.shape[2:]
    require(groups > 0, "ssd_scan: B has no groups.")
    require(heads % groups == 0, f"ssd_scan: {heads} heads cannot be divided into the {groups} groups of B.")
    shapes: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("dt", dt, (batch, length, heads)),
        ("A", A, (heads,)),
        ("B", B, (batch, length, groups, d_state)),
        ("C", C, (batch, length, groups, d_state)),
    ]
    if D is not None:
        require(
            D.dim() in (1, 2),
            f"ssd_scan: D must be (heads,) or (heads, headdim), it has {D.dim()} dimensions.",
        )
        shapes.append(("D", D, (heads,) if D.dim() == 1 else (heads, headdim)))
    if a.dt_bias is not None:
        shapes.append(("dt_bias", a.dt_bias, (heads,)))
    if initial_state is not None:
        shapes.append(("initial_state", initial_state, (batch, heads, headdim, d_state)))
        require(
            initial_state.is_floating_point(),
            f"ssd_scan: initial_state must be floating point, it is {initial_state.dtype}.",
        )
    if seq_idx is not None:
        shapes.append(("seq_idx", seq_idx, (batch, length)))
        require(
            not seq_idx.is_floating_point() and not seq_idx.is_complex(),
            f"ssd_scan: seq_idx must be integers, it is {seq_idx.dtype}.",
        )
    for name, value, shape in shapes:
        message = f"ssd_scan: {name} must have shape {tuple(shape)}, it has {tuple(value.shape)}."
        require(value.dim() == len(shape), message)
        for size, wanted in zip(value.shape, shape, strict=True):
            require(size == wanted, message)
    require(
        dt_max is None or dt_min <= dt_max,
        f"ssd_scan: dt_min must not exceed dt_max, they are {dt_min} and {dt_max}.",
    )


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def last_state_of(a: Operands, dtype: torch.dtype) -> Tensor:
    """An empty last state."""
    batch, _, heads, headdim = a.x.shape
    return like(a.x, (batch, heads, headdim, a.B.shape[3]), dtype)


def _results(a: Operands) -> tuple[Tensor, Tensor]:
    check_shapes(a)
    require(a.x.is_floating_point(), f"ssd_scan: x must be floating point, it is {a.x.dtype}.")
    for name, value in (("dt", a.dt), ("B", a.B), ("C", a.C)):
        require(
            value.dtype == a.x.dtype,
            f"ssd_scan: x, dt, B and C must share a dtype, x is {a.x.dtype} and {name} {value.dtype}.",
        )
    return like(a.x), last_state_of(a, _state_dtype(a.x))


def _step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float | None, dtype: torch.dtype
) -> Tensor:
    step = dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    return (softplus(step) if dt_softplus else step).clamp(dt_min, dt_max)


@operator(results=_results)
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan and the state after it, computed in float32 (float64 for float64 inputs).

    The native kernel computes the same by the block decomposition of Dao and Gu 2024 in float32; its results differ
    from exact ones by about 1e-6 of the largest.

    Args:
        x: (batch, length, heads, headdim), the input; float32, bfloat16, or any other floating dtype.
        dt: (batch, length, heads), step sizes before bias, softplus and limits; x's dtype.
        A: (heads,), negative real: `-exp(A_log)`.
        B: (batch, length, groups, d_state), where head h reads group `h // (heads // groups)`; x's dtype.
        C: like B.
        D: (heads,) or (heads, headdim), the skip connection.
        dt_bias: (heads,), added to dt before the softplus.
        dt_softplus: whether softplus is applied to dt.
        dt_min: smallest step size, applied after the softplus.
        dt_max: largest step size likewise; None for no limit.
        initial_state: (batch, heads, headdim, d_state), zeros if None; it belongs to the first sequence.
        seq_idx: (batch, length) integers: a new sequence, of state zero, begins wherever the number changes.

    Returns:
        y like x, contiguous; and the state after the last step, (batch, heads, headdim, d_state), float32 (float64 for
        float64 inputs).

    Raises:
        MqAoError: shapes or dtypes do not fit together, the length is 0, or `dt_min` exceeds `dt_max`.
    """
    dtype = _state_dtype(x)
    batch, length, heads, headdim = x.shape
    values, step = x.to(dtype), _step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max, dtype)
    decay = torch.exp(step * A.to(dtype))
    b, c = (m.to(dtype).repeat_interleave(heads // m.shape[2], dim=2) for m in (B, C))
    zeros = values.new_zeros(batch, heads, headdim, B.shape[3])
    h = zeros if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            goes_on = seq_idx[:, t] == seq_idx[:, t - 1]
            h = torch.where(goes_on[:, None, None, None], h, zeros)
        h = decay[:, t, :, None, None] * h + (step[:, t, :, None] * values[:, t])[..., None] * b[:, t, :, None]
        outputs.append((h * c[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + values * (D[:, None] if D.dim() == 1 else D).to(dtype)
    return y.to(x.dtype).contiguous(), h.clone(memory_format=torch.contiguous_format)


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _gradients(a: Operands) -> _Gradients:
    _results(a)
    D, dt_bias, start = (like(a.x, (0,)) if v is None else like(v) for v in (a.D, a.dt_bias, a.initial_state))
    return like(a.x), like(a.dt), like(a.A), like(a.B), like(a.C), D, dt_bias, start


CHUNK = 64
"""Steps that the gradient takes at once."""


@operator(results=_gradients)
def ssd_scan_backward(
    dy: Tensor,
    dlast_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> _Gradients:
    """Gradient of `ssd_scan`, in chunks of matrix products from the last to the first.

    Within a chunk, with X[r] = step[r] x[r], c the running sum of step A, h the state before it and g the gradient of
    the state after it,

        y[t] = sum_{r <= t} exp(c[t] - c[r]) (C[t] B[r]) X[r] + exp(c[t]) h C[t].

    and the state after it is what the last step has of all. The gradient of step A at a step is the sum of all terms
    that decay there.

    Args:
        dy: (batch, length, heads, headdim), gradient of y.
        dlast_state: (batch, heads, headdim, d_state), gradient of the last state.
        x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx: as in `ssd_scan`.

    Returns:
        Gradients of x, dt, A, B, C, D, dt_bias and initial_state, each of its operand's shape and dtype; an empty
        tensor for an operand that is None.

    Raises:
        MqAoError: as `ssd_scan`.
    """
    dtype = _state_dtype(x)
    groups, heads = B.shape[2], x.shape[2]
    raw = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    free = softplus(raw) if dt_softplus else raw
    step = free.clamp(dt_min, dt_max)
    # From here on (batch, heads, length, ...).
    values, dy_ = x.to(dtype).transpose(1, 2), dy.to(dtype).transpose(1, 2)
    steps, weighted = step.transpose(1, 2), (step[..., None] * x.to(dtype)).transpose(1, 2)
    b, c = (m.to(dtype).repeat_interleave(heads // groups, dim=2).transpose(1, 2) for m in (B, C))
    states = [dy_.new_zeros(dlast_state.shape) if initial_state is None else initial_state.to(dtype)]
    parts = [slice(start, min(start + CHUNK, x.shape[1])) for start in range(0, x.shape[1], CHUNK)]
    decays = [_chunk_decays(steps[:, :, part] * A.to(dtype)[:, None], seq_idx, part) for part in parts]
    for part, (between, into) in zip(parts, decays, strict=True):
        last = between[:, :, -1, :, None] * weighted[:, :, part]
        states.append(into[:, :, -1, None, None] * states[-1] + last.mT @ b[:, :, part])

    g = dlast_state.to(dtype)
    dX, db, dc, da = [], [], [], []
    for index in reversed(range(len(parts))):
        part, (between, into), state = parts[index], decays[index], states[index]
        X_, b_, c_, d_ = weighted[:, :, part], b[:, :, part], c[:, :, part], dy_[:, :, part]
        into, out = into[..., None], between[:, :, -1, :, None]
        scores, products = (c_ @ b_.mT) * between, d_ @ X_.mT
        dscores = products * between
        through_state, through_g = into * (c_ @ state.mT), out * (b_ @ g.mT)
        dX.append(scores.mT @ d_ + through_g)
        dc.append(dscores @ b_ + into * (d_ @ state))
        db.append(dscores.mT @ c_ + out * (X_ @ g))
        # All that passes over a step: from steps before it, or the state, to it and steps after it, or the next state.
        over_steps = _from_there_on(products * scores, -2).tril(-1).sum(-1)
        from_state = _from_there_on((d_ * through_state).sum(-1), -1)
        to_next = (X_ * through_g).sum(-1)
        through = (into[:, :, -1, :, None] * g * state).sum((-2, -1))
        da.append(over_steps + from_state + (to_next.cumsum(-1) - to_next) + through[..., None])
        g = into[:, :, -1, :, None] * g + (into * d_).mT @ c_

    dX_, db_, dc_, da_ = (torch.cat(found[::-1], dim=2).transpose(1, 2) for found in (dX, db, dc, da))
    dx = step[..., None] * dX_
    if D is not None:
        dx = dx + dy.to(dtype) * (D[:, None] if D.dim() == 1 else D).to(dtype)
    dstep = (values.transpose(1, 2) * dX_).sum(-1) + da_ * A.to(dtype)
    ddt = dstep * ((free >= dt_min) & (free <= (math.inf if dt_max is None else dt_max)))
    if dt_softplus:
        ddt = ddt * torch.sigmoid(raw)
    dD = x.new_empty(0)
    if D is not None:
        dD = (dy.to(dtype) * x.to(dtype)).sum((0, 1) if D.dim() == 2 else (0, 1, 3)).to(D.dtype)
    return (
        dx.to(x.dtype).contiguous(),
        ddt.to(dt.dtype),
        (da_ * step).sum((0, 1)).to(A.dtype),
        db_.unflatten(2, (groups, -1)).sum(3).to(B.dtype),
        dc_.unflatten(2, (groups, -1)).sum(3).to(C.dtype),
        dD,
        x.new_empty(0) if dt_bias is None else ddt.sum((0, 1)).to(dt_bias.dtype),
        x.new_empty(0) if initial_state is None else g.to(initial_state.dtype).contiguous(),
    )


def _from_there_on(x: Tensor, axis: int) -> Tensor:
    """Sums of x over each place of an axis and all behind it."""
    return x.flip(axis).cumsum(axis).flip(axis)


def _chunk_decays(log_decay: Tensor, seq_idx: Tensor | None, part: slice) -> tuple[Tensor, Tensor]:
    """What is left of each step (column) at each step (row) of a chunk, and at each step of the state before it.

    Args:
        log_decay: (batch, heads, chunk), step A.
        seq_idx: see `ssd_scan`.
        part: which steps of the sequence these are.

    Returns:
        (batch, heads, chunk, chunk), zero above the diagonal and between sequences; (batch, heads, chunk).
    """
    size = log_decay.shape[-1]
    seen = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
    into = log_decay.cumsum(-1).exp()
    if seq_idx is not None:
        # How often the sequence has changed since the step before the chunk.
        before = seq_idx[:, max(part.start - 1, 0) : part.stop]
        changes = (before[:, 1:] != before[:, :-1]).cumsum(-1)
        changes = changes if part.start else torch.nn.functional.pad(changes, (1, 0))
        seen = seen & (changes[:, None, :, None] == changes[:, None, None, :])
        into = into * (changes == 0)[:, None]
    # Sums from each step on: differences of sums from the first would round at the size of the whole.
    sums = log_decay[..., None].expand(*log_decay.shape, size).tril(-1).cumsum(-2)
    return sums.masked_fill(~seen, -math.inf).exp(), into


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, dt_softplus, dt_min, dt_max, initial_state, seq_idx = inputs
    ctx.save_for_backward(*tensors, initial_state, seq_idx)
    ctx.options = dt_softplus, dt_min, dt_max


def _autograd(ctx: Any, dy: Tensor, dlast_state: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, initial_state, seq_idx = ctx.saved_tensors
    inputs = (*tensors, *ctx.options, initial_state, seq_idx)
    *grads, dinit = ssd_scan_backward(dy, dlast_state, *inputs)
    given = [None if value is None else grad for value, grad in zip(tensors, grads, strict=True)]
    return *given, None, None, None, None if initial_state is None else dinit, None


torch.library.register_autograd("mq_ao::ssd_scan", _autograd, setup_context=_setup_context, lib=schemas)
