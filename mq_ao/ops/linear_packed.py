"""`mq_ao::linear_packed`, `quantize_per_token` and `linear_packed_per_token`: linear layers on 8-bit activations.

All run from one packed copy of the 8-bit or 4-bit weights (see `packing`), for one row (decode) and for many
(prefill). Sums are exact in 32 bits; scale, zero point, bias and the optional requantization are a float32 epilogue
whose order of operations the references below define, and which the native kernels follow bit for bit.

`quantize_per_token` quantizes every token (row) by itself, symmetrically, by the rule of `int8_per_token`; what it
gives can feed several `linear_packed_per_token`. Tokens of 4 bits are held in 8 and run in the same kernels: that
shows what 4 bits cost in accuracy, and is no faster.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from mq_ao.ops.grids import Grid, requantize
from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, like, operator
from mq_ao.ops.packing import check_linear, linear_unpack

TOKEN_ZERO_POINT = 128
TOKEN_LIMITS = {4: (-8, 7), 8: (-127, 127)}
"""Smallest and largest integer of a token by bits."""
TOKEN_REACH = {4: 8.0, 8: 127.0}
"""What the largest magnitude of a token is divided by. In 4 bits 8 is cut to 7, as in 4-bit weights: the finer grid
outweighs the one value that loses a step."""
_TINIEST_SCALE = torch.finfo(torch.float32).tiny


def int8_per_token(x: Tensor, bits: int = 8, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """Quantizes each row of `x`, or each group of its values, to 8 bits or to 4 that are held in 8, symmetrically.

    `scale = max|row| / TOKEN_REACH`, at least the smallest normal float32; `q = round_half_even(x * (1 / scale))`
    within `TOKEN_LIMITS`, all in float32. An all-zero row gives zeros; a row with a NaN or an infinity gives zeros and
    the scale NaN, so that whatever is computed from it is NaN.

    Args:
        x: (..., K), floating point.
        bits: 8 or 4.
        group_size: values next to each other that share a scale; it divides K. 0: all.

    Returns:
        q, int8 (..., K), within -127..127 or -8..7, and scale, float32 (..., 1) or (..., K / group_size).
    """
    if group_size:
        q, scale = int8_per_token(x.unflatten(-1, (-1, group_size)), bits)
        return q.flatten(-2), scale.squeeze(-1)
    values = x.to(torch.float32)
    scale = (values.abs().amax(-1, keepdim=True) / TOKEN_REACH[bits]).clamp(min=_TINIEST_SCALE)
    finite = scale.isfinite()
    scale = torch.where(finite, scale, torch.nan)
    q = torch.round(values * (1.0 / scale)).clamp(*TOKEN_LIMITS[bits])
    return torch.where(finite, q, 0.0).to(torch.int8), scale


def uint8_per_token(x: Tensor, bits: int = 8, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """What `int8_per_token` gives, as uint8 with `TOKEN_ZERO_POINT`."""
    q, scale = int8_per_token(x, bits, group_size)
    return (q.to(torch.int16) + TOKEN_ZERO_POINT).to(torch.uint8), scale


def token_scales(x: Tensor, bits: int, group_size: int) -> Tensor:
    """The scales that `int8_per_token` gives, without values.

    Raises:
        MqAoError: it cannot have so many bits, or such groups.
    """
    require(bits in TOKEN_LIMITS, f"tokens are quantized to 8 or 4 bits, not to {bits}.")
    n = x.shape[-1]
    if not group_size:
        return like(x, (*x.shape[:-1], 1), torch.float32)
    require(group_size > 0 and n % group_size == 0, f"groups of {group_size} values do not divide rows of {n}.")
    return like(x, (*x.shape[:-1], n // group_size), torch.float32)


def _check_zero_point(zero_point: int) -> None:
    require(0 <= zero_point <= 255, f"a uint8 zero point lies in 0..255, not at {zero_point}.")


def _linear(x: Tensor, a: Operands) -> Tensor:
    n = check_linear(x, a)
    return like(x, (*x.shape[:-1], n), torch.float32 if a.out_scale is None else torch.uint8)


def _check_output(a: Operands) -> None:
    if a.out_scale is not None:
        require(a.out_scale > 0, f"out_scale must be positive, not {a.out_scale}.")
        _check_zero_point(a.out_zero_point)


def _scaled_sums(
    x: Tensor, scale: float | Tensor, packed: Tensor, weight_scale: Tensor, bits: int, group_size: int
) -> Tensor:
    """Sum over the groups, in their order, of the exact integer sum times its scale; x holds whole numbers."""
    weight = linear_unpack.reference(packed, weight_scale.shape[0], x.shape[-1], bits, group_size)
    size = group_size or x.shape[-1]
    total = None
    columns = weight_scale.unbind(1) if group_size else (weight_scale,)
    grouped = isinstance(scale, Tensor) and scale.shape[-1] == len(columns)
    scales = cast("Tensor", scale).split(1, -1) if grouped else [scale] * len(columns)
    for part, part_weight, column, step in zip(x.split(size, -1), weight.split(size, 1), columns, scales, strict=True):
        # Whole numbers below 2^53: a float64 product is exact whatever its order.
        sums = part.to(torch.float64) @ part_weight.to(torch.float64).t()
        y = sums.to(torch.float32) * (column * step)
        total = y if total is None else total + y
    assert total is not None
    return total


def _finished(y: Tensor, bias: Tensor | None, out: Grid) -> Tensor:
    if bias is not None:
        y = y + bias
    return requantize(y, torch.uint8, out)


def _static(a: Operands) -> Tensor:
    require(a.x.dtype == torch.uint8, f"linear_packed takes uint8 activations, not {a.x.dtype}.")
    y = _linear(a.x, a)
    _check_zero_point(a.x_zero_point)
    _check_output(a)
    return y


@operator(results=_static)
def linear_packed(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    bits: int = 8,
    group_size: int = 0,
) -> Tensor:
    """Linear layer on statically quantized activations.

    `y[..., n] = sum_g (sum_{k in g} (x[..., k] - x_zero_point) * weight[n, k]) * (weight_scale[n, g] * x_scale)
    + bias[n]`, where groups g are added in their order, in float32.

    Args:
        x: uint8 (..., K); rows may be strided.
        x_scale: activation scale, rounded to float32.
        x_zero_point: within 0..255.
        packed: weights from `packing.linear_prepack` with the same `bits` and `group_size`.
        weight_scale: float32 (N,), or (N, ceil(K / group_size)) with groups. The latter are copied in every call
            unless they lie in memory group by group, as `weight_scale.t().contiguous().t()` makes them.
        bias: float32 (N,), or None.
        out_scale: None for float32 output; else y is quantized as `quantized_decomposed.quantize_per_tensor`
            does it, and NaN to 0.
        out_zero_point: within 0..255.
        bits: 8 or 4, of the packed weights.
        group_size: inputs that share a scale, a multiple of 4; 0: all.

    Returns:
        (..., N), float32, or uint8 with `out_scale`.

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above.
    """
    centred = x.to(torch.float64) - x_zero_point
    y = _scaled_sums(centred, x_scale, packed, weight_scale, bits, group_size)
    return _finished(y, bias, Grid(out_scale, out_zero_point))


def _tokens(a: Operands) -> tuple[Tensor, Tensor]:
    x = a.x
    require(
        x.dtype in (torch.float32, torch.bfloat16),
        f"per-token quantization takes float32 or bfloat16 activations, not {x.dtype}.",
    )
    require(
        x.dim() >= 1 and x.shape[-1] >= 1,
        f"per-token quantization takes x of shape (..., inputs) with at least 1 input, not {tuple(x.shape)}.",
    )
    return like(x, dtype=torch.uint8), token_scales(x, a.bits, a.group_size)


@operator(results=_tokens)
def quantize_per_token(x: Tensor, bits: int = 8, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """Quantizes each row of `x` by `int8_per_token`, for `linear_packed_per_token`.

    Args:
        x: float32 or bfloat16 (..., K); rows may be strided.
        bits: 8, or 4 that are held in 8.
        group_size: see `int8_per_token`.

    Returns:
        q + `TOKEN_ZERO_POINT`, uint8 (..., K), within 1..255 or 120..135, and scale, float32 (..., 1) or
        (..., K / group_size).

    Raises:
        MqAoError: x has another dtype, or no inputs, bits are neither 8 nor 4, or groups do not divide K.
    """
    return uint8_per_token(x, bits, group_size)


def _per_token(a: Operands) -> Tensor:
    q, scale = a.q, a.scale
    require(q.dtype == torch.uint8, f"linear_packed_per_token takes uint8 activations, not {q.dtype}.")
    y = _linear(q, a)
    counts = (1, a.weight_scale.shape[-1]) if a.group_size else (1,)
    require(
        scale.dtype == torch.float32 and any(scale.shape == (*q.shape[:-1], count) for count in counts),
        f"scale must be float32 with one value for each token, {(*q.shape[:-1], 1)}, or for each group of its values, "
        f"not {scale.dtype} {tuple(scale.shape)}: make it with quantize_per_token.",
    )
    _check_output(a)
    return y


@operator(results=_per_token)
def linear_packed_per_token(
    q: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    bits: int = 8,
    group_size: int = 0,
) -> Tensor:
    """Linear layer on what `quantize_per_token` gives: `linear_packed` with a scale for each row and zero point 128.

    Args:
        q: uint8 (..., K); rows may be strided.
        scale: float32 (..., 1), or (..., groups) where the groups of the weights have scales of their own in each row.
        packed: as for `linear_packed`, and so are the others.
        weight_scale: float32 (N,) or (N, ceil(K / group_size)).
        bias: float32 (N,), or None.
        out_scale: None for float32 output, else the static scale of the uint8 output.
        out_zero_point: within 0..255.
        bits: 8 or 4.
        group_size: a multiple of 4, or 0.

    Returns:
        (..., N), float32, or uint8 with `out_scale`.

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above.
    """
    centred = q.to(torch.float64) - TOKEN_ZERO_POINT
    y = _scaled_sums(centred, scale, packed, weight_scale, bits, group_size)
    return _finished(y, bias, Grid(out_scale, out_zero_point))
