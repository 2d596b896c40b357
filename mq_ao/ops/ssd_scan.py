"""`mq_ao::ssd_scan`: the recurrence of Mamba-2, whose decay is one number a head (Dao and Gu 2024, section 6).

With step = clamp(softplus(dt + dt_bias), dt_min, dt_max) (or without the softplus), for every head

    h[t] = exp(step[t] A) h[t-1] + step[t] x[t] B[t]^T,    y[t] = h[t] C[t] + D x[t].

For inference: there is no gradient, and asking for one is an error.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mq_ao.errors import MqAoError
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Nothing is kept: there is no gradient."""


def _no_gradient(ctx: Any, dy: Tensor, dlast_state: Tensor) -> NoReturn:
    raise MqAoError("ssd_scan has no gradient, it is for inference; train with mamba_ssm and load the weights here.")


torch.library.register_autograd("mq_ao::ssd_scan", _no_gradient, setup_context=_setup_context, lib=schemas)
