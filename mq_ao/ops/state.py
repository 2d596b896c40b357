"""`mq_ao::quantize_state` and `mq_ao::dequantize_state`: a carried state, rounded as by `mq_ao::qselective_scan`.

They stand in converted graphs; the lowering takes them into the scan.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops import library
from mq_ao.ops.library import require
from mq_ao.ops.qselective_scan import quantize_state


def _check(name: str, state: Tensor, scale: Tensor) -> None:
    message = (
        f"{name}: a state (batch, channels, d_state) needs a scale (channels, d_state); they are "
        f"{tuple(state.shape)} and {tuple(scale.shape)}."
    )
    require(state.dim() == 3 and scale.dim() == 2, message)
    # One by one: sizes may be symbols.
    for size, wanted in zip(state.shape[1:], scale.shape, strict=True):
        require(size == wanted, message)


def _quantize(h: Tensor, scale: Tensor) -> Tensor:
    _check("quantize_state", h, scale)
    require(h.is_floating_point(), f"quantize_state: h must be floating point, it is {h.dtype}.")
    return quantize_state(h, scale)


def dequantize_state(q: Tensor, scale: Tensor) -> Tensor:
    """Reference: the value of integers that `quantize_state` gave.

    Args:
        q: (batch, channels, d_state) int8.
        scale: (channels, d_state) float32, positive: the step of each state.

    Returns:
        `q * scale`, float32.

    Raises:
        MqAoError: types or shapes do not fit together.
    """
    _check("dequantize_state", q, scale)
    require(q.dtype == torch.int8, f"dequantize_state: q must be int8, it is {q.dtype}.")
    return q * scale


library.define("quantize_state", "(Tensor h, Tensor scale) -> Tensor", fake=_quantize, reference=_quantize)
library.define(
    "dequantize_state", "(Tensor q, Tensor scale) -> Tensor", fake=dequantize_state, reference=dequantize_state
)
