"""`mq_ao::qcausal_conv1d`: depthwise causal convolution on an 8-bit input and int8 taps, channel-last."""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops import library
from mq_ao.ops.causal_conv1d import causal_conv1d
from mq_ao.ops.grids import BYTES, check_grid, check_output, output_dtype, requantize
from mq_ao.ops.library import require


def _check(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    activation: str | None,
    out_scale: float | None,
    out_zero_point: int,
) -> None:
    """Raises MqAoError on what `causal_conv1d` does not check for itself."""
    require(x.dtype in BYTES, f"qcausal_conv1d: x must be uint8 or int8, it is {x.dtype}.")
    check_grid("qcausal_conv1d: x", x.dtype, x_scale, x_zero_point)
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
    check_output("qcausal_conv1d", x, out_scale, out_zero_point)


def qcausal_conv1d(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> tuple[Tensor, Tensor]:
    """Reference: the float convolution of integers, then scale, bias, activation and rounding.

    Integer sums are exact in float32 (below 2^24), here as in the native kernel.

    Args:
        x: (batch, length, channels) uint8 or int8.
        x_scale: step of x.
        x_zero_point: value of x that stands for 0, within x's dtype.
        weight: (channels, d_conv) int8, symmetric.
        weight_scale: (channels,) float32.
        bias: (channels,) float32.
        initial_state: (batch, d_conv - 1, channels) float32, the dequantized inputs before x, oldest first; they are
            rounded to x's grid and range. Zeros if None.
        activation: None or "silu".
        out_scale: None for float32 output; else y is rounded as by `quantized_decomposed.quantize_per_tensor`.
        out_zero_point: within x's dtype.

    Returns:
        y (batch, length, channels), float32, or of x's dtype with `out_scale`; and the last d_conv - 1 dequantized
        inputs, float32, oldest first.

    Raises:
        MqAoError: types or shapes do not fit together, the length is 0, or the activation is unknown.
    """
    _check(x, x_scale, x_zero_point, weight, weight_scale, activation, out_scale, out_zero_point)
    limits = torch.iinfo(x.dtype)
    low, high = limits.min - x_zero_point, limits.max - x_zero_point
    state = None if initial_state is None else (initial_state * (1 / x_scale)).round().clamp(low, high)
    values = x.float() - x_zero_point
    sums, last = causal_conv1d(values, weight.float(), None, state, None)
    y = sums * (weight_scale * x_scale)
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = torch.nn.functional.silu(y)
    return requantize(y, x.dtype, out_scale, out_zero_point), last * x_scale


def fake(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> tuple[Tensor, Tensor]:
    """Checks the operands of `qcausal_conv1d`, and gives empty results."""
    _check(x, x_scale, x_zero_point, weight, weight_scale, activation, out_scale, out_zero_point)
    state = x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=output_dtype(x, out_scale)), state


library.define(
    "qcausal_conv1d",
    "(Tensor x, float x_scale, int x_zero_point, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
    "Tensor? initial_state=None, str? activation=None, float? out_scale=None, int out_zero_point=0) "
    "-> (Tensor y, Tensor last_state)",
    fake=fake,
    reference=qcausal_conv1d,
)
