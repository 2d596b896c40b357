"""`mq_ao::qgate` and `mq_ao::qgate_per_token`: the block's gate, the online rotation and quantization in one pass.

x = y * z * sigmoid(s * z)      (S-SiLU, docs/method.md, S2; s absent: y * SiLU(z))
x = x @ hadamard_matrix.matrix(n)   if the input of out_proj is rotated (docs/method.md, R2)
q = quantized x, with a given scale or with one for every token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops import library
from mq_ao.ops.gate import check_rows, gated
from mq_ao.ops.library import require
from mq_ao.ops.qlinear import TOKEN_ZERO_POINT, quantize_per_token

_OPERANDS = (
    "Tensor y, float y_scale, int y_zero_point, Tensor z, float z_scale, int z_zero_point, Tensor? s, bool hadamard"
)


def _check_zero_point(name: str, zero_point: int) -> None:
    require(0 <= zero_point <= 255, f"{name} must lie in 0..255, it is {zero_point}.")


def _check(y: Tensor, y_zero_point: int, z: Tensor, z_zero_point: int, s: Tensor | None, hadamard: bool) -> None:
    check_rows(y, z, s, hadamard)
    for name, x, zero_point in (("y", y, y_zero_point), ("z", z, z_zero_point)):
        require(x.dtype in (torch.float32, torch.uint8), f"a gate takes {name} in float32 or uint8, not in {x.dtype}.")
        if x.dtype == torch.uint8:
            _check_zero_point(f"{name}_zero_point", zero_point)


def _check_output(out_scale: float, out_zero_point: int) -> None:
    require(out_scale > 0, f"out_scale must be positive, not {out_scale}.")
    _check_zero_point("out_zero_point", out_zero_point)


def _dequantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return (x.to(torch.float32) - zero_point) * scale if x.dtype == torch.uint8 else x


def _gate(
    y: Tensor,
    y_scale: float,
    y_zero_point: int,
    z: Tensor,
    z_scale: float,
    z_zero_point: int,
    s: Tensor | None,
    hadamard: bool,
) -> Tensor:
    """What is quantized: float32 (..., n), contiguous."""
    y, z = _dequantize(y, y_scale, y_zero_point), _dequantize(z, z_scale, z_zero_point)
    return gated(y, z, s, hadamard)


def _reference(
    y: Tensor,
    y_scale: float,
    y_zero_point: int,
    z: Tensor,
    z_scale: float,
    z_zero_point: int,
    s: Tensor | None,
    hadamard: bool,
    out_scale: float,
    out_zero_point: int,
) -> Tensor:
    _check(y, y_zero_point, z, z_zero_point, s, hadamard)
    _check_output(out_scale, out_zero_point)
    x = _gate(y, y_scale, y_zero_point, z, z_scale, z_zero_point, s, hadamard)
    # As quantized_decomposed.quantize_per_tensor: times the reciprocal, which is rounded to float32.
    return (torch.round(x * (1.0 / out_scale)) + out_zero_point).clamp(0, 255).to(torch.uint8)


def _fake(
    y: Tensor,
    y_scale: float,
    y_zero_point: int,
    z: Tensor,
    z_scale: float,
    z_zero_point: int,
    s: Tensor | None,
    hadamard: bool,
    out_scale: float,
    out_zero_point: int,
) -> Tensor:
    _check(y, y_zero_point, z, z_zero_point, s, hadamard)
    _check_output(out_scale, out_zero_point)
    return y.new_empty(y.shape, dtype=torch.uint8)


def _per_token_reference(
    y: Tensor,
    y_scale: float,
    y_zero_point: int,
    z: Tensor,
    z_scale: float,
    z_zero_point: int,
    s: Tensor | None,
    hadamard: bool,
) -> tuple[Tensor, Tensor]:
    _check(y, y_zero_point, z, z_zero_point, s, hadamard)
    q, scale = quantize_per_token(_gate(y, y_scale, y_zero_point, z, z_scale, z_zero_point, s, hadamard))
    return (q.to(torch.int16) + TOKEN_ZERO_POINT).to(torch.uint8), scale


def _per_token_fake(
    y: Tensor,
    y_scale: float,
    y_zero_point: int,
    z: Tensor,
    z_scale: float,
    z_zero_point: int,
    s: Tensor | None,
    hadamard: bool,
) -> tuple[Tensor, Tensor]:
    _check(y, y_zero_point, z, z_zero_point, s, hadamard)
    q = y.new_empty(y.shape, dtype=torch.uint8)
    return q, y.new_empty((*y.shape[:-1], 1), dtype=torch.float32)


library.define(
    "qgate",
    f"({_OPERANDS}, float out_scale, int out_zero_point) -> Tensor",
    fake=_fake,
    reference=_reference,
)
library.define(
    "qgate_per_token",
    f"({_OPERANDS}) -> (Tensor q, Tensor scale)",
    fake=_per_token_fake,
    reference=_per_token_reference,
)


def qgate(
    y: Tensor,
    y_scale: float,
    y_zero_point: int,
    z: Tensor,
    z_scale: float,
    z_zero_point: int,
    s: Tensor | None,
    hadamard: bool,
    out_scale: float,
    out_zero_point: int,
) -> Tensor:
    """Gates, rotates and quantizes with one scale for all, as `quantized_decomposed.quantize_per_tensor` does.

    The native kernel rounds the float value before quantization elsewhere than the reference does, so that values
    next to a rounding boundary may come out one step apart; equal values give equal integers.

    Args:
        y: (..., n), float32, or uint8 that stands for `(y - y_zero_point) * y_scale`; rows may be strided.
        y_scale: not used for float32.
        y_zero_point: within 0..255; not used for float32.
        z: as `y`, of the same shape.
        z_scale: as `y_scale`.
        z_zero_point: as `y_zero_point`.
        s: smoothing of the gate, float32 (n,); None stands for ones.
        hadamard: whether to rotate; then n is an order that `hadamard_matrix.factor` takes.
        out_scale: positive.
        out_zero_point: within 0..255.

    Returns:
        uint8 (..., n), contiguous.

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above.
    """
    return torch.ops.mq_ao.qgate(
        y, y_scale, y_zero_point, z, z_scale, z_zero_point, s, hadamard, out_scale, out_zero_point
    )


def qgate_per_token(
    y: Tensor,
    y_scale: float,
    y_zero_point: int,
    z: Tensor,
    z_scale: float,
    z_zero_point: int,
    s: Tensor | None,
    hadamard: bool,
) -> tuple[Tensor, Tensor]:
    """Gates, rotates and quantizes every token by itself, by `mq_ao.ops.qlinear.quantize_per_token`.

    Args:
        y: as in `qgate`, like all others.

    Returns:
        q, uint8 (..., n), contiguous, with zero point 128, and scale, float32 (..., 1).

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as in `qgate`.
    """
    return torch.ops.mq_ao.qgate_per_token(y, y_scale, y_zero_point, z, z_scale, z_zero_point, s, hadamard)
