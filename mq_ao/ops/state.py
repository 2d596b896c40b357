"""`mq_ao::quantize_state` and `mq_ao::dequantize_state`: a carried state, rounded as by `mq_ao::qselective_scan`.

They stand in converted graphs; the lowering takes them into the scan.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, like, operator

_LARGEST_STEP = 127


def _check(name: str, state: Tensor, scale: Tensor) -> None:
    message = (
        f"{name}: a state (batch, channels, d_state) needs a scale (channels, d_state); they are "
        f"{tuple(state.shape)} and {tuple(scale.shape)}."
    )
    require(state.dim() == 3 and scale.dim() == 2, message)
    # One by one: sizes may be symbols.
    for size, wanted in zip(state.shape[1:], scale.shape, strict=True):
        require(size == wanted, message)


def _quantized(a: Operands) -> Tensor:
    _check("quantize_state", a.h, a.scale)
    require(a.h.is_floating_point(), f"quantize_state: h must be floating point, it is {a.h.dtype}.")
    return like(a.h, dtype=torch.int8)


@operator(results=_quantized)
def quantize_state(h: Tensor, scale: Tensor) -> Tensor:
    """Rounds states as `qselective_scan` carries them.

    Args:
        h: (batch, channels, d_state) floating point.
        scale: (channels, d_state) float32, positive: the step of each state.

    Returns:
        int8 of the same shape, `round_half_even(h / scale)` within -127..127; 0 for NaN.

    Raises:
        MqAoError: types or shapes do not fit together.
    """
    steps = torch.round(h / scale).clamp(-_LARGEST_STEP, _LARGEST_STEP)
    return steps.nan_to_num(0.0).to(torch.int8).contiguous()


def _dequantized(a: Operands) -> Tensor:
    _check("dequantize_state", a.q, a.scale)
    require(a.q.dtype == torch.int8, f"dequantize_state: q must be int8, it is {a.q.dtype}.")
    return like(a.q, dtype=a.scale.dtype)


@operator(results=_dequantized)
def dequantize_state(q: Tensor, scale: Tensor) -> Tensor:
    """The value of integers that `quantize_state` gave.

    Args:
        q: (batch, channels, d_state) int8.
        scale: (channels, d_state) float32, positive: the step of each state.

    Returns:
        `q * scale`, float32.

    Raises:
        MqAoError: types or shapes do not fit together.
    """
    return (q * scale).contiguous()
