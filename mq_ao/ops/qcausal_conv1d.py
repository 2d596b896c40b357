"""`mq_ao::qcausal_conv1d`: depthwise causal convolution on an 8-bit input and int8 taps, channel-last."""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.causal_conv1d import causal_conv1d, check_shapes, state_of
from mq_ao.ops.grids import BYTES, Grid, check_grid, check_output, output_dtype, requantize
from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, like, operator


def _results(a: Operands) -> tuple[Tensor, Tensor]:
    x, weight, scale, out = a.x, a.weight, a.weight_scale, Grid.of(a, "out")
    require(x.dtype in BYTES, f"qcausal_conv1d: x must be uint8 or int8, it is {x.dtype}.")
    check_grid("qcausal_conv1d: x", x.dtype, Grid.of(a, "x"))
    require(weight.dtype == torch.int8, f"qcausal_conv1d: weight must be int8, it is {weight.dtype}.")
    require(
        a.activation in (None, "silu"),
        f"qcausal_conv1d: unknown activation {a.activation!r}; give None or 'silu'.",
    )
    require(
        scale.dtype == torch.float32 and tuple(scale.shape) == (weight.shape[0],),
        f"qcausal_conv1d: weight_scale must be float32 ({weight.shape[0]},), it is {scale.dtype} {tuple(scale.shape)}.",
    )
    check_output("qcausal_conv1d", x, out)
    check_shapes(a)
    return like(x, dtype=output_dtype(x, out)), state_of(a, torch.float32)


@operator(results=_results)
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
    """The convolution of integers, then scale, bias, activation and rounding.

    Integer sums are exact in float32 (below 2^24), in the reference as in the native kernel.

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
    limits = torch.iinfo(x.dtype)
    low, high = limits.min - x_zero_point, limits.max - x_zero_point
    state = None if initial_state is None else (initial_state * (1 / x_scale)).round().clamp(low, high)
    values = x.float() - x_zero_point
    sums, last = causal_conv1d.reference(values, weight.float(), None, state, None)
    y = sums * (weight_scale * x_scale)
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = torch.nn.functional.silu(y)
    return requantize(y, x.dtype, Grid(out_scale, out_zero_point)), last * x_scale
