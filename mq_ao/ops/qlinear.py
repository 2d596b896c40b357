"""`mq_ao::qlinear` and `mq_ao::qlinear_dynamic`: linear layers on 8-bit integers.

Both run from one packed copy of the int8 weights, for one row (decode) and for many (prefill). Sums are exact
in 32 bits; scale, zero point, bias and the optional requantization are a float32 epilogue whose order of
operations the references below define, and which the native kernels follow bit for bit.

The dynamic operator quantizes every token (row) by itself, symmetrically: see `quantize_per_token`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops import library
from mq_ao.ops.library import require

_PANEL = 64
_GROUP = 16
_MAX_INPUTS = 65536
TOKEN_ZERO_POINT = 128
_TINIEST_SCALE = torch.finfo(torch.float32).tiny


def _padded(n: int, k: int) -> tuple[int, int]:
    return (n + _GROUP - 1) // _GROUP * _GROUP, (k + 3) // 4 * 4


def packed_bytes(n: int, k: int) -> int:
    """Size in bytes of the packed weights of a layer with `n` outputs and `k` inputs."""
    padded_n, padded_k = _padded(n, k)
    return padded_n * (padded_k + 4)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes each row of `x` to 8 bits, symmetrically, as `qlinear_dynamic` does inside.

    `scale = max|row| / 127`, at least the smallest normal float32; `q = round_half_even(x * (1 / scale))`,
    all in float32. An all-zero row gives zeros; a row with a NaN or an infinity gives zeros and the scale NaN,
    so that whatever is computed from it is NaN.

    Args:
        x: (..., K), floating point.

    Returns:
        q, int8 (..., K), within -127..127, and scale, float32 (..., 1).
    """
    values = x.to(torch.float32)
    scale = (values.abs().amax(-1, keepdim=True) / 127.0).clamp(min=_TINIEST_SCALE)
    finite = scale.isfinite()
    scale = torch.where(finite, scale, torch.nan)
    q = torch.round(values * (1.0 / scale)).clamp(-127, 127)
    return torch.where(finite, q, 0.0).to(torch.int8), scale


def _check_size(n: int, k: int) -> None:
    require(
        n >= 1 and 1 <= k <= _MAX_INPUTS,
        f"a quantized linear layer has 1 to {_MAX_INPUTS} inputs and at least 1 output, not {k} and {n}.",
    )


def _check_weight(weight: Tensor) -> None:
    require(
        weight.dim() == 2 and weight.dtype == torch.int8,
        f"qlinear_prepack takes an int8 weight of shape (outputs, inputs), not {weight.dtype} {tuple(weight.shape)}.",
    )
    _check_size(weight.shape[0], weight.shape[1])


def _check_packed(packed: Tensor, n: int, k: int) -> None:
    _check_size(n, k)
    require(
        packed.dtype == torch.int8 and packed.is_contiguous() and packed.numel() == packed_bytes(n, k),
        f"packed weights of {n} outputs and {k} inputs are {packed_bytes(n, k)} contiguous int8 bytes, "
        f"not {packed.numel()} of {packed.dtype}: make them with qlinear_prepack.",
    )


def _check_vector(vector: Tensor, n: int, name: str) -> None:
    require(
        vector.dtype == torch.float32 and tuple(vector.shape) == (n,) and vector.is_contiguous(),
        f"{name} must be a contiguous float32 vector of {n} values, not {vector.dtype} {tuple(vector.shape)}.",
    )


def _check_linear(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> int:
    require(x.dim() >= 1, "a quantized linear layer takes x of shape (..., inputs), not a scalar.")
    n = weight_scale.numel()
    _check_packed(packed, n, x.shape[-1])
    _check_vector(weight_scale, n, "weight_scale")
    if bias is not None:
        _check_vector(bias, n, "bias")
    return n


def _check_zero_point(zero_point: int) -> None:
    require(0 <= zero_point <= 255, f"a uint8 zero point lies in 0..255, not at {zero_point}.")


def _check_qlinear(
    x: Tensor,
    x_zero_point: int,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: float | None,
    out_zero_point: int,
) -> int:
    require(x.dtype == torch.uint8, f"qlinear takes uint8 activations, not {x.dtype}.")
    n = _check_linear(x, packed, weight_scale, bias)
    _check_zero_point(x_zero_point)
    if out_scale is not None:
        require(out_scale > 0, f"out_scale must be positive, not {out_scale}.")
        _check_zero_point(out_zero_point)
    return n


def _check_dynamic(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> int:
    require(
        x.dtype in (torch.float32, torch.bfloat16),
        f"qlinear_dynamic takes float32 or bfloat16 activations, not {x.dtype}.",
    )
    return _check_linear(x, packed, weight_scale, bias)


def _prepack_reference(weight: Tensor) -> Tensor:
    _check_weight(weight)
    n, k = weight.shape
    padded_n, padded_k = _padded(n, k)
    padded = torch.nn.functional.pad(weight, (0, padded_k - k, 0, padded_n - n))
    panels = [panel.reshape(len(panel), -1, 4).transpose(0, 1).reshape(-1) for panel in padded.split(_PANEL)]
    return torch.cat([*panels, padded.sum(1, dtype=torch.int32).view(torch.int8)])


def _prepack_fake(weight: Tensor) -> Tensor:
    _check_weight(weight)
    return weight.new_empty(packed_bytes(weight.shape[0], weight.shape[1]))


def _unpack_reference(packed: Tensor, n: int, k: int) -> Tensor:
    _check_packed(packed, n, k)
    padded_n, padded_k = _padded(n, k)
    panels = packed[: padded_n * padded_k].split(_PANEL * padded_k)
    rows = [panel.reshape(padded_k // 4, -1, 4).transpose(0, 1).reshape(-1, padded_k) for panel in panels]
    return torch.cat(rows)[:n, :k].contiguous()


def _unpack_fake(packed: Tensor, n: int, k: int) -> Tensor:
    _check_packed(packed, n, k)
    return packed.new_empty(n, k)


def _exact_sums(x: Tensor, packed: Tensor, n: int) -> Tensor:
    # Whole numbers below 2^53: a float64 product is exact whatever its order.
    weight = _unpack_reference(packed, n, x.shape[-1])
    return x.to(torch.float64) @ weight.to(torch.float64).t()


def _qlinear_reference(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> Tensor:
    n = _check_qlinear(x, x_zero_point, packed, weight_scale, bias, out_scale, out_zero_point)
    sums = _exact_sums(x.to(torch.float64) - x_zero_point, packed, n)
    y = sums.to(torch.float32) * (weight_scale * x_scale)
    if bias is not None:
        y = y + bias
    if out_scale is None:
        return y
    # As quantized_decomposed.quantize_per_tensor: times the reciprocal, which is rounded to float32.
    return (torch.round(y * (1.0 / out_scale)) + out_zero_point).clamp(0, 255).to(torch.uint8)


def _qlinear_fake(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> Tensor:
    n = _check_qlinear(x, x_zero_point, packed, weight_scale, bias, out_scale, out_zero_point)
    return x.new_empty((*x.shape[:-1], n), dtype=torch.float32 if out_scale is None else torch.uint8)


def _dynamic_reference(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    n = _check_dynamic(x, packed, weight_scale, bias)
    q, scale = quantize_per_token(x)
    y = _exact_sums(q, packed, n).to(torch.float32) * (weight_scale * scale)
    return y if bias is None else y + bias


def _dynamic_fake(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    n = _check_dynamic(x, packed, weight_scale, bias)
    return x.new_empty((*x.shape[:-1], n), dtype=torch.float32)


library.define("qlinear_prepack", "(Tensor weight) -> Tensor", fake=_prepack_fake, reference=_prepack_reference)
library.define(
    "qlinear_unpack",
    "(Tensor packed, int n, int k) -> Tensor",
    fake=_unpack_fake,
    reference=_unpack_reference,
)
library.define(
    "qlinear",
    "(Tensor x, float x_scale, int x_zero_point, Tensor packed, Tensor weight_scale, Tensor? bias=None, "
    "float? out_scale=None, int out_zero_point=0) -> Tensor",
    fake=_qlinear_fake,
    reference=_qlinear_reference,
)
library.define(
    "qlinear_dynamic",
    "(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias=None) -> Tensor",
    fake=_dynamic_fake,
    reference=_dynamic_reference,
)


def prepack(weight: Tensor) -> Tensor:
    """Packs int8 weights (outputs, inputs) for `qlinear` and `qlinear_dynamic`.

    Returns:
        int8 (`packed_bytes(outputs, inputs)`,): panels of 64 outputs, each [inputs / 4][width][4], zero padded
        to 16 outputs and 4 inputs, then the int32 sum of every padded output's weights.

    Raises:
        MqAoError: `weight` is not int8, not 2-D, empty, or has more than 65536 inputs.
    """
    return torch.ops.mq_ao.qlinear_prepack(weight)


def qlinear(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> Tensor:
    """Linear layer on statically quantized activations.

    `y[..., n] = (sum_k (x[..., k] - x_zero_point) * weight[n, k]) * (weight_scale[n] * x_scale) + bias[n]`

    Args:
        x: uint8 (..., K); rows may be strided.
        x_scale: activation scale, rounded to float32.
        x_zero_point: within 0..255.
        packed: weights from `prepack`.
        weight_scale: float32 (N,).
        bias: float32 (N,), or None.
        out_scale: None for float32 output; else y is quantized as `quantized_decomposed.quantize_per_tensor`
            does it.
        out_zero_point: within 0..255.

    Returns:
        (..., N), float32, or uint8 with `out_scale`.

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above.
    """
    return torch.ops.mq_ao.qlinear(x, x_scale, x_zero_point, packed, weight_scale, bias, out_scale, out_zero_point)


def qlinear_dynamic(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer that quantizes each token of `x` itself, by `quantize_per_token`.

    Args:
        x: float32 or bfloat16 (..., K); rows may be strided.
        packed: weights from `prepack`.
        weight_scale: float32 (N,).
        bias: float32 (N,), or None.

    Returns:
        float32 (..., N).

    Raises:
        MqAoError: a dtype or a shape is not as above.
    """
    return torch.ops.mq_ao.qlinear_dynamic(x, packed, weight_scale, bias)
