"""`mq_ao::qgate` and `mq_ao::qgate_per_token`: the block's gate, the online rotation and quantization in one pass.

x = y * z * sigmoid(s * z)      (S-SiLU, docs/method.md, S2; s absent: y * SiLU(z))
x = x @ hadamard_matrix.matrix(n)   if the input of out_proj is rotated (docs/method.md, R2)
q = quantized x, with a given scale or with one for every token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.gate import check_rows, gated
from mq_ao.ops.grids import Grid, dequantize
from mq_ao.ops.library import require
from mq_ao.ops.linear_packed import token_scales, uint8_per_token
from mq_ao.ops.operator import Operands, like, operator


def _check_zero_point(name: str, zero_point: int) -> None:
    require(0 <= zero_point <= 255, f"{name} must lie in 0..255, it is {zero_point}.")


def _check(a: Operands) -> None:
    check_rows(a)
    for name, x, zero_point in (("y", a.y, a.y_zero_point), ("z", a.z, a.z_zero_point)):
        require(x.dtype in (torch.float32, torch.uint8), f"a gate takes {name} in float32 or uint8, not in {x.dtype}.")
        if x.dtype == torch.uint8:
            _check_zero_point(f"{name}_zero_point", zero_point)


def _static(a: Operands) -> Tensor:
    _check(a)
    require(a.out_scale > 0, f"out_scale must be positive, not {a.out_scale}.")
    _check_zero_point("out_zero_point", a.out_zero_point)
    return like(a.y, dtype=torch.uint8)


@operator(results=_static)
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
    x = gated(dequantize(y, Grid(y_scale, y_zero_point)), dequantize(z, Grid(z_scale, z_zero_point)), s, hadamard)
    # As quantized_decomposed.quantize_per_tensor: times the reciprocal, which is rounded to float32.
    return (torch.round(x * (1.0 / out_scale)) + out_zero_point).clamp(0, 255).to(torch.uint8)


def _per_token(a: Operands) -> tuple[Tensor, Tensor]:
    _check(a)
    return like(a.y, dtype=torch.uint8), token_scales(a.y, a.bits, a.group_size)


@operator(results=_per_token)
def qgate_per_token(
    y: Tensor,
    y_scale: float,
    y_zero_point: int,
    z: Tensor,
    z_scale: float,
    z_zero_point: int,
    s: Tensor | None,
    hadamard: bool,
    bits: int = 8,
    group_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gates, rotates and quantizes every token by itself, by `mq_ao.ops.linear_packed.int8_per_token`.

    Args:
        y: as in `qgate`, like all others.
        bits: 8, or 4 that are held in 8.
        group_size: see `quantize_per_token`.

    Returns:
        q, uint8 (..., n), contiguous, with zero point 128, and scale, float32 (..., 1) or (..., n / group_size).

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as in `qgate`, or the rows cannot be rounded so.
    """
    x = gated(dequantize(y, Grid(y_scale, y_zero_point)), dequantize(z, Grid(z_scale, z_zero_point)), s, hadamard)
    return uint8_per_token(x, bits, group_size)
