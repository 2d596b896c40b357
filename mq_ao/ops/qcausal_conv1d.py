"""`mq_ao::qcausal_conv1d`: depthwise causal convolution on a uint8 input and int8 taps, channel-last."""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops import library
from mq_ao.ops.causal_conv1d import causal_conv1d
from mq_ao.ops.library import require


def _check(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scale: Tensor, activation: str | None
) -> None:
    """Raises MqAoError on what `causal_conv1d` does not check for itself."""
    require(x.dtype == torch.uint8, f"qcausal_conv1d: x must be uint8, it is {x.dtype}.")
    require(x_scale > 0, f"qcausal_conv1d: x_scale must be positive, it is {x_scale}.")
    require(0 <= x_zero_point <= 255, f"qcausal_conv1d: x_zero_point must lie in 0..255, it is {x_zero_point}.")
    require(weight.dtype == torch.int8, f"qcausal_conv1d: weight must be int8, it is {weight.dtype}.")
    require(
        activation in (None, "silu"),
        f"qcausal_conv1d: unknown activation {activation!r}; give None or 'silu'.",
    )
    require(
        weight_scale.dtype == torch.float32 and tuple(weight_scale.shape) == (weight.shape[0],),
        f"qcausal_conv1d: weight_scale must be float32 ({weight.shape[0]},), it is {weight_scale.dtype} "
        f"{tuple(weight_scale.shape)}.",
    )


def qcausal_conv1d(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference: the float convolution of integers, then scale, bias and activation.

    Integer sums are exact in float32 (below 2^24), here as in the native kernel.

    Args:
        x: (batch, length, channels) uint8.
        x_scale: step of x.
        x_zero_point: value of x that stands for 0.
        weight: (channels, d_conv) int8, symmetric.
        weight_scale: (channels,) float32.
        bias: (channels,) float32.
        initial_state: (batch, d_conv - 1, channels) float32, the dequantized inputs before x, oldest first; they are
            rounded to x's grid and range. Zeros if None.
        activation: None or "silu".

    Returns:
        y (batch, length, channels) float32; and the last d_conv - 1 dequantized inputs, float32, oldest first.

    Raises:
        MqAoError: types or shapes do not fit together, the length is 0, or the activation is unknown.
    """
    _check(x, x_scale, x_zero_point, weight, weight_scale, activation)
    low, high = -x_zero_point, 255 - x_zero_point
    state = None if initial_state is None else (initial_state * (1 / x_scale)).round().clamp(low, high)
    values = x.float() - x_zero_point
    sums, last = causal_conv1d(values, weight.float(), None, state, None)
    y = sums * (weight_scale * x_scale)
    if bias is not None:
        y = y + bias
    return (torch.nn.functional.silu(y) if activation == "silu" else y), last * x_scale


def _fake(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check(x, x_scale, x_zero_point, weight, weight_scale, activation)
    state = x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float32), state


library.define(
    "qcausal_conv1d",
    "(Tensor x, float x_scale, int x_zero_point, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
    "Tensor? initial_state=None, str? activation=None) -> (Tensor y, Tensor last_state)",
    fake=_fake,
    reference=qcausal_conv1d,
)
