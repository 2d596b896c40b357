"""`mq_ao::quantize_state` and `mq_ao::dequantize_state`: a carried state, rounded as by `mq_ao::qselective_scan`.

They stand in converted graphs; the lowering takes them into the scan.

A state is rounded after every token, and most states decay slowly. Rounded to the nearest, one that loses less than
half a step a token would never fall, and one that gains less would never rise: such errors add up over thousands of
tokens. So a value is rounded up as often as its fraction says: what h / scale has beyond a 64th of a step, which is as
good as random from token to token, says when (dither; docs/carried_states.md has what that gains).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, like, operator

_LARGEST_STEP = 127
_PARTS = 64.0
"""Of a step. What is left of h / scale beyond the nearest of these decides where it is rounded to. A power of two: the
product is exact."""


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
        int8 of the same shape; 0 for NaN. With `x = h / scale` within -127..127, `round_half_even(x + d)`, where
        `d = 64 x - round_half_even(64 x)`: at most a step from x, and as often above it as below.

    Raises:
        MqAoError: types or shapes do not fit together.
    """
    steps = (h / scale).nan_to_num(0.0, _LARGEST_STEP, -_LARGEST_STEP).clamp(-_LARGEST_STEP, _LARGEST_STEP)
    return dithered(steps).to(torch.int8).contiguous()


def dithered(steps: Tensor) -> Tensor:
    """Whole numbers next to `steps` (any shape, floating point), the larger one as often as the fraction says."""
    parts = _PARTS * steps
    return torch.round(steps + (parts - torch.round(parts)))


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
